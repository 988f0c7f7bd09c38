"""Moments of what some nodes of the stateless graph are on the calibration text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node


class Moments(NamedTuple):
    """Of a node's vectors x [channels] over all tokens, in fp64; those of heads side by side."""

    second: Tensor  # E[x x^T] [channels, channels]
    size: Tensor    # E|x| [channels]


def moments(gm: GraphModule, nodes: Sequence[Node]) -> dict[Node, Moments]:
    """Those of `nodes` [B, S, channels], [B * S, channels] or [B, H, S, D], on the graph's text."""
    ids = gm.meta["text"]()
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
    run = _Seen(gm, set(nodes))
    with torch.no_grad():
        run.run(ids, positions, torch.ones_like(ids, dtype=torch.bool), positions[0, -1:])
    return run.found


class _Seen(Interpreter):
    def __init__(self, gm: GraphModule, nodes: set[Node]) -> None:
        super().__init__(gm)
        self.nodes, self.found = nodes, dict[Node, Moments]()

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if n in self.nodes:
            x = out.transpose(1, 2).flatten(2) if out.dim() == 4 else out
            x = x.flatten(0, -2).double()
            self.found[n] = Moments(x.t() @ x / len(x), x.abs().mean(0))
        return out
