"""partial: fewer rotary pairs. rope(q) . rope(k) -> q' . k' + rope(q'') . rope(k'')

Each kv head keeps the rotation of some of its pairs of channels, and its query heads that of the
same pairs; the other channels (q', k') lose it. They are projections without a rotation then, which
`project` can factor and q absorb, as in multi-head latent attention (MHA2MLA, arXiv:2502.14837). Or
one head of rotary channels serves all kv heads (TransMLA, arXiv:2502.07864).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvcompile.calibration.alignment import Rotary
from kvcompile.calibration.moments import moments
from kvcompile.calibration.rorope import concentrate
from kvcompile.calibration.samples import Sample, Samples
from kvcompile.errors import RecipeError
from kvcompile.ir import ROPE, argument, attention_nodes
from kvcompile.passes.targets import Target, both, per_token
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.structure.writer import Writer

aten = torch.ops.aten
BY = ("norm", "high", "low", "uniform", "mixed")


@dataclass(frozen=True)
class Partial:
    """Each head's rotary pairs that stay, as the axes `rope.*` say.

    rope.keep   how many (a whole number), or which fraction of them
    rope.by     `norm`: those with the largest mean |q_pair| |k_pair| on the calibration text, head
                by head; or those of the highest or lowest frequencies, or evenly spread ones;
                or `mixed`: in each head all lose it, and one head of mixtures of all heads' keys
                keeps it (`kvcompile/calibration/rorope.py`)
    rope.fold   of `mixed`: neighbouring pairs that are mixed too
    """

    name: ClassVar[str] = "partial"
    order: ClassVar[int] = 28
    axes: ClassVar[tuple[str, ...]] = ("rope.keep", "rope.by", "rope.fold")

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        wanted = [i for i, p in enumerate(plan) if p.get("rope.keep") is not None]
        if not wanted or gm.meta.get("partial"):
            return []
        gm.meta["partial"] = True
        seen = [i for i in wanted if plan[i].get("rope.by", "norm") == "norm"]
        nodes = attention_nodes(gm.graph)
        made = {i: _rotated(gm, i, nodes[i]) for i in wanted}
        mixed = [i for i in wanted if plan[i].get("rope.by") == "mixed"]
        if (seen or mixed) and "text" not in gm.meta:
            raise RecipeError(f"{plan[(seen or mixed)[0]].origin['rope.keep']}: norms of queries "
                              "and keys need a text, and a graph that arrives through the "
                              "torch.compile backend has none")
        samples = Samples(gm, gm.meta["text"](), seen).attention if seen else []
        found = dict(zip(seen, samples, strict=True))
        keys = {i: x[1].node for i in mixed if not isinstance(x := made[i], Refused)}
        known = moments(gm, list(keys.values())) if keys else {}
        return [x if isinstance(x := made[i], Refused) else
                _mixed(gm, i, nodes[i], x, plan[i], known[keys[i]].second) if i in keys else
                _layer(gm, i, nodes[i], x, plan[i], found.get(i)) for i in wanted]


def _rotated(gm: GraphModule, layer: int, node: Node) -> list[Target] | Refused:
    """The projections of q and k, both of which are rotated."""
    found = both(gm, node, "qk", layer)
    if isinstance(found, Refused) or all(x.linear.rope for x in found):
        return found
    return Refused(layer, "keys are not rotated", node.name)


def _tables(k: Target) -> tuple[Node, Node, str, Tensor]:
    """cos, sin and style of k's rotation, and the pairs of channels that it turns."""
    cos, sin, style = (argument(cast(Node, k.linear.rope), n) for n in ("cos", "sin", "style"))
    return cos, sin, style, Rotary(int(cos.meta["val"].shape[-1]), style).pairs()


def _mixed(gm: GraphModule, layer: int, node: Node, found: list[Target], plan: LayerPlan,
           second: Tensor) -> Outcome:
    """q, k -> [q, rope(q')], [k - .., rope(k') for all heads]: k' is one head of mixtures."""
    q, k = found
    cos, sin, style, pairs = _tables(k)
    fold: Any = plan.get("rope.fold", 1)
    if len(pairs) % fold:
        raise RecipeError(f"{plan.origin['rope.fold']}: {fold} does not divide the {len(pairs)} "
                          f"rotary pairs of layer {layer}")
    heads, dim = k.linear.rows.shape
    if heads == 1 and fold == 1:
        return Refused(layer, "one kv head has all of the rotation", node.name)
    weights = [_with_bias(x) for x in found]
    made = concentrate(weights[0].cpu(), weights[1].cpu(), second.cpu(), pairs, fold)
    write = _Side(gm, node, layer)
    with gm.graph.inserting_before(node):
        for side, target, still, turned in (
                ("q", q, weights[0], made.q_turned), ("k", k, made.k, made.k_turned[None])):
            rest, x = (write.made(side, n, target, w) for n, w in (("still", still),
                                                                   ("turned", turned)))
            x = write.rope(x, cos, sin, style=style)
            if side == "k":
                x = write.call(aten.expand.default, x, [-1, heads, -1, -1])
            new = write.call(aten.cat.default, [rest, x], -1)
            node.replace_input_with(argument(node, side), new)
    return Rewritten(layer, f"one rotary head of {pairs.numel()} channels for {heads} kv heads, "
                            f"{made.carried:.1%} of their squares")


def _with_bias(x: Target) -> Tensor:
    """[heads, D, in], or in + 1 with the bias, in fp64."""
    weight = x.weight if x.bias is None else torch.cat([x.weight, x.bias[:, None]], 1)
    return weight.double().unflatten(0, x.linear.rows.shape)


