"""From a softmax back to q k^T: the scale, softcap, masks and sinks between them.

    softmax([mask] [cap * tanh(] [scale *] q k^T [)] [, sinks])

Where two operands could lead to the product the larger is tried first, and it is its failure that
is reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from torch.fx import Node

from kvcompile.concrete import CASTS, Concrete, Miss, constant, kind, value
from kvcompile.masks import HIDDEN, Term
from kvcompile.operands import scaling_of
from kvcompile.products import PRODUCTS

SAME = {"clone", "contiguous", "alias", "detach", "dropout"}
SHAPED = {"view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "flatten",
          "unflatten"}


@dataclass(frozen=True)
class Logits:
    """What lies between `product` and the softmax."""

    product: Node | None = None
    factor: float = 1.0
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    sinks: Node | None = None

    @property
    def scale(self) -> float:
        return self.factor * (self.softcap or 1.0)


@dataclass(frozen=True)
class Walk:
    """Finds the logits of a softmax in one graph."""

    at: Concrete

    def logits(self, node: object, so: Logits = Logits()) -> Logits:
        """`so`, what the steps from the softmax down to `node` gave, with the steps beyond."""
        if not isinstance(node, Node):
            raise Miss(f"{node} takes the place of scores")
        name, first = kind(node), node.args[0] if node.args else None
        if name == "baddbmm":
            bias, scale = (float(node.kwargs.get(k, 1)) for k in ("beta", "alpha"))  # type: ignore
            if bias:
                so = self._masked(so, node, first, "add", bias * so.factor)
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
                raise Miss("is a second softcap, or a negative one", node)
            return self.logits(first, replace(so, softcap=so.factor, factor=1.0))
        if name == "add" and not node.kwargs:
            return self._larger(node, [(x, self._masked(so, node, y, "add", so.factor), None)
                                       for x, y in (node.args, node.args[::-1])])
        if name == "masked_fill":
            self._hides(node.args[2], node)
            return self.logits(first, self._masked(so, node, node.args[1], "hide"))
        if name == "where" and len(node.args) == 3:
            (_, a, b), how = node.args, ("see", "hide")
            return self._larger(node, [(x, self._masked(so, node, first, h), fill)
                                       for (x, fill), h in zip(((a, b), (b, a)), how, strict=True)])
        if name == "maximum":  # a floor, such as finfo.min
            self._hides(node.args[1], node)
            return self.logits(first, so)
        if name == "sub" and _is_maximum(node.args[1], first):  # softmax takes no notice
            return self.logits(first, so)
        if name == "cat" and not so.sinks and not so.terms and _adds_column(node):
            scores, sinks = first  # type: ignore[misc]
            return self.logits(scores, replace(so, sinks=sinks))
        raise Miss(f"'{name or node.target}' stands between the scores and their softmax", node)

    def _masked(self, so: Logits, node: Node, mask: object, how: str,
                factor: float = 1.0) -> Logits:
        if so.softcap:
            raise Miss("masks before the softcap, which leaves masked tokens visible", node)
        if not isinstance(mask, Node):
            raise Miss(f"{mask} takes the place of a mask", node)
        term = Term(mask, how, factor, value(node).dim())  # type: ignore[arg-type]
        return replace(so, terms=(*so.terms, term))

    def _hides(self, fill: object, node: Node) -> None:
        if (number := constant(self.at, fill)) > HIDDEN:
            raise Miss(f"fills masked scores with {number:g}, which does not hide them", node)

    def _larger(self, node: Node, options: Sequence[tuple[object, Logits, object]]) -> Logits:
        """The option (scores, steps so far, fill) that leads to a product, larger scores first."""
        first: Miss | None = None
        for x, so, fill in sorted(options, key=lambda o: -self._numel(o[0])):
            try:
                if self._rows(x) != self._rows(node):
                    raise Miss(f"{x} is not shaped like the scores", node)
                found = self.logits(x, so)
                if fill is not None:
                    self._hides(fill, node)
                return found
            except Miss as miss:
                first = first or miss
        assert first is not None
        raise first

    def _rows(self, x: object) -> tuple[int, ...]:
        return self.at.shape(x)[-2:] if isinstance(x, Node) else ()

    def _numel(self, x: object) -> int:
        return prod(self.at.shape(x)) if isinstance(x, Node) else 0


def _is_maximum(node: object, of: object) -> bool:
    """amax(of, -1, keepdim=True), or the values of max over the same."""
    if isinstance(node, Node) and "getitem" in str(node.target) and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, Node) or kind(node) not in ("amax", "max") or node.args[0] is not of:
        return False
    dims, keep = (*node.args[1:], None, None)[:2]
    return bool(keep) and dims in (-1, [-1], value(of).dim() - 1)  # type: ignore[arg-type]


def _adds_column(node: Node) -> bool:
    """cat([scores, one column], -1)."""
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return bool(len(parts) == 2 and dim in (-1, value(node).dim() - 1)  # type: ignore
                and value(parts[1]).shape[-1] == 1)  # type: ignore
