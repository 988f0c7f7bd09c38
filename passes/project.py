"""project: a projection of lower rank. linear(x, W) -> linear(linear(x, A), B)

    K_g = B_g (A_g x),  V_g = B_g (A_g x)        for each group g of kv heads

The weights are computed when the graph is lowered, and are buffers of the graph: the model's own
stay as they are. What is cached is not decided here: `place` finds the latents A x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from kvcompile.errors import RecipeError
from kvcompile.factor import factor, rank_of, spectrum
from kvcompile.ir import argument, attention_nodes
from kvcompile.movement import CASTS, feeds, moves, packet
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.sources import Linear, sources
from kvcompile.store import SIDES
from kvcompile.writer import Writer

aten = torch.ops.aten


class Target(NamedTuple):
    """A projection that can be factored: where its heads are [B, H, S, D], and its weight."""

    node: Node
    linear: Linear
    weight: Tensor       # [H * D, in]
    bias: Tensor | None  # [H * D]


@dataclass(frozen=True)
class Project:
    """linear(x, W) -> linear(linear(x, A), B), rank by rank as the axes `rank.k`, `rank.v` say.

    rank.heads    kv heads that are factored together
    rank.k, .v    a rank (a whole number), or the fraction of the group's channels
    rank.energy   instead: the share of the outputs' squares that is kept
    rank.multiple ranks are multiples of this many
    rank.text     whether W is whitened by what the calibration text makes of it
    rank.rotate   whether latents are turned by a Hadamard matrix
    """

    name: ClassVar[str] = "project"
    order: ClassVar[int] = 30
    axes: ClassVar[tuple[str, ...]] = ("rank.k", "rank.v", "rank.heads", "rank.energy",
                                       "rank.multiple", "rank.text", "rank.rotate")

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        nodes = attention_nodes(gm.graph)
        targets = {(layer, side): _target(gm, nodes[layer], side, layer)
                   for layer, own in enumerate(plan) for side in SIDES
                   if own.get(f"rank.{side}") is not None}
        moments = _moments(gm, [t.linear.input for (layer, _), t in targets.items()
                                if isinstance(t, Target) and plan[layer].get("rank.text")])
        outcomes: list[Outcome] = []
        for (layer, side), target in targets.items():
            if isinstance(target, Refused):
                outcomes.append(target)
            elif target is not None:
                inputs = moments.get(target.linear.input)
                outcomes.append(_rewrite(gm, layer, side, target, plan[layer], inputs,
                                         argument(nodes[layer], "positions")))
        gm.graph.eliminate_dead_code()
        return outcomes


def _target(gm: GraphModule, node: Node, side: str, layer: int) -> Target | Refused | None:
    """What makes K or V of one layer; None if it has been factored already."""
    own = argument(node, side)
    found = sources(own, layer)
    if isinstance(found, Refused):
        return Refused(layer, f"{side}: {found.reason}", found.node)
    if len(found.linears) > 1 or found.linears[0].below:
        made = all(x.weight.startswith(f"layer{layer}_{side}_up") for x in found.linears)
        return None if made else Refused(layer, f"{side} comes from several projections, a latent "
                                         "perhaps", found.linears[0].node.name)
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


def _rewrite(gm: GraphModule, layer: int, side: str, target: Target, plan: LayerPlan,
             inputs: Tensor | None, positions: Node) -> Outcome:
    """linear(x, W) -> for each group linear(linear(x, A_g), B_g), side by side."""
    heads, dim = target.linear.rows.shape
    per: Any = plan.get("rank.heads")
    energy: Any = plan.get("rank.energy")
    multiple: Any = plan.get("rank.multiple", 1)
    wanted: Any = plan.get(f"rank.{side}")
    per = next(n for n in range(min(per, heads), 0, -1) if heads % n == 0)
    weights = target.weight.unflatten(0, (heads // per, per * dim))
    moments = [w @ w.t() if inputs is None else w @ inputs @ w.t() for w in weights.double()]
    ranks = [rank_of(wanted, energy, spectrum(moment)[0], multiple) for moment in moments]
    rank = max(ranks)  # groups are stored side by side: they have one rank
    if rank < 1:
        raise RecipeError(f"{plan.origin[f'rank.{side}']}: a rank of {rank} keeps nothing")
    rotate = bool(plan.get("rank.rotate", False)) and rank & -rank >= 2
    made = [factor(w, m, rank, rotate) for w, m in zip(weights, moments, strict=True)]
    write, source = Writer(gm, target.node), (target.linear.weight,)
    with gm.graph.inserting_before(target.node.next):
        down = write.buffer(f"layer{layer}_{side}_down", torch.cat([f.down for f in made]), source)
        x = write.call(aten.linear.default, _tokens(write, target.linear.input, positions), down)
        parts = []
        for g, f in enumerate(made):
            own = x if len(made) == 1 else write.call(
                aten.slice.Tensor, x, -1, g * rank, (g + 1) * rank)
            args = [own, write.buffer(f"layer{layer}_{side}_up{g}", f.up, source)]
            if target.bias is not None:
                bias = target.bias.unflatten(0, (len(made), -1))[g]
                args.append(write.buffer(f"layer{layer}_{side}_bias{g}", bias,
                                         (str(target.linear.bias),)))
            parts.append(write.call(aten.linear.default, *args))
        out = parts[0] if len(parts) == 1 else write.call(aten.cat.default, parts, -1)
        out = write.call(aten.unflatten.int, out, -1, [heads, dim])
        out = write.call(aten.transpose.int, out, 1, 2)
    target.node.replace_all_uses_with(out)
    kept = sum(f.kept for f in made) / len(made)
    return Rewritten(layer, f"{side} {len(made)} x rank {rank} of {per * dim}, {kept:.1%} kept")


def _moments(gm: GraphModule, nodes: list[Node]) -> dict[Node, Tensor]:
    """E[x x^T] [in, in] of projections' inputs on the calibration text; none, if none is asked."""
    if not nodes:
        return {}
    if "text" not in gm.meta:
        raise RecipeError("whitening needs a text, and a graph that arrives through the "
                          "torch.compile backend has none: whiten=false")
    ids = gm.meta["text"]()
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
    run = _Second(gm, set(nodes))
    with torch.no_grad():
        run.run(ids, positions, torch.ones_like(ids, dtype=torch.bool), positions[0, -1:])
    return run.found


class _Second(Interpreter):
    """Runs a graph and keeps second moments of some nodes."""

    def __init__(self, gm: GraphModule, nodes: set[Node]) -> None:
        super().__init__(gm)
        self.nodes, self.found = nodes, dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if n in self.nodes:
            x = out.flatten(0, -2).double()
            self.found[n] = x.t() @ x / len(x)
        return out


def _tokens(write: Writer, x: Node, positions: Node) -> Node:
    """x as [B, S, in], where the model has all tokens in one dim."""
    if x.meta["val"].dim() == 3:
        return x
    sizes = [write.call(aten.sym_size.int, positions, d) for d in (0, 1)]
    return write.call(aten.reshape.default, x, [*sizes, -1])


PASS = Project()
