"""Fisher information of K's and V's projections, and the ranks that follow from it.

Palu (arXiv:2407.21118, section 3.3): a layer's K or V gets a rank in proportion to how much its
weights matter to the loss, F = mean over weights w of sqrt(E over texts of (dL/dw)^2).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import cross_entropy

from kvcompile.calibration.samples import Reader, inputs
from kvcompile.structure.layout import linear_input
from kvcompile.structure.sources import Linear


def fisher(gm: GraphModule, ids: Tensor, linears: Mapping[Any, Linear]) -> dict[Any, float]:
    """F of each linear's `rows`, on texts [N, T] that `gm`, the stateless graph, reads."""
    nodes = {x.node for x in linears.values()}
    squares: dict[Node, Tensor] = {}
    for text in ids:
        run = _Linears(gm, nodes)
        with torch.enable_grad():
            logits = run.run(*inputs(text[None], keep=len(text)))[0, :-1]
            loss = cross_entropy(logits.float(), text[1:])
            found = torch.autograd.grad(loss, [run.shifts[n] for n in nodes])
        for node, gradient in zip(nodes, found, strict=True):
            x = run.inputs[node].detach().flatten(0, -2)
            square = (gradient.flatten(0, -2).t().double() @ x.double()).square()
            squares[node] = squares.get(node, 0) + square / len(ids)
    return {key: float(squares[x.node][x.rows.flatten()].sqrt().mean())
            for key, x in linears.items()}


class _Linears(Reader):
    """Adds nothing to the results of some linears, so that the loss has gradients of it."""

    def __init__(self, gm: GraphModule, nodes: set[Node]) -> None:
        super().__init__(gm)
        self.nodes, self.sources = nodes, {n: linear_input(n) for n in nodes}
        self.shifts, self.inputs = dict[Node, Tensor](), dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if n not in self.nodes:
            return out
        self.shifts[n] = torch.zeros_like(out, requires_grad=True)
        self.inputs[n] = self.env[self.sources[n]]
        return out + self.shifts[n]


def shares(information: Sequence[float], sizes: Sequence[int], ratio: float) -> list[float]:
    """The fraction of each of `sizes` channels that is kept, in proportion to `information` and at
    most 1, so that `ratio` of all channels are: what some cannot take the others share equally, as
    in Palu's program."""
    kept, open_ = [0.0] * len(sizes), set(range(len(sizes)))
    left, weight = ratio * sum(sizes), sum(information)
    part = [left * (x / weight if weight else 1 / len(sizes)) for x in information]
    while open_ and left > 1e-9 * sum(sizes):
        for i in open_:
            took = min(part[i], sizes[i] - kept[i])
            kept[i] += took
            left -= took
        open_ = {i for i in open_ if kept[i] < sizes[i] * (1 - 1e-9)}
        part = [left / max(1, len(open_))] * len(sizes)
    return [n / size for n, size in zip(kept, sizes, strict=True)]
