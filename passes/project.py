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
from torch.fx import GraphModule, Node

from kvcompile.calibration.factor import Factors, factor, rank_of, spectrum
from kvcompile.calibration.given import given
from kvcompile.calibration.moments import moments as moments_of
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
    rank.text     whether W is whitened by what the calibration text makes of it; `scale`: only its
                  columns are scaled, by the root of E |x| (ASVD, arXiv:2312.05821)
    rank.factors  instead: a file that has A and B (`kvcompile/calibration/given.py`)
    rank.rotate   whether latents are turned by a Hadamard matrix
    rank.after    whether K is factored as attention is given it, after its rotation, instead of
                  its weight: K_g = U_g U_g^T K_g, and q absorbs U_g
    rank.exact    whether the newest tokens, those in the recent tier, are exact:
                  K_g = [1, B_g] [W_g - B_g A_g; A_g] x, of which older tokens lose the first part
    """

    name: ClassVar[str] = "project"
    order: ClassVar[int] = 30
    axes: ClassVar[tuple[str, ...]] = tuple(f"rank.{x}" for x in (
        "k", "v", "heads", "heads.v", "energy", "least", "joint", "multiple", "text", "rotate",
        "after", "exact", "factors"))

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        nodes = attention_nodes(gm.graph)
        found = {(layer, side): (whole if own.get("rank.after") else target)(
                     gm, nodes[layer], side, layer)
                 for layer, own in enumerate(plan) for side in SIDES
                 if own.get(f"rank.{side}") is not None}
        targets = {key: t for key, t in found.items() if isinstance(t, Target)}
        outcomes: list[Outcome] = [t for t in found.values() if isinstance(t, Refused)]
        seen = _seen(gm, [t.linear.input for (layer, _), t in targets.items()
                          if plan[layer].get("rank.text") and not plan[layer].get("rank.factors")])
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
                inputs = seen.get((sides[0][1].linear.input, settings.get("rank.text")))
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
    write, dtype = Writer(gm, first.node), first.weight.dtype
    if file := plan.get("rank.factors"):
        after = bool(plan.get("rank.after"))  # the latents are in order
        rank = rank_of(wanted, None, both[0, :, 0], multiple) if after else 0  # type: ignore[arg-type]
        made = given(str(file), layer, next(iter(sides)), groups, both.flatten(0, 1), rank)
    else:
        moments = [w @ w.t() if inputs is None else w @ inputs @ w.t() for w in both]
        ranks = [rank_of(wanted, energy, spectrum(m)[0], multiple)  # type: ignore[arg-type]
                 for m in moments]
        if max(ranks) < 1:
            raise RecipeError(f"{plan.origin['rank.heads']}: a rank of {max(ranks)} keeps nothing")
        rotate = bool(plan.get("rank.rotate", False))  # groups lie side by side: they have one rank
        made = [factor(w, m, max(ranks), rotate, even=not plan.get("rank.after"))
                for w, m in zip(both, moments, strict=True)]
    rank, apart = made[0].up.shape[1], 0
    if plan.get("rank.exact"):
        apart, made = both.shape[1], [_beside(w, f, dtype) for w, f in zip(both, made, strict=True)]
    width = apart + rank
    source = tuple(t.linear.weight for t in sides.values() if t.linear.weight)
    name = "".join(sides)
    users = {s: list(t.node.users) for s, t in sides.items()}
    with gm.graph.inserting_before(min(t.node for t in sides.values()).next):
        down = write.buffer(f"layer{layer}_{name}_down",
                            torch.cat([f.down for f in made]).to(dtype), source)
        x = write.call(aten.linear.default, per_token(write, first.linear.input, positions), down)
        x.meta["apart"] = (apart, groups)  # what only the newest tokens keep (`place`)
        at = 0
        for side, t in sides.items():
            channels, parts = weights[side].shape[1], []
            for g, f in enumerate(made):
                part = x if groups == 1 else write.call(
                    aten.slice.Tensor, x, -1, g * width, (g + 1) * width)
                part.meta["apart"] = (apart, groups if part is x else 1)
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
    newest = ", all of the newest tokens" * bool(apart)
    return Rewritten(layer, f"{' and '.join(sides)} {groups} x rank {rank} of {both.shape[1]}, "
                            f"{kept:.1%} kept{newest}")


def _beside(weight: Tensor, made: Factors, dtype: torch.dtype) -> Factors:
    """W = [1, B] [W - B A; A], of B and A as they are in `dtype`."""
    down, up = (x.to(dtype).double() for x in (made.down, made.up))
    one = torch.eye(len(weight), dtype=up.dtype, device=up.device)
    return Factors(torch.cat([weight - up @ down, down]), torch.cat([one, up], 1), made.kept)


def _size(weights: Tensor, inputs: Tensor | None) -> float:
    """The root of E |W x|^2."""
    moment = weights @ weights.mT if inputs is None else weights @ inputs @ weights.mT
    return float(moment.diagonal(dim1=-2, dim2=-1).sum().sqrt())


def _seen(gm: GraphModule, nodes: list[Node]) -> dict[tuple[Node, object], Tensor]:
    """Of projections' inputs on the calibration text, by what `rank.text` asks for: E[x x^T], both
    [in, in], for true, the diagonal of E|x| for `scale`; none, if none is asked."""
    if not nodes:
        return {}
    if "text" not in gm.meta:
        raise RecipeError("whitening needs a text, and a graph that arrives through the "
                          "torch.compile backend has none: give whiten=false or by=svd")
    found = moments_of(gm, nodes)
    return {**{(n, True): x.second for n, x in found.items()},
            **{(n, "scale"): x.size.diag() for n, x in found.items()}}


PASS = Project()
