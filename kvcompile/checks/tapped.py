"""Graphs that give, beside their results, what every attention layer was given and returned."""

import operator
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.fx import GraphModule, Node

from kvcompile.checks.promise import Rebuilt
from kvcompile.ir import ATTEND, ATTENTION, BESIDE, argument
from kvcompile.laws import How
from kvcompile.rewrite import copy_graph
from kvcompile.structure.beside import rotary

OPTIONAL = ("sinks", "basis", "offset", "cos", "sin")


class Taps(NamedTuple):
    """One layer of one call: q [B, Hq, S, Dk], k, v [B, H, S, D], o [B, Hq, S, Dv].

    `rebuilt` says how keys come from k, where k is less than they are; `angles` are those of the
    rotary embedding, where they were asked for, in `style`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    how: How
    rebuilt: Rebuilt
    angles: Tensor | None
    style: str

    def row(self, row: int, valid: Tensor) -> "Taps":
        """Of one row, its tokens only: q [Hq, S, Dk] and so on. Columns beyond those that `valid`
        has stand beside the prompt and are left out."""
        q, k, v, o = (x[row, :, : len(valid)][:, valid] for x in self[:4])
        angles = self.angles
        if angles is not None:
            angles = angles.flatten(0, -3) if angles.dim() > 3 else angles
            angles = angles[row % len(angles), : len(valid)][valid]
        return self._replace(q=q, k=k, v=v, o=o, rebuilt=self.rebuilt.row(row), angles=angles)


def tapped(gm: GraphModule, turned: Collection[int] = ()) -> tuple[GraphModule, list[list[str]]]:
    """`gm`, a graph with a cache, whose outputs go on with what `read` makes Taps of, and the names
    of these outputs, layer by layer. Layers in `turned` give their rotary angles, too."""
    gm = copy_graph(gm)
    output, taps, names = gm.graph.output_node(), list[Node](), list[list[str]]()
    for layer, node in enumerate([n for n in gm.graph.nodes if n.target in (ATTENTION, ATTEND)]):
        own = {name: argument(node, name) for name in ("q", "k", "v")}
        own["o"] = node if node.target is ATTENTION else _output(node)
        own |= {name: argument(node, name) for name in OPTIONAL}
        if layer in turned and node.target is ATTENTION:
            own["angles"] = rotary(node)[0]
        own = {name: x for name, x in own.items() if x is not None}
        taps += own.values()
        names.append([*own])
    output.args = ((*output.args[0], *taps),)  # type: ignore[misc]
    gm.recompile()
    return gm, names


def _output(node: Node) -> Node:
    """Where attention over what is stored ends: behind what is beside that, if there is such."""
    o = next(n for n in node.users if n.target is operator.getitem and n.args[1] == 0)
    return next((n for n in o.users if n.target is BESIDE), o)


def read(outputs: Sequence[Tensor], names: Sequence[Sequence[str]], nodes: Sequence[Node]
         ) -> list[Taps]:
    """What a tapped graph gave; `nodes` are the kvc.attention nodes of the layers."""
    given, layers = iter(outputs), []
    for own, node in zip(names, nodes, strict=True):
        x = {name: next(given).detach().cpu() for name in own}
        how = How(argument(node, "scale"), argument(node, "softcap"), x.get("sinks"))
        rebuilt = Rebuilt(x.get("basis"), x.get("offset"), x.get("cos"), x.get("sin"),
                          argument(node, "style"))
        layers.append(Taps(x["q"], x["k"], x["v"], x["o"], how, rebuilt, x.get("angles"),
                           rotary(node)[1]))
    return layers
