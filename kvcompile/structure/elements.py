"""Which element of which tensor lands where, token by token, through ops that only move elements.

    x[token, ...] = tensor[token, channel]

Tensors have the same tokens: their symbolic sizes (batch and length, or both in one) in front of
the others in order. The rest of a tensor's sizes, flattened, are its channels.
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from kvcompile.structure.movement import CASTS, Probe, feeds, moves, packet


@dataclass(frozen=True, eq=False)
class Elements:
    """Of a tensor with channels of shape [...]: `owner[...]` is an index into `nodes`, and
    `channel[...]` the channel of that node."""

    nodes: tuple[Node, ...]
    owner: Tensor
    channel: Tensor


class Mixed(Exception):
    """Elements of different tokens meet, or an element comes from elsewhere; the node."""


class Tracer:
    """Follows elements back to given nodes, the ends."""

    def __init__(self) -> None:
        self.probe = Probe()

    def elements(self, node: Node, ends: Collection[Node]) -> Elements:
        """Where the channels of `node` come from; those of q, k or v are [heads, channels]."""
        starts: dict[Node, int] = {}
        known: dict[Node, Tensor] = {}
        plane = self._plane(node, ends, starts, known)
        plane = plane.permute(_order(node)).reshape(-1, *_channels(node))
        if bool((plane == 0).any()):
            raise Mixed(node)
        nodes = tuple(starts)
        first = torch.tensor([*starts.values()])
        owner = torch.bucketize(plane.contiguous(), first, right=True) - 1
        widths = torch.tensor([width(n) for n in nodes])[owner]
        number = plane - first[owner]
        token, channel = number // widths, number % widths
        own = torch.arange(len(plane)).view(-1, *[1] * (plane.ndim - 1))
        if bool((token != own).any()) or bool((owner != owner[0]).any()) or bool(
                (channel != channel[0]).any()):
            raise Mixed(node)
        return Elements(nodes, owner[0], channel[0])

    def _plane(self, node: Node, ends: Collection[Node], starts: dict[Node, int],
               known: dict[Node, Tensor]) -> Tensor:
        if node in known:
            return known[node]
        if node in ends:
            starts[node] = 1 + sum(self.probe.shape(n).numel() for n in starts)
            shape, order = self.probe.shape(node), _order(node)
            numbers = torch.arange(shape.numel()).view([shape[d] for d in order])
            plane = numbers.permute([order.index(d) for d in range(len(order))]) + starts[node]
        elif moves(node):
            given = [(self._plane(n, ends, starts, known),) for n in feeds(node)]
            plane = self.probe.move(node, given)[0]
        elif packet(node) in CASTS and same_dtype(node):
            plane = self._plane(feeds(node)[0], ends, starts, known)
        else:
            raise Mixed(node)
        known[node] = plane
        return plane


def same_dtype(node: Node) -> bool:
    """Whether a cast is none."""
    return bool(feeds(node)[0].meta["val"].dtype == node.meta["val"].dtype)


def width(node: Node) -> int:
    """Channels: numbers that one token has in `node`."""
    return prod(_channels(node))


def _channels(node: Node) -> list[int]:
    return [int(n) for n in node.meta["val"].shape if not isinstance(n, SymInt)]


def _order(node: Node) -> list[int]:
    """The dims of `node`, those of tokens first."""
    sizes = node.meta["val"].shape
    return sorted(range(len(sizes)), key=lambda d: not isinstance(sizes[d], SymInt))


def per_token(node: Node) -> bool:
    """Whether `node` is a tensor of the call's tokens, batch and length apart or in one."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    sizes: list[Any] = [*value.shape]
    symbolic = [n for n in sizes if isinstance(n, SymInt)]
    free = {s for n in symbolic for s in n.node.expr.free_symbols}
    return 0 < len(symbolic) == len(free) <= 2 or len(symbolic) == 1 and len(free) == 2
