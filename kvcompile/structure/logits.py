"""From a softmax back to q k^T: the scale, softcap, masks and sinks between them.

    softmax([mask] [cap * tanh(] [scale *] q k^T [)] [, sinks])

Where two operands could lead to the product the larger is tried first, and it is its failure that
is reported.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from torch.fx import Node

from kvcompile.structure.concrete import CASTS, Concrete, Miss, argument, constant, kind, value
from kvcompile.structure.masks import HIDDEN, Term
from kvcompile.structure.operands import scaling_of
from kvcompile.structure.products import PRODUCTS

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


EXACT = Logits()


@dataclass(frozen=True)
class Walk:
    """Finds the logits of a softmax in one graph."""

    at: Concrete

    def logits(self, node: object, so: Logits = EXACT) -> Logits:
        """`so`, what the steps from the softmax down to `node` gave, with the steps beyond."""
        if not isinstance(node, Node):
            raise Miss(f"{node} takes the place of scores")
        name = kind(node)
        if name in PRODUCTS:
            return self._product(node, so)
        if name in SAME | CASTS or name in SHAPED and self.at.same_rows(argument(node), node):
            return self.logits(argument(node), so)
        if name in ("mul", "div"):
            x, factor = scaling_of(self.at, node)
            return self.logits(x, replace(so, factor=so.factor * factor))
        if name == "tanh":
            if so.softcap or so.factor <= 0:
                raise Miss("is a second softcap, or a negative one", node)
            return self.logits(argument(node), replace(so, softcap=so.factor, factor=1.0))
        if name == "add" and not node.kwargs:
            return self._larger(node, [(x, _masked(so, node, y, "add", so.factor), None)
                                       for x, y in (node.args, node.args[::-1])])
        if name == "masked_fill":
            self._hides(node.args[2], so, node)
            return self.logits(argument(node), _masked(so, node, node.args[1], "hide"))
        if name == "where" and len(node.args) == 3:
            mask, a, b = node.args
            return self._larger(node, [(a, _masked(so, node, mask, "see"), b),
                                       (b, _masked(so, node, mask, "hide"), a)])
        if name == "maximum":  # a floor, such as finfo.min
            self._hides(node.args[1], so, node)
            return self.logits(argument(node), so)
        if name == "sub" and _is_maximum(node.args[1], argument(node)):  # softmax ignores it
            return self.logits(argument(node), so)
        if name == "cat" and not so.sinks and not so.terms and _adds_column(node):
            scores, sinks = node.all_input_nodes
            return self.logits(scores, replace(so, sinks=sinks))
        raise Miss(f"'{name or node.target}' stands between the scores and their softmax", node)

    def _product(self, node: Node, so: Logits) -> Logits:
        if kind(node) == "baddbmm":
            beta, alpha = (constant(self.at, node.kwargs.get(k, 1)) for k in ("beta", "alpha"))
            if beta:
                so = _masked(so, node, node.args[0], "add", beta * so.factor)
            so = replace(so, factor=so.factor * alpha)
        return replace(so, product=node)

    def _hides(self, fill: object, so: Logits, node: Node) -> None:
        if (number := constant(self.at, fill) * so.factor) > HIDDEN:
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
                    self._hides(fill, so, node)
                return found
            except Miss as miss:
                first = first or miss
        assert first is not None
        raise first

    def _rows(self, x: object) -> tuple[int, ...]:
        return self.at.shape(x)[-2:] if isinstance(x, Node) else ()

    def _numel(self, x: object) -> int:
        return prod(self.at.shape(x)) if isinstance(x, Node) else 0


def _masked(so: Logits, node: Node, mask: object, how: Literal["add", "hide", "see"],
            factor: float = 1.0) -> Logits:
    """`so` and the term with which `node` masks."""
    if so.softcap:
        raise Miss("masks before the softcap, which leaves masked tokens visible", node)
    if not isinstance(mask, Node):
        raise Miss(f"{mask} takes the place of a mask", node)
    return replace(so, terms=(*so.terms, Term(mask, how, factor, value(node).dim())))


def _is_maximum(node: object, of: Node) -> bool:
    """amax(of, -1, keepdim=True), or the values of max over the same."""
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == 0:
        node = argument(node)
    if not isinstance(node, Node) or kind(node) not in ("amax", "max") or node.args[0] is not of:
        return False
    dims, keep = (*node.args[1:], None, None)[:2]
    return bool(keep) and dims in (-1, [-1], value(of).dim() - 1)


def _adds_column(node: Node) -> bool:
    """cat([scores, one column], -1)."""
    parts = node.all_input_nodes
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return (len(parts) == 2 and dim in (-1, value(node).dim() - 1)
            and bool(value(parts[1]).shape[-1] == 1))
