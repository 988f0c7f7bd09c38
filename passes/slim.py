"""slim: V from K. linear(x, W_v) -> linear(W_k x, W_v W_k^-1), where W_k is square

Then K before its rotation is all that `place` has to cache; W_o absorbs W_v W_k^-1, and keys are
rotated at read (SLIM attention, arXiv:2503.05840). What K is rounded to comes back in V, enlarged
by W_k^-1: how much is said, and too much is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvcompile.ir import argument, attention_nodes
from kvcompile.passes.targets import Target, both, per_token
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.structure.writer import Writer

aten = torch.ops.aten


@dataclass(frozen=True)
class Slim:
    """v = W_v x -> W_v W_k^-1 k, where the axis `recompute` is `keys`.

    `most`: how far off V may be, of its size, when K is rounded to the model's type.
    """

    most: float = 0.05
    name: ClassVar[str] = "slim"
    order: ClassVar[int] = 35
    axes: ClassVar[tuple[str, ...]] = ("recompute",)

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        wanted = [i for i, p in enumerate(plan) if p.get("recompute") == "keys"]
        if not wanted or gm.meta.get("slim"):
            return []
        gm.meta["slim"] = True
        outcomes = [self.layer(gm, i) for i in wanted]
        gm.graph.eliminate_dead_code()
        return outcomes

    def layer(self, gm: GraphModule, layer: int) -> Outcome:
        node = attention_nodes(gm.graph)[layer]
        found = both(gm, node, "kv", layer)
        if isinstance(found, Refused):
            return found
        k, v = found
        if k.linear.input is not v.linear.input:
            return Refused(layer, "K and V are not made of the same tensor", v.node.name)
        rows, columns = k.weight.shape
        if rows != columns:
            return Refused(layer, f"K has {rows} channels of {columns}: W_k has no inverse",
                           k.node.name)
        weight, off = rebuilt(k.weight, v.weight)
        if not off <= self.most:
            return Refused(layer, "W_k is nearly singular: rounding K would put V off by "
                           f"{off:.1%}", k.node.name)
        bias = _bias(weight, k, v)
        write, sources = Writer(gm, v.node), (k.linear.weight, v.linear.weight)
        users = list(v.node.users)
        with gm.graph.inserting_before(max(k.node, v.node).next):
            args = [per_token(write, k.node, argument(node, "positions")),
                    write.buffer(f"layer{layer}_v_of_k", weight.to(v.weight.dtype), sources)]
            if bias is not None:
                args.append(write.buffer(f"layer{layer}_v_of_k_bias", bias.to(v.weight.dtype), (
                    *sources, *(x for x in (k.linear.bias, v.linear.bias) if x))))
            out = write.call(aten.linear.default, *args)
            out = write.call(aten.unflatten.int, out, -1, list(v.linear.rows.shape))
            out = write.call(aten.transpose.int, out, 1, 2)
        for user in users:
            user.replace_input_with(v.node, out)
        return Rewritten(layer, f"V from K, off by {off:.1g} of its size for K's rounding")


def rebuilt(k: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """W_v W_k^-1 [n, n] in fp64, and how far off V is, of its size, when K is rounded to its type:
    for inputs of equal variance without correlation."""
    a, b = k.double(), v.double()
    found, info = torch.linalg.solve_ex(a.mT, b.mT)
    made = found.mT
    if int(info) or not bool(made.isfinite().all()):
        return made, float("inf")
    step = torch.finfo(k.dtype).eps / 2 * a.norm(dim=1)
    return made, float((made * step).norm() / b.norm())


def _bias(made: Tensor, k: Target, v: Target) -> Tensor | None:
    """V's bias less what K's brings."""
    if k.bias is None and v.bias is None:
        return None
    own = made.new_zeros(len(made)) if v.bias is None else v.bias.double()
    return own if k.bias is None else own - made @ k.bias.double()


PASS = Slim()
