"""One layer's heads in another basis and order, by rewriting the weights around attention.

    v' = T v,  o = W_o v = (W_o T^T) v'             T orthogonal, one for each kv head
    k' = R k,  q' = R q,  q' . k' = q . k           R commutes with the rotary embedding

and kv heads in another order, with their query heads. The layer computes what it did.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvcompile.calibration.alignment import Rotary
from kvcompile.ir import argument
from kvcompile.rewrite import Refused
from kvcompile.structure.movement import CASTS, Probe, feeds, moves, packet
from kvcompile.structure.sources import Linear, sources
from kvcompile.structure.writer import Writer

aten = torch.ops.aten
LINEAR = {aten.linear: 1, aten.addmm: 2}  # where a linear has its weight


class Stop(Exception):
    """Why a layer's heads cannot be rewritten."""


class HeadWeights:
    """The weights before and after one attention node, by head and channel.

    `q`, `k`, `v` are the projections, `out` the linear behind attention and `columns` [Hq, D] its
    input's channels; `rotary` is how K is rotated; `fixed`: a norm stands between W_k or W_q and
    attention, so that K cannot be turned. Raises Stop where there is no such structure.
    """

    def __init__(self, gm: GraphModule, node: Node) -> None:
        self.gm, self.node = gm, node
        self.q, self.k, self.v = (self._source(side) for side in "qkv")
        self.out, self.columns = self._output()
        self.fixed = bool(self.q.norms or self.k.norms)
        if self.v.norms:
            raise Stop("a norm stands between W_v and attention")
        ropes = [x.rope for x in (self.q, self.k)]
        if (ropes[0] is None) != (ropes[1] is None):
            raise Stop("q and k are not rotated alike")
        for linear in {x.node for x in (self.q, self.k, self.v)} | {self.out}:
            self._places(linear)
        self.rotary = None
        if ropes[1] is not None:
            self.rotary = Rotary(int(argument(ropes[1], "cos").meta["val"].shape[-1]),
                                 argument(ropes[1], "style"))

    def _source(self, side: str) -> Linear:
        found = sources(argument(self.node, side))
        if isinstance(found, Refused):
            raise Stop(f"{side}: {found.reason}")
        if len(found.linears) > 1 or bool((found.linears[0].rows < 0).any()):
            raise Stop(f"{side} comes from several projections")
        return found.linears[0]

    def _output(self) -> tuple[Node, Tensor]:
        """The linear that attention's output goes into, and [Hq, D]: its input's channels."""
        probe, node = Probe(), self.node
        plane = probe.numbers(node, 0)
        _, heads, tokens, dim = plane.shape
        while True:
            users = [n for n in node.users if isinstance(n.meta.get("val"), Tensor)]
            if len(users) != 1:
                raise Stop("the output goes into more than a linear")
            user = users[0]
            if packet(user) in LINEAR and LINEAR[packet(user)] and node in user.args:
                break
            if packet(user) not in CASTS:
                if not moves(user) or feeds(user) != [node]:
                    raise Stop(f"the output passes '{user.name}' before its linear")
                (plane,) = probe.move(user, [(plane,)])
            node = user
        plane = plane.flatten(0, -2)[0]                       # the first token's numbers
        columns = torch.empty(heads, dim, dtype=torch.long)
        if len(plane) != heads * dim:
            raise Stop("the output's linear mixes tokens")
        columns[plane // (tokens * dim), plane % dim] = torch.arange(len(plane))
        return user, columns

    def rewrite(self, order: Sequence[int], k: Tensor | None, v: Tensor, name: str) -> None:
        """Head h becomes what head order[h] was, turned by k[h] and v[h] [D, D]; K is not where k
        is None. What the layer computes stays. The weights are buffers called `name`..."""
        group = len(self.columns) // len(self.k.rows)
        heads = list(order)
        queries = [h * group + i for h in heads for i in range(group)]
        old = {n: self._values(n) for n in {x.node for x in (self.q, self.k, self.v)} | {self.out}}
        new = {n: [x.clone() for x in own] for n, own in old.items()}
        turns = [(self.v, heads, v)]
        if k is not None:
            turns += [(self.q, queries, k.repeat_interleave(group, 0)),
                      (self.k, heads, k)]
        for linear, place, turn in turns:
            for before, after in zip(old[linear.node], new[linear.node], strict=True):
                x = before[linear.rows[place]]                # [heads, channels, in] or no in
                x = x[..., None] if x.dim() == 2 else x
                after[linear.rows] = (turn @ x).view(*linear.rows.shape, *after.shape[1:])
        columns = old[self.out][0][:, self.columns[queries]]  # [out, heads, channels]
        new[self.out][0][:, self.columns] = torch.einsum(
            "ohd,hed->ohe", columns, v.repeat_interleave(group, 0))
        for n, values in new.items():
            self._replace(n, values, name)

    def _places(self, node: Node) -> tuple[Node, Node | None, bool]:
        """The weight, the bias and whether the weight is [in, out], of a linear node."""
        at = LINEAR.get(packet(node), 0)
        bias = node.args[0] if at == 2 else (*node.args, None)[2]
        for n in (node.args[at], bias):
            if at == 0 or n is not None and not (isinstance(n, Node) and n.op == "get_attr"):
                raise Stop(f"'{node.name}' is no linear of parameters")
        return node.args[at], bias, at == 2  # type: ignore[return-value]

    def _values(self, node: Node) -> list[Tensor]:
        """The weight [out, in] and the bias, if there is one, of a linear, in fp64."""
        weight, bias, transposed = self._places(node)
        write = Writer(self.gm, self.node)
        x = write.tensor(str(weight.target)).double()
        out = [x.t() if transposed else x]
        return out if bias is None else [*out, write.tensor(str(bias.target)).double()]

    def _replace(self, node: Node, values: Sequence[Tensor], name: str) -> None:
        weight, bias, transposed = self._places(node)
        write, new = Writer(self.gm, self.node), dict[Node, Node]()
        for old, value in zip([weight] if bias is None else [weight, bias], values, strict=True):
            own = str(old.target)
            value = value.t() if transposed and old is weight else value
            with self.gm.graph.inserting_before(node):
                new[old] = write.buffer(f"{name}_{own.replace('.', '_')}",
                                        value.to(write.tensor(own).dtype), (own,))
        node.args = tuple(new.get(a, a) if isinstance(a, Node) else a for a in node.args)
