"""align: a layer's heads in the basis of another one's. linear(x, W) -> linear(x, T W)

    v' = T v,  o = W_o v = (W_o T^T) v'             T orthogonal, one for each kv head
    k' = R k,  q' = R q,  q' . k' = q . k           R commutes with the rotary embedding

and kv heads in another order, with their query heads. The layer computes what it did.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvcompile.calibration.alignment import Alignment, Rotary, align
from kvcompile.calibration.samples import Sample, Samples
from kvcompile.errors import RecipeError
from kvcompile.ir import argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.structure.movement import CASTS, Probe, feeds, moves, packet
from kvcompile.structure.sources import Linear, sources
from kvcompile.structure.writer import Writer

aten = torch.ops.aten
LINEAR = {aten.linear: 1, aten.addmm: 2}  # where a linear has its weight


@dataclass(frozen=True)
class Align:
    """Layer i is given the basis of the earlier layer that axis `align` names.

    What makes both layers' K and V nearest to each other on the calibration text is found for each
    pair of heads, and heads are matched. The weights are rewritten in buffers of the graph. Where a
    norm stands between W_k (or W_q) and attention, K and the order of heads stay.
    """

    name: ClassVar[str] = "align"
    order: ClassVar[int] = 20
    axes: ClassVar[tuple[str, ...]] = ("align",)

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        wanted = {i: p.get("align") for i, p in enumerate(plan) if p.get("align") is not None}
        if not wanted or gm.meta.get("aligned"):
            return []
        if "text" not in gm.meta:
            raise RecipeError("aligning layers needs a text, and a graph that arrives through the "
                              "torch.compile backend has none")
        nodes, seen = attention_nodes(gm.graph), Samples(gm, gm.meta["text"]()).attention
        now: dict[int, tuple[Tensor, Tensor]] = {}  # K, V [H, N, D] as they are by now
        outcomes: list[Outcome] = []
        for layer, other in sorted(wanted.items()):
            if type(other) is not int or not 0 <= other < layer:
                raise RecipeError(f"{plan[layer].origin['align']}: layer {layer} cannot be aligned "
                                  f"with {other}: it must be an earlier layer")
            try:
                own = _Layer(gm, nodes[layer])
            except _Stop as stop:
                outcomes.append(Refused(layer, str(stop), nodes[layer].name))
                continue
            x, y = ([t.shape for t in (s.k, s.v)] for s in (seen[layer], seen[other]))
            if x != y:
                outcomes.append(Refused(layer, f"layer {other} has other heads",
                                        nodes[layer].name))
                continue
            (k, v), (k0, v0) = _flat(seen[layer]), now.get(other, _flat(seen[other]))
            found = align((k, k0), (v, v0), own.rotary, own.fixed)
            own.rewrite(found, layer)
            heads = list(found.heads)
            now[layer] = (k if found.k is None else k[heads] @ found.k.mT, v[heads] @ found.v.mT)
            outcomes.append(Rewritten(layer, _told(found, other)))
        gm.meta["aligned"] = True
        return outcomes


def _flat(sample: Sample) -> tuple[Tensor, Tensor]:
    """K, V [H, N, D] of all tokens, in fp64."""
    k, v = (x.transpose(0, 1).flatten(1, 2).double() for x in (sample.k, sample.v))
    return k, v


def _told(found: Alignment, other: int) -> str:
    before, after = ([f"{x:.2f}" for x in pair] for pair in found.cosine)
    what = "K and V" if found.k is not None else "V, not K (a norm stands before it),"
    order = "" if found.heads == tuple(range(len(found.heads))) else \
        f", heads {', '.join(map(str, found.heads))}"
    return (f"{what} in the basis of layer {other}{order}: cosines {before[0]}, {before[1]} -> "
            f"{after[0]}, {after[1]}")


class _Stop(Exception):
    pass


class _Layer:
    """The weights before and after one attention node, by head and channel."""

    def __init__(self, gm: GraphModule, node: Node) -> None:
        self.gm, self.node = gm, node
        self.q, self.k, self.v = (self._source(side) for side in "qkv")
        self.out, self.columns = self._output()
        self.fixed = bool(self.q.norms or self.k.norms)
        if self.v.norms:
            raise _Stop("a norm stands between W_v and attention")
        ropes = [x.rope for x in (self.q, self.k)]
        if (ropes[0] is None) != (ropes[1] is None):
            raise _Stop("q and k are not rotated alike")
        for linear in {x.node for x in (self.q, self.k, self.v)} | {self.out}:
            self._places(linear)
        self.rotary = None
        if ropes[1] is not None:
            self.rotary = Rotary(int(argument(ropes[1], "cos").meta["val"].shape[-1]),
                                 argument(ropes[1], "style"))

    def _source(self, side: str) -> Linear:
        found = sources(argument(self.node, side))
        if isinstance(found, Refused):
            raise _Stop(f"{side}: {found.reason}")
        if len(found.linears) > 1 or bool((found.linears[0].rows < 0).any()):
            raise _Stop(f"{side} comes from several projections")
        return found.linears[0]

    def _output(self) -> tuple[Node, Tensor]:
        """The linear that attention's output goes into, and [Hq, D]: its input's channels."""
        probe, node = Probe(), self.node
        plane = probe.numbers(node, 0)
        _, heads, tokens, dim = plane.shape
        while True:
            users = [n for n in node.users if isinstance(n.meta.get("val"), Tensor)]
            if len(users) != 1:
                raise _Stop("the output goes into more than a linear")
            user = users[0]
            if packet(user) in LINEAR and LINEAR[packet(user)] and node in user.args:
                break
            if packet(user) not in CASTS:
                if not moves(user) or feeds(user) != [node]:
                    raise _Stop(f"the output passes '{user.name}' before its linear")
                (plane,) = probe.move(user, [(plane,)])
            node = user
        plane = plane.flatten(0, -2)[0]                       # the first token's numbers
        columns = torch.empty(heads, dim, dtype=torch.long)
        if len(plane) != heads * dim:
            raise _Stop("the output's linear mixes tokens")
        columns[plane // (tokens * dim), plane % dim] = torch.arange(len(plane))
        return user, columns

    def rewrite(self, found: Alignment, layer: int) -> None:
        group = len(self.columns) // len(self.k.rows)
        heads = list(found.heads)
        queries = [h * group + i for h in heads for i in range(group)]
        old = {n: self._values(n) for n in {x.node for x in (self.q, self.k, self.v)} | {self.out}}
        new = {n: [x.clone() for x in own] for n, own in old.items()}
        turns = [(self.v, heads, found.v)]
        if found.k is not None:
            turns += [(self.q, queries, found.k.repeat_interleave(group, 0)),
                      (self.k, heads, found.k)]
        for linear, order, turn in turns:
            for before, after in zip(old[linear.node], new[linear.node], strict=True):
                x = before[linear.rows[order]]                # [heads, channels, in] or no in
                x = x[..., None] if x.dim() == 2 else x
                after[linear.rows] = (turn @ x).view(*linear.rows.shape, *after.shape[1:])
        columns = old[self.out][0][:, self.columns[queries]]  # [out, heads, channels]
        new[self.out][0][:, self.columns] = torch.einsum(
            "ohd,hed->ohe", columns, found.v.repeat_interleave(group, 0))
        for n, values in new.items():
            self._replace(n, values, layer)

    def _places(self, node: Node) -> tuple[Node, Node | None, bool]:
        """The weight, the bias and whether the weight is [in, out], of a linear node."""
        at = LINEAR.get(packet(node), 0)
        bias = node.args[0] if at == 2 else (*node.args, None)[2]
        for n in (node.args[at], bias):
            if at == 0 or n is not None and not (isinstance(n, Node) and n.op == "get_attr"):
                raise _Stop(f"'{node.name}' is no linear of parameters")
        return node.args[at], bias, at == 2  # type: ignore[return-value]

    def _values(self, node: Node) -> list[Tensor]:
        """The weight [out, in] and the bias, if there is one, of a linear, in fp64."""
        weight, bias, transposed = self._places(node)
        write = Writer(self.gm, self.node)
        x = write.tensor(str(weight.target)).double()
        out = [x.t() if transposed else x]
        return out if bias is None else [*out, write.tensor(str(bias.target)).double()]

    def _replace(self, node: Node, values: Sequence[Tensor], layer: int) -> None:
        weight, bias, transposed = self._places(node)
        write, new = Writer(self.gm, self.node), dict[Node, Node]()
        for old, value in zip([weight] if bias is None else [weight, bias], values, strict=True):
            name = str(old.target)
            value = value.t() if transposed and old is weight else value
            with self.gm.graph.inserting_before(node):
                new[old] = write.buffer(f"layer{layer}_aligned_{name.replace('.', '_')}",
                                        value.to(write.tensor(name).dtype), (name,))
        node.args = tuple(new.get(a, a) if isinstance(a, Node) else a for a in node.args)


PASS = Align()
