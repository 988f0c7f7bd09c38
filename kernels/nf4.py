"""nf4: 4-bit NormalFloat, the codebook of a normal distribution, scaled by each group's peak."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.kernels.coded import GROUPS, Coded
from kvcompile.kernels.int_group import F16_MAX, round_up
from kvcompile.kernels.values import Table


def _half(count: int, offset: float) -> list[float]:
    """Quantiles of the normal distribution at `count` even steps from 1/2 to `offset`, end first.

    The half that ends at 0 is left to the caller.
    """
    at = torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1]
    return torch.special.ndtri(at).tolist()


def normal_float() -> tuple[float, ...]:
    """QLoRA, section 3: 8 positive and 7 negative quantiles and 0, scaled to [-1, 1]."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    numbers = sorted([*_half(8, offset), 0.0, *(-x for x in _half(7, offset))])
    return tuple(x / numbers[-1] for x in numbers)


NORMAL = normal_float()


@dataclass(frozen=True)
class Nf4(Coded):
    """x -> NORMAL[code] * scale, scale = the group's largest magnitude. arXiv:2305.14314."""

    axis: str = "token"
    group: int = 64
    name: ClassVar[str] = "nf4"
    examples: ClassVar[tuple[str, ...]] = ("nf4", "nf4(axis=channel, group=16)", "nf4(group=128)")

    def __post_init__(self) -> None:
        for key, legal in (("axis", ("channel", "token")), ("group", GROUPS)):
            if getattr(self, key) not in legal:
                names = ", ".join(map(str, legal))
                raise RecipeError(f"nf4({key}={getattr(self, key)}): {key} must be one of {names}")

    @property
    def values(self) -> Table:
        return Table(NORMAL)

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return round_up(x.abs().amax(-1, keepdim=True)), None

    @property
    def cpp_fit(self) -> str:
        return "Peak<1>"

    @property
    def triton_fit(self) -> str:
        return "fit_peak(g, inside, AXIS, 1)"

    def limit(self, dtype: torch.dtype) -> float:
        return F16_MAX


FORMAT = Nf4