def _layer(gm: GraphModule, layer: int, node: Node, found: list[Target], plan: LayerPlan,
           seen: Sample | None) -> Outcome:
    q, k = found
    cos, sin, style, pairs = _tables(k)
    asked: Any = plan.get("rope.keep")
    count = asked if isinstance(asked, int) else max(1, round(asked * len(pairs)))
    if count >= len(pairs):
        return Refused(layer, f"all {len(pairs)} rotary pairs stay", node.name)
    heads, dim = k.linear.rows.shape
    kept = chosen(str(plan.get("rope.by", "norm")), count, heads, pairs, seen)
    rotated = pairs[kept]                                    # [H, count, 2]
    rotated = (rotated.mT if style == "half" else rotated).flatten(1)
    rest = torch.stack([torch.tensor([c for c in range(dim) if c not in own])
                        for own in rotated.tolist()])
    write, tables = _Side(gm, node, layer), dict[Any, Node]()
    with gm.graph.inserting_before(node):
        for side, made in (("q", q), ("k", k)):
            group = made.linear.rows.shape[0] // heads
            own, other = (x.repeat_interleave(group, 0) for x in (rotated, rest))
            still, x = (write.linear(side, n, made, at) for n, at in (("still", other),
                                                                      ("turned", own)))
            x = write.rope(x, *(write.table(t, own, tables) for t in (cos, sin)), style=style)
            node.replace_input_with(argument(node, side), write.call(
                aten.cat.default, [still, x], -1))
    return Rewritten(layer, f"{count} of {len(pairs)} rotary pairs stay")


def chosen(by: str, count: int, heads: int, pairs: Tensor, seen: Sample | None) -> Tensor:
    """[heads, count]: numbers of each head's pairs that stay, the highest frequencies first."""
    every = torch.arange(len(pairs))
    if by in ("high", "low"):
        one = every[:count] if by == "high" else every[-count:]
    elif by == "uniform":
        one = (torch.arange(count) * len(pairs)) // count
    elif by == "norm":
        assert seen is not None
        q, k = (x.float().cpu()[..., pairs].norm(dim=-1) for x in (seen.q, seen.k))  # [N, H, T, P]
        score = (q.unflatten(1, (heads, -1)).mean((0, 2, 3)) * k.mean((0, 2)))
        return score.topk(count).indices.sort(-1).values
    else:
        raise RecipeError(f"rope.by={by}: must be one of {', '.join(BY)}")
    return one.expand(heads, -1)


class _Side(Writer):
    """Writes the new q and k of one attention node."""

    def __init__(self, gm: GraphModule, node: Node, layer: int) -> None:
        super().__init__(gm, node)
        self.node, self.layer = node, layer

    def linear(self, side: str, name: str, made: Target, at: Tensor) -> Node:
        """[B, heads, S, n]: channels at[head] of what the projection makes."""
        heads = torch.arange(len(at))[:, None]
        name, size = f"layer{self.layer}_{side}_{name}", at.shape

        def rows(x: Tensor) -> Tensor:
            place = (heads.to(x.device), at.to(x.device))
            return x.unflatten(0, made.linear.rows.shape)[place].flatten(0, 1)

        args = [per_token(self, made.linear.input, argument(self.node, "positions")),
                self.buffer(name, rows(made.weight), (made.linear.weight,))]
        if made.bias is not None:
            args.append(self.buffer(f"{name}_bias", rows(made.bias), (str(made.linear.bias),)))
        out = self.call(aten.linear.default, *args)
        out = self.call(aten.unflatten.int, out, -1, list(size))
        return self.call(aten.transpose.int, out, 1, 2)

    def made(self, side: str, name: str, source: Target, weight: Tensor) -> Node:
        """[B, heads, S, n]: weight [heads, n, in] of what `source` reads, with a bias perhaps."""
        x = per_token(self, source.linear.input, argument(self.node, "positions"))
        name, width = f"layer{self.layer}_{side}_{name}", source.weight.shape[1]
        flat, size = weight.flatten(0, 1).to(source.weight), [*weight.shape[:2]]
        args = [x, self.buffer(name, flat[:, :width], (source.linear.weight,))]
        if source.bias is not None:
            args.append(self.buffer(f"{name}_bias", flat[:, width], (str(source.linear.bias),)))
        out = self.call(aten.linear.default, *args)
        out = self.call(aten.unflatten.int, out, -1, size)
        return self.call(aten.transpose.int, out, 1, 2)

    def table(self, table: Node, at: Tensor, known: dict[Any, Node]) -> Node:
        """cos or sin of those channels: [B or 1, 1 or heads, S, n]."""
        alike = bool((at == at[0]).all())
        key = (table, alike or tuple(at.flatten().tolist()))
        if key in known:
            return known[key]
        index = self.buffer(f"layer{self.layer}_pairs", (at[0] if alike else at.flatten()).to(
            table.meta["val"].device))
        out = self.call(aten.index_select.default, table, -1, index)
        if not alike:
            out = self.call(aten.squeeze.dim, out, 1)
            out = self.call(aten.unflatten.int, out, -1, list(at.shape))
            out = self.call(aten.transpose.int, out, 1, 2)
        known[key] = out
        return out

    def rope(self, x: Node, cos: Node, sin: Node, *, style: str) -> Node:
        node = self.gm.graph.call_function(ROPE, (x, cos, sin), {"style": style})
        with self.mode:
            node.meta = {**self.like.meta, "val": ROPE(*(n.meta["val"] for n in (x, cos, sin)),
                                                       style=style)}
        return node


PASS = Partial()
