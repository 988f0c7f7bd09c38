"""partial: fewer rotary pairs. rope(q) . rope(k) -> q' . k' + rope(q'') . rope(k'')

Each kv head keeps the rotation of some of its pairs of channels, and its query heads that of the
same pairs; the other channels (q', k') lose it. They are projections without a rotation then, which
`project` can factor and q absorb, as in multi-head latent attention (MHA2MLA, arXiv:2502.14837).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvcompile.calibration.alignment import Rotary
from kvcompile.calibration.samples import Sample, Samples
from kvcompile.errors import RecipeError
from kvcompile.ir import ROPE, argument, attention_nodes
from kvcompile.passes.targets import Target, both, per_token
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.structure.writer import Writer

aten = torch.ops.aten
BY = ("norm", "high", "low", "uniform")


@dataclass(frozen=True)
class Partial:
    """Each head's rotary pairs that stay, as the axes `rope.*` say.

    rope.keep   how many (a whole number), or which fraction of them
    rope.by     `norm`: those with the largest mean |q_pair| |k_pair| on the calibration text, head
                by head; or those of the highest or lowest frequencies, or evenly spread ones
    """

    name: ClassVar[str] = "partial"
    order: ClassVar[int] = 28
    axes: ClassVar[tuple[str, ...]] = ("rope.keep", "rope.by")

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        wanted = [i for i, p in enumerate(plan) if p.get("rope.keep") is not None]
        if not wanted or gm.meta.get("partial"):
            return []
        gm.meta["partial"] = True
        seen = [i for i in wanted if plan[i].get("rope.by", "norm") == "norm"]
        if seen and "text" not in gm.meta:
            raise RecipeError(f"{plan[seen[0]].origin['rope.keep']}: norms of queries and keys "
                              "need a text, and a graph that arrives through the torch.compile "
                              "backend has none")
        samples = Samples(gm, gm.meta["text"](), seen).attention if seen else []
        found = dict(zip(seen, samples, strict=True))
        return [_layer(gm, i, plan[i], found.get(i)) for i in wanted]


def _layer(gm: GraphModule, layer: int, plan: LayerPlan, seen: Sample | None) -> Outcome:
    node = attention_nodes(gm.graph)[layer]
    found = both(gm, node, "qk", layer)
    if isinstance(found, Refused):
        return found
    q, k = found
    turned = k.linear.rope
    if turned is None or q.linear.rope is None:
        return Refused(layer, "keys are not rotated", node.name)
    cos, sin, style = (argument(turned, n) for n in ("cos", "sin", "style"))
    pairs = Rotary(int(cos.meta["val"].shape[-1]), style).pairs()
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
