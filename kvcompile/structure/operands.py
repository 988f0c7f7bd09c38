"""Where the queries, keys and values of an attention come from, behind copies and broadcasts.

A chain of copying ops (transpose, expand, reshape, repeat_interleave, ...) is followed by sending
an index through it on real tensors: k repeated over query heads is undone to its kv heads, merged
and grouped head dimensions are taken apart, without a pattern for any spelling of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor
from torch.fx import Node

from kvcompile.structure.concrete import CASTS, Concrete, Miss, argument, constant, kind, value

MOVES = {"transpose", "permute", "t", "numpy_T", "mT", "swapaxes", "movedim", "view", "reshape",
         "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "expand", "expand_as",
         "unsqueeze", "squeeze", "clone", "contiguous", "alias", "detach", "repeat",
         "repeat_interleave", "slice", "select", "index", "index_select", "lift_fresh_copy"}


@dataclass(frozen=True)
class Operand:
    """[batch, heads, tokens, D], read from `node`: split, permuted, then heads flattened.

    `split` is a dimension that holds batch and heads together; the operand that was traced is
    `factor` times the result with each head repeated.
    """

    node: Node
    heads: int
    order: tuple[int, ...]
    split: int | None = None
    factor: float = 1.0

    @property
    def plain(self) -> bool:
        return self.split is None and self.order == (0, 1, 2, 3)


def sources(at: Concrete, operand: Node, arrange: Callable[[Tensor], Tensor],
            scaled: bool = True) -> list[Operand]:
    """What `operand` is a copy of: fewest heads first, then unscaled, plain and near ones.

    `arrange` brings a tensor of the operand's shape to [batch * heads, tokens, D]; constant
    factors on the way are taken off if `scaled`.
    """
    found: list[Operand] = []
    for node, factor, index, seen in _chain(at, operand, arrange, scaled):
        heads = seen.shape[0] // at.batch
        for form, split in _forms(at, index):
            found += [Operand(node, h, order, split, factor)
                      for order, h in _orders(at, form, seen, heads)][:1]
    if not found:
        raise Miss("is no copy of a tensor [batch, heads, tokens, D]", operand)
    return sorted(found, key=lambda o: (o.heads, o.split is not None, o.factor == 1.0, not o.plain))


def per_head(at: Concrete, operand: Node, heads: int) -> Node:
    """The tensor [heads] of which `operand` [batch, heads, tokens, 1] is a copy."""
    for node, _, index, seen in _chain(at, operand, lambda x: x, scaled=False):
        if index.dim() == 1 and torch.equal(seen, index.view(1, -1, 1, 1).expand_as(seen)):
            return node
    raise Miss(f"is no copy of one number for each of {heads} heads", operand)


def _chain(at: Concrete, operand: Node, arrange: Callable[[Tensor], Tensor],
           scaled: bool) -> Iterator[tuple[Node, float, Tensor, Tensor]]:
    """(node, factor, its elements' numbers, the same as `arrange` sees them) up the chain."""
    chain: list[Node] = []
    node, factor = operand, 1.0
    while True:
        shape = at.shape(node)
        index = torch.arange(torch.Size(shape).numel()).view(shape)
        moved = follow(at, chain, index)
        try:
            yield node, factor, index, arrange(moved)
        except RuntimeError as error:
            raise Miss("does not broadcast to batch and heads", operand) from error
        if kind(node) in MOVES:
            chain.append(node)
        elif scaled and kind(node) in ("mul", "div"):
            try:
                scale, scaling = scaling_of(at, node)
            except Miss:
                return
            factor *= scaling
            if at.shape(scale) != shape:
                return
            node = scale
            continue
        elif not _upcast(node):
            return
        node = argument(node)


def follow(at: Concrete, chain: list[Node], x: Tensor) -> Tensor:
    """What the copies in `chain`, the last one first, make of x."""
    for step in reversed(chain):
        known = {argument(step): x}
        args, kwargs = (at.given(a, known) for a in (step.args, dict(step.kwargs)))
        x = step.target(*args, **kwargs)  # type: ignore[operator]
    return x


def scaling_of(at: Concrete, node: Node) -> tuple[Node, float]:
    """(x, c) of a node that is c * x for a constant c."""
    if node.kwargs or len(node.args) != 2:
        raise Miss(f"is '{kind(node)}' with options", node)
    if kind(node) == "div":
        return argument(node), 1 / constant(at, node.args[1])
    try:
        return argument(node), constant(at, node.args[1])
    except Miss:
        return argument(node, 1), constant(at, node.args[0])


def _upcast(node: Node) -> bool:
    """Whether the node is a cast that changes no value."""
    if kind(node) not in CASTS:
        return False
    before, after = value(argument(node)).dtype, value(node).dtype
    return before.is_floating_point and torch.promote_types(before, after) == after


def _forms(at: Concrete, index: Tensor) -> Iterator[tuple[Tensor, int | None]]:
    """`index` with batch and heads as dimensions of their own, and which dimension was split."""
    if index.dim() in (4, 5):
        yield index, None
    if index.dim() == 3:
        yield index[:, None], None
        for dim, n in enumerate(index.shape):
            if n % at.batch == 0:
                yield index.unflatten(dim, (at.batch, -1)), dim


def _orders(at: Concrete, form: Tensor, seen: Tensor,
            heads: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Permutations that bring `form` to [batch, h.., tokens, D] as `seen` has it, with their h."""
    for order in permutations(range(form.dim())):
        view = form.permute(order)
        h = torch.Size(view.shape[1:-2]).numel()
        if view.shape[0] == at.batch and h and heads % h == 0 \
                and view.shape[-2:] == seen.shape[-2:]:
            each = view.flatten(1, -3).repeat_interleave(heads // h, 1)
            if torch.equal(each.flatten(0, 1), seen):
                yield order, h
