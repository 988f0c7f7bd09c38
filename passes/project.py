"""project: a projection of lower rank. linear(x, W) -> linear(linear(x, A), B)

    K_g = B_g (A_g x),  V_g = B_g (A_g x)        for each group g of kv heads

The weights are computed when the graph is lowered, and are buffers of the graph: the model's own
stay as they are. What is cached is not decided here: `place` finds the latents A x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from kvcompile.calibration.factor import factor, rank_of, spectrum
from kvcompile.errors import RecipeError
from kvcompile.ir import argument, attention_nodes
from kvcompile.passes.targets import Target, per_token, target, whole
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.store import SIDES
from kvcompile.structure.writer import Writer

aten = torch.ops.aten


@dataclass(frozen=True)
class Project:
    """linear(x, W) -> linear(linear(x, A), B), rank by rank as the axes `rank.*` say.

    rank.heads    kv heads that are factored together; rank.heads.v: those of V
    rank.k, .v    a rank (a whole number), the fraction of the group's channels, or `head`: as many
                  as one head has
    rank.energy   instead: the share of the outputs' squares that is kept
    rank.least    layers get fractions from rank.k and rank.v down to this one (`progressive`)
    rank.joint    whether K and V of a group share one latent; its rank is a fraction of both
    rank.multiple ranks are multiples of this many
    rank.text     whether W is whitened by what the calibration text makes of it
    rank.rotate   whether latents are turned by a Hadamard matrix
    rank.after    whether K is factored as attention is given it, after its rotation, instead of
                  its weight: K_g = U_g U_g^T K_g, and q absorbs U_g
    """

    name: ClassVar[str] = "project"
    order: ClassVar[int] = 30
    axes: ClassVar[tuple[str, ...]] = tuple(f"rank.{x}" for x in (
        "k", "v", "heads", "heads.v", "energy", "least", "joint", "multiple", "text", "rotate",
        "after"))

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        nodes = attention_nodes(gm.graph)
        found = {(layer, side): (whole if own.get("rank.after") else target)(
                     gm, nodes[layer], side, layer)
                 for layer, own in enumerate(plan) for side in SIDES
                 if own.get(f"rank.{side}") is not None}
        targets = {key: t for key, t in found.items() if isinstance(t, Target)}
        outcomes: list[Outcome] = [t for t in found.values() if isinstance(t, Refused)]
        moments = _moments(gm, [t.linear.input for (layer, _), t in targets.items()
                                if plan[layer].get("rank.text")])
        own = [layer for layer, p in enumerate(plan) if p.get("rank.least") is not None]
        steps = progressive([[t.weight for (at, _), t in targets.items() if at == layer]
                             for layer in own])
        for layer, settings in enumerate(plan):
            each = [(side, targets[layer, side]) for side in SIDES if (layer, side) in targets]
            joint = settings.get("rank.joint") and len(each) == 2
            if joint and each[0][1].linear.input is not each[1][1].linear.input:
                outcomes.append(Refused(layer, "K and V are not made of the same tensor",
                                        each[0][1].node.name))
                continue
            for sides in [each] if joint else [[x] for x in each]:
                wanted: Any = settings.get(f"rank.{sides[0][0]}")
                if layer in own:
                    least: Any = settings.get("rank.least")
                    wanted = wanted - steps[own.index(layer)] * (wanted - least)
                inputs = moments.get(sides[0][1].linear.input)
                outcomes.append(_rewrite(gm, layer, dict(sides), settings, wanted, inputs,
                                         argument(nodes[layer], "positions")))
        gm.graph.eliminate_dead_code()
        return outcomes


def progressive(weights: Sequence[Sequence[Tensor]]) -> list[float]:
    """How far each layer goes from the largest rank (0) to the least (1): LoRC, arXiv:2410.03111.

    An error of layer l is amplified by the condition numbers of the layers from l on; so by the
    logarithm of their product, from the first layer's, which is largest, to the last one's.
    """
    logs = []
    for own in weights:
        values = [torch.linalg.svdvals(w.double()) for w in own]
        logs.append(sum(float((s[0] / s[-1].clamp(min=1e-30)).log()) for s in values))
    sums = [sum(logs[i:]) for i in range(len(logs))]
    span = max(sums, default=0.0) - min(sums, default=0.0)
    return [(max(sums) - x) / span if span else 0.0 for x in sums]


def _rewrite(gm: GraphModule, layer: int, sides: dict[str, Target], plan: LayerPlan,
             wanted: float | int | str, inputs: Tensor | None, positions: Node) -> Outcome:
    """linear(x, W) -> for each group linear(linear(x, A_g), B_g), side by side.

    Two sides have one A_g. V is then scaled to K's size before, and back in its B_g, as neither's
    error counts for more (TransMLA's balance, arXiv:2502.07864).
    """
    first = next(iter(sides.values()))
    heads = first.linear.rows.shape[0]
    asked: Any = plan.get(f"rank.heads.{next(iter(sides))}", plan.get("rank.heads"))
    energy, multiple = plan.get("rank.energy"), plan.get("rank.multiple", 1)
    per = next(n for n in range(min(asked, heads), 0, -1) if heads % n == 0)
    groups = heads // per
    wanted = first.linear.rows.shape[1] if wanted == "head" else wanted
    weights = {s: t.weight.double().unflatten(0, (groups, -1)) for s, t in sides.items()}
    size = {s: _size(w, inputs) for s, w in weights.items()}
    scale = {s: size[next(iter(sides))] / size[s] for s in sides}
    both = torch.cat([weights[s] * scale[s] for s in sides], 1)  # [groups, channels, in]
    moments = [w @ w.t() if inputs is None else w @ inputs @ w.t() for w in both]
    ranks = [rank_of(wanted, energy, spectrum(m)[0], multiple)  # type: ignore[arg-type]
             for m in moments]
    rank = max(ranks)  # groups are stored side by side: they have one rank
    if rank < 1:
        raise RecipeError(f"{plan.origin['rank.heads']}: a rank of {rank} keeps nothing")
    rotate = bool(plan.get("rank.rotate", False))
    made = [factor(w, m, rank, rotate) for w, m in zip(both, moments, strict=True)]
    write, dtype = Writer(gm, first.node), first.weight.dtype
    source = tuple(t.linear.weight for t in sides.values() if t.linear.weight)
    name = "".join(sides)
    users = {s: list(t.node.users) for s, t in sides.items()}
    with gm.graph.inserting_before(min(t.node for t in sides.values()).next):
        down = write.buffer(f"layer{layer}_{name}_down",
                            torch.cat([f.down for f in made]).to(dtype), source)
        x = write.call(aten.linear.default, per_token(write, first.linear.input, positions), down)
        at = 0
        for side, t in sides.items():
            channels, parts = weights[side].shape[1], []
            for g, f in enumerate(made):
                part = x if groups == 1 else write.call(
                    aten.slice.Tensor, x, -1, g * rank, (g + 1) * rank)
                up = (f.up[at : at + channels] / scale[side]).to(dtype)
                args = [part, write.buffer(f"layer{layer}_{side}_up{g}", up, source)]
                if t.bias is not None:
                    bias = t.bias.unflatten(0, (groups, -1))[g]
                    args.append(write.buffer(f"layer{layer}_{side}_bias{g}", bias,
                                             (str(t.linear.bias),)))
                parts.append(write.call(aten.linear.default, *args))
            out = parts[0] if groups == 1 else write.call(aten.cat.default, parts, -1)
            out = write.call(aten.unflatten.int, out, -1, list(t.linear.rows.shape))
            out = write.call(aten.transpose.int, out, 1, 2)
            for user in users[side]:
                user.replace_input_with(t.node, out)
            at += channels
    kept = sum(f.kept for f in made) / len(made)
    return Rewritten(layer, f"{' and '.join(sides)} {groups} x rank {rank} of {both.shape[1]}, "
                            f"{kept:.1%} kept")


def _size(weights: Tensor, inputs: Tensor | None) -> float:
    """The root of E |W x|^2."""
    moment = weights @ weights.mT if inputs is None else weights @ inputs @ weights.mT
    return float(moment.diagonal(dim1=-2, dim2=-1).sum().sqrt())


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
            x = out.transpose(1, 2).flatten(2) if out.dim() == 4 else out  # K or V themselves
            x = x.flatten(0, -2).double()
            self.found[n] = x.t() @ x / len(x)
        return out


PASS = Project()
