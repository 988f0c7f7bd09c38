"""Choices of channels: what a head keeps of its keys."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.prompt import Prompt


@dataclass(frozen=True)
class Energy:
    """ThinK: the share `drop` of the channels i with the least mean q_i^2 * mean k_i^2 leave.

    q are the last `window` queries, mean over the query heads of a kv head; of equal channels the
    last leaves. The newest `recent` keys are kept whole.
    """

    drop: float = 0.5
    window: int = 32
    recent: int = 32
    name: ClassVar[str] = "energy"

    def prompt(self, x: Prompt) -> Tensor:
        q = x.queries[:, :, max(0, x.tokens - self.window) : x.tokens]
        energy = q.square().mean((1, 2)) * x.keys.square().mean(1)          # [H, Dk]
        stay = energy.shape[1] - int(energy.shape[1] * self.drop)
        best = energy.argsort(dim=-1, descending=True, stable=True)[:, :stay]
        return torch.zeros_like(energy, dtype=torch.bool).scatter(1, best, True)


CHANNELS = (Energy,)
