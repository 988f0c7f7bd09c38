"""The projections of K and V that can be rewritten: where their heads are, and the weights.

A target is a linear together with what only splits its result into heads; or K or V as attention is
given it, as if the identity had made it (`whole`).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvcompile.ir import ROPE, argument
from kvcompile.rewrite import Refused
from kvcompile.structure.movement import CASTS, feeds, moves, packet
from kvcompile.structure.sources import Linear, sources
from kvcompile.structure.writer import Writer

aten = torch.ops.aten


class Target(NamedTuple):
    """A projection that can be rewritten: where its heads are [B, H, S, D], and its weight."""

    node: Node
    linear: Linear
    weight: Tensor       # [H * D, in]
    bias: Tensor | None  # [H * D]


def target(gm: GraphModule, node: Node, side: str, layer: int) -> Target | Refused | None:
    """What makes K or V of one layer; None if it has been factored already."""
    own = _unrotated(argument(node, side))
    found = sources(own, layer)
    if isinstance(found, Refused):
        return Refused(layer, f"{side}: {found.reason}", found.node)
    if len(found.linears) > 1 or found.linears[0].below:
        return None if _made(found.linears, side, layer) else Refused(
            layer, f"{side} comes from several projections, a latent perhaps",
            found.linears[0].node.name)
    (linear,) = found.linears
    if linear.norms:
        return Refused(layer, f"{side}: a norm stands between the projection and attention",
                       linear.norms[0].node.name)
    at, turned = own, linear.rope
    while at is not turned and turned is not None:
        if not moves(at) and packet(at) not in CASTS or len(feeds(at)) != 1 or (
                at.meta["val"].shape != feeds(at)[0].meta["val"].shape):
            return Refused(layer, f"{side} is not one rotation of its projection", at.name)
        at = feeds(at)[0]
    if turned is not None:
        at = argument(turned, "x")
    rows = linear.rows.flatten()
    write = Writer(gm, own)
    weight, bias = write.tensor(linear.weight), linear.bias and write.tensor(linear.bias)
    weight = (weight.t() if linear.transposed else weight)[rows.to(weight.device)]
    return Target(at, linear, weight, None if not isinstance(bias, Tensor) else bias[rows])


def both(gm: GraphModule, node: Node, sides: str, layer: int) -> list[Target] | Refused:
    """The targets of two sides of a layer ("kv", "qk"), or why one of them is none."""
    found = list[Target]()
    for side in sides:
        made = target(gm, node, side, layer)
        if made is None:
            return Refused(layer, f"{side} has been factored already", node.name)
        if isinstance(made, Refused):
            return made
        found.append(made)
    return found


def _unrotated(node: Node) -> Node:
    """`node`, or of channels that are rotated beside others that are not those others."""
    if packet(node) is aten.cat and len(parts := node.all_input_nodes) == 2:
        still = [n for n in parts if not _turned(n)]
        return still[0] if len(still) == 1 else node
    return node


def _turned(node: Node) -> bool:
    """Whether `node` is a rotation, of one head for all perhaps."""
    while moves(node) and len(feeds(node)) == 1:
        node = feeds(node)[0]
    return node.target is ROPE


def whole(gm: GraphModule, node: Node, side: str, layer: int) -> Target | Refused | None:
    """The same of K or V itself, after its rotation and norms: the identity of it."""
    own = argument(node, side)
    found = sources(own, layer)
    if not isinstance(found, Refused):
        if _made(found.linears, side, layer):
            return None
        if len(found.linears) == 1 and not (found.linears[0].norms or found.linears[0].rope):
            return target(gm, node, side, layer)  # nothing is in the way of the weight's rows
    _, heads, _, dim = own.meta["val"].shape
    made = Linear(own, own, "", None, False, torch.arange(heads * dim).view(heads, dim), (), (),
                  None, ())
    value = own.meta["val"]
    return Target(own, made, torch.eye(heads * dim, dtype=value.dtype, device=value.device), None)


def _made(linears: tuple[Linear, ...], side: str, layer: int) -> bool:
    """Whether `project` made them."""
    return all(x.weight.startswith(f"layer{layer}_{side}_up") for x in linears)


def per_token(write: Writer, x: Node, positions: Node) -> Node:
    """x as [B, S, in]; a model may have all tokens in one dim, and K and V have heads."""
    if x.meta["val"].dim() == 3:
        return x
    if x.meta["val"].dim() == 4:
        return write.call(aten.flatten.using_ints, write.call(aten.transpose.int, x, 1, 2), 2)
    sizes = [write.call(aten.sym_size.int, positions, d) for d in (0, 1)]
    return write.call(aten.reshape.default, x, [*sizes, -1])
