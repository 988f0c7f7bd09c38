"""How alike the K and V of layers are on a text: mean cosines of a token's vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvcompile.calibration.samples import Sample


def similarity(samples: Sequence[Sample], side: str) -> Tensor:
    """[layers, layers] in fp32: mean over texts, heads and tokens of the cosine of two layers' K
    (or V) of a token; NaN between layers whose heads differ."""
    units = [normalize((s.k if side == "k" else s.v).float(), dim=-1) for s in samples]
    out = torch.full((len(units), len(units)), torch.nan)
    for i, a in enumerate(units):
        for j, b in enumerate(units[: i + 1]):
            if a.shape == b.shape:
                out[i, j] = out[j, i] = (a * b).sum(-1).mean()
    return out
