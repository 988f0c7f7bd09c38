"""heads: kv heads that become one. attention(q, k, v) of H kv heads -> of H / n

    k_g = mean over h in g of W_k,h x,  v_g = mean over h in g of W_v,h x     g: a group of n heads

A mean of rotated keys is a rotation of their mean, so that nothing else changes. Which heads form a
group, and in which basis each of them stands, is changed first and exactly, with the query heads
(`kvcompile/structure/heads.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from kvcompile.calibration.grouping import Grouping, group
from kvcompile.calibration.samples import Samples
from kvcompile.errors import RecipeError
from kvcompile.ir import ROPE, argument, attention_nodes
from kvcompile.passes.targets import Target, per_token, target
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.store import SIDES
from kvcompile.structure.heads import HeadWeights, Stop
from kvcompile.structure.writer import Writer

aten = torch.ops.aten


@dataclass(frozen=True)
class Heads:
    """Kv heads put into groups, as the axes `heads.*` say, and each group made one head.

    heads.group  heads of a group; the largest divisor of a layer's kv heads that is no larger
    heads.by     what is alike: `place` (neighbours), `cosine` or `cka` of K and V on the
                 calibration text; heads are put into another order, exactly
    heads.turn   whether heads are first turned into one basis for each group, exactly
    heads.mean   whether a group becomes one head
    """

    name: ClassVar[str] = "heads"
    order: ClassVar[int] = 25
    axes: ClassVar[tuple[str, ...]] = tuple(f"heads.{x}" for x in ("group", "by", "turn", "mean"))

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        wanted = [i for i, p in enumerate(plan) if p.get("heads.group") is not None]
        if not wanted or gm.meta.get("heads"):
            return []
        gm.meta["heads"] = True
        moved = [i for i in wanted if _moved(plan[i])]
        if moved and "text" not in gm.meta:
            raise RecipeError(f"{plan[moved[0]].origin['heads.group']}: finding heads that are "
                              "alike needs a text, and a graph that arrives through the "
                              "torch.compile backend has none")
        seen = Samples(gm, gm.meta["text"](), moved).attention if moved else []
        found = {i: (s.k, s.v) for i, s in zip(moved, seen, strict=True)}
        return [_layer(gm, i, plan[i], found.get(i)) for i in wanted]


def _moved(plan: LayerPlan) -> bool:
    """Whether heads change their places or their bases."""
    return plan.get("heads.by", "place") != "place" or bool(plan.get("heads.turn"))


def _layer(gm: GraphModule, layer: int, plan: LayerPlan, seen: tuple[Tensor, Tensor] | None
           ) -> Outcome:
    node = attention_nodes(gm.graph)[layer]
    heads, asked = int(argument(node, "k").meta["val"].shape[1]), plan.get("heads.group")
    assert isinstance(asked, int)
    size = next(n for n in range(min(asked, heads), 0, -1) if heads % n == 0)
    if size == 1:
        return Refused(layer, f"{heads} kv heads do not fall into groups of {asked}", node.name)
    mean, told = bool(plan.get("heads.mean")), []
    if mean:
        for side in SIDES:
            if isinstance(reason := target(gm, node, side, layer), Refused):
                return reason
    if seen is not None:
        try:
            own = HeadWeights(gm, node)
        except Stop as stop:
            return Refused(layer, str(stop), node.name)
        if own.fixed:
            return Refused(layer, "a norm stands between W_k and attention", node.name)
        found = group(seen[0], seen[1], size, str(plan.get("heads.by", "place")),
                      bool(plan.get("heads.turn")), own.rotary)
        own.rewrite(found.heads, found.k, found.v, f"layer{layer}_grouped")
        told.append(_told(found, size))
    if mean:
        for side in SIDES:
            made = target(gm, node, side, layer)
            assert isinstance(made, Target)
            _mean(gm, layer, node, side, made, size)
        told.append(f"{heads} kv heads become {heads // size}")
    return Rewritten(layer, ", ".join(told))


def _told(found: Grouping, size: int) -> str:
    groups = [" ".join(map(str, found.heads[i : i + size])) for i in
              range(0, len(found.heads), size)]
    return f"heads {' | '.join(groups)}, cosine {found.before:.2f} -> {found.after:.2f}"


def _mean(gm: GraphModule, layer: int, node: Node, side: str, made: Target, size: int) -> None:
    """linear(x, W) of H heads -> linear(x, W') of H / size, up to the attention node."""
    heads, dim = made.linear.rows.shape
    write, dtype = Writer(gm, made.node), made.weight.dtype

    def mean(x: Tensor) -> Tensor:
        return x.double().unflatten(0, (heads // size, size, dim)).mean(1).flatten(0, 1).to(dtype)

    end = argument(node, side)
    path = _path(made.node, end)
    with gm.graph.inserting_before(made.node.next):
        args = [per_token(write, made.linear.input, argument(node, "positions")),
                write.buffer(f"layer{layer}_{side}_mean", mean(made.weight),
                             (made.linear.weight,))]
        if made.bias is not None:
            args.append(write.buffer(f"layer{layer}_{side}_mean_bias", mean(made.bias),
                                     (str(made.linear.bias),)))
        out = write.call(aten.linear.default, *args)
        out = write.call(aten.unflatten.int, out, -1, [heads // size, dim])
        out = write.call(aten.transpose.int, out, 1, 2)
    new = {made.node: out}
    for step in path:  # what lies between, for fewer heads
        with gm.graph.inserting_before(step.next):
            copy = gm.graph.node_copy(step, lambda n: new.get(n, n))
        with write.mode:
            args_: Any = map_arg(copy.args, lambda n: n.meta["val"])
            kwargs: Any = map_arg(copy.kwargs, lambda n: n.meta["val"])
            copy.meta = {**step.meta, "val": step.target(*args_, **kwargs)}  # type: ignore[operator]
        new[step] = copy
    node.replace_input_with(end, new[end])


def _path(start: Node, end: Node) -> list[Node]:
    """The nodes from `start`, left out, to `end`; each takes the one before it."""
    path = []
    while end is not start:
        path.append(end)
        end = argument(end, "x") if end.target is ROPE else (
            end.all_input_nodes[0])
    return path[::-1]


PASS = Heads()
