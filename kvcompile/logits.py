"""From a softmax back to q k^T: the scale, softcap, masks and sinks between them.

    softmax([cast] [mask] [cap * tanh(] [scale *] q k^T [)] [, sinks])

Wherever two operands could lead to the product both are tried; a failure reports the one that
came further.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.fx import Node

from kvcompile.concrete import Concrete, Miss, constant, kind, value
from kvcompile.masks import HIDDEN, Term
from kvcompile.operands import CASTS, scaling_of
from kvcompile.products import PRODUCTS

SAME = {"clone", "contiguous", "alias", "detach", "dropout"}
SHAPED = {"view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "flatten",
          "unflatten"}


@dataclass(frozen=True)
class Logits:
    """What lies between `product` and the softmax, found in `depth` steps."""

    product: Node | None = None
    factor: float = 1.0
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    sinks: Node | None = None
    depth: int = 0

    @property
    def scale(self) -> float:
        return self.factor * (self.softcap or 1.0)


@dataclass(frozen=True)
class Walk:
    """Finds the logits of a softmax in one graph."""

    at: Concrete

    def logits(self, node: object, so: Logits = Logits()) -> Logits:
        """What `node` adds to `so`, the steps from the softmax down to here."""
        if not isinstance(node, Node):
            raise Miss(f"{node} instead of scores", depth=so.depth)
        so = replace(so, depth=so.depth + 1)
        try:
            return self._step(kind(node), node, so)
        except Miss as miss:
            raise Miss(miss.reason, miss.node or node, max(miss.depth, so.depth)) from None

    def _step(self, name: str, node: Node, so: Logits) -> Logits:
        first = node.args[0] if node.args else None
        if name == "baddbmm":
            bias, scale = (float(node.kwargs.get(k, 1)) for k in ("beta", "alpha"))  # type: ignore
            if bias:
                so = self._masked(so, node, Term(first, "add", bias * so.factor))  # type: ignore
            return replace(so, product=node, factor=so.factor * scale)
        if name in PRODUCTS:
            return replace(so, product=node)
        if name in SAME | CASTS or name in SHAPED and self.at.same_rows(first, node):
            return self.logits(first, so)
        if name in ("mul", "div"):
            x, factor = scaling_of(self.at, node)
            return self.logits(x, replace(so, factor=so.factor * factor))
        if name == "tanh":
            if so.softcap or so.factor <= 0:
                raise Miss("is a second softcap or a negative one", node)
            return self.logits(first, replace(so, softcap=so.factor, factor=1.0))
        if name == "add" and not node.kwargs:
            def one(x: object, y: object) -> Callable[[], Logits]:
                return lambda: self.logits(x, self._masked(so, node, _term(y, "add", so.factor)))
            return _first(one(*node.args), one(*reversed(node.args)))
        if name == "masked_fill":
            self._hides(node.args[2], node)
            return self.logits(first, self._masked(so, node, _term(node.args[1], "hide")))
        if name == "where" and len(node.args) == 3:
            def branch(x: object, fill: object, how: str) -> Callable[[], Logits]:
                def go() -> Logits:
                    found = self.logits(x, self._masked(so, node, _term(first, how)))
                    self._hides(fill, node)
                    return found
                return go
            _, a, b = node.args
            return _first(branch(a, b, "see"), branch(b, a, "hide"))
        if name == "maximum":  # finfo.min as a floor
            self._hides(node.args[1], node)
            return self.logits(first, so)
        if name == "sub" and _is_maximum(node.args[1], first):  # softmax does not see it
            return self.logits(first, so)
        if name == "cat" and not so.sinks and not so.terms and _one_more(node):
            scores, sinks = first  # type: ignore[misc]
            return self.logits(scores, replace(so, sinks=sinks))
        raise Miss(f"'{name or node.target}' stands between the scores and their softmax", node)

    def _masked(self, so: Logits, node: Node, term: Term) -> Logits:
        if so.softcap:
            raise Miss("masks before the softcap, which keeps masked tokens visible", node)
        return replace(so, terms=(*so.terms, term._replace(rank=value(node).dim())))

    def _hides(self, fill: object, node: Node) -> None:
        if (number := constant(self.at, fill)) > HIDDEN:
            raise Miss(f"fills masked scores with {number:g}, which does not hide them", node)


def _term(node: object, how: str, factor: float = 1.0) -> Term:
    if not isinstance(node, Node):
        raise Miss(f"{node} instead of a mask")
    return Term(node, how, factor)  # type: ignore[arg-type]


def _first(*attempts: Callable[[], Logits]) -> Logits:
    """The first attempt that succeeds, else the miss that came furthest."""
    misses: list[Miss] = []
    for attempt in attempts:
        try:
            return attempt()
        except Miss as miss:
            misses.append(miss)
    raise max(misses, key=lambda m: m.depth)


def _is_maximum(node: object, of: object) -> bool:
    """amax(of, -1, keepdim=True), or the values of max over the same."""
    if isinstance(node, Node) and "getitem" in str(node.target) and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, Node) or kind(node) not in ("amax", "max") or node.args[0] is not of:
        return False
    dims, keep = (*node.args[1:], None, None)[:2]
    return bool(keep) and dims in (-1, [-1], value(of).dim() - 1)  # type: ignore[arg-type]


def _one_more(node: Node) -> bool:
    """cat([scores, one column], -1)."""
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return bool(len(parts) == 2 and dim in (-1, value(node).dim() - 1)  # type: ignore
                and value(parts[1]).shape[-1] == 1)  # type: ignore
