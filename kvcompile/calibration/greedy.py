"""Ranks of each layer's K and V by greedy search, for bases in which channels are in order.

MatryoshkaKV (arXiv:2410.14731): from full rank on, what is cut next is what costs least, until few
enough channels are left. The cost is the divergence of the model's predictions on a text. Here a
cost is that of one layer's K or V alone, measured once for each rank, and costs add up: so there
are as many runs of the model as ranks, not as many again for every cut.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvcompile.calibration.factor import spectrum
from kvcompile.calibration.samples import Reader, Samples, inputs
from kvcompile.store import SIDES

LEVELS = 4  # ranks that are tried: so many equal steps of all channels
TOKENS = 1024  # of the text, on which a cost is measured


def costs(samples: Samples) -> dict[tuple[int, str], list[float]]:
    """(layer, side) -> nats per token that K or V of this layer costs at full rank (0), 3/4, 1/2
    and 1/4 of each head's channels, the principal ones of the rotated heads on the text."""
    gm, tokens = samples.gm, samples.ids.shape[1]
    ids = samples.ids[: max(1, TOKENS // tokens), :TOKENS]
    with torch.no_grad():
        want = gm(*inputs(ids, keep=ids.shape[1])).log_softmax(-1)
        found: dict[tuple[int, str], list[float]] = {}
        for layer, seen in zip(samples.layers, samples.attention, strict=True):
            for side, x in zip(SIDES, (seen.k, seen.v), strict=True):
                bases = principal(x)
                found[layer, side] = [0.0, *(_divergence(gm, ids, want, layer, side, bases[
                    ..., : x.shape[-1] * n // LEVELS]) for n in range(LEVELS - 1, 0, -1))]
    return found


def principal(x: Tensor) -> Tensor:
    """[H, D, D]: of x [N, H, T, D] the principal directions of each head, as columns."""
    flat = x.transpose(0, 1).flatten(1, 2).double()
    return torch.stack([spectrum(own.mT @ own)[1] for own in flat]).to(x)


def greedy(costs: Mapping[Any, Sequence[float]], sizes: Mapping[Any, int], ratio: float
           ) -> dict[Any, float]:
    """The fraction of its channels, so many, that each keeps: all together at most `ratio`."""
    level = dict.fromkeys(costs, 0)
    left, most = float(sum(sizes.values())), ratio * sum(sizes.values())

    def price(key: Any) -> float:
        own, at = costs[key], level[key]
        return (own[at + 1] - own[at]) / sizes[key]

    while left > most * (1 + 1e-9):
        key = min((k for k in costs if level[k] + 1 < len(costs[k])), key=price)
        level[key] += 1
        left -= sizes[key] / LEVELS
    return {key: 1 - at / LEVELS for key, at in level.items()}


def _divergence(gm: GraphModule, ids: Tensor, want: Tensor, layer: int, side: str, basis: Tensor
                ) -> float:
    """Mean KL of the predictions from `want` where one layer's K or V is projected on `basis`."""
    logits = _Projected(gm, layer, side, basis).run(*inputs(ids, keep=ids.shape[1]))
    return float((want.exp() * (want - logits.log_softmax(-1))).sum(-1).mean())


class _Projected(Reader):
    """x -> U U^T x for one layer's K or V, U [H, D, r]."""

    def __init__(self, gm: GraphModule, layer: int, side: str, basis: Tensor) -> None:
        super().__init__(gm)
        self.layer, self.side, self.basis = layer, side, basis

    def given(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer != self.layer:
            return k, v
        k, v = (x @ self.basis @ self.basis.mT if side == self.side else x
                for side, x in zip(SIDES, (k, v), strict=True))
        return k, v
