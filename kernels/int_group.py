"""int: integers of 8, 4 or 2 bits in groups with a 16-bit scale, and a minimum unless symmetric."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.kernels.coded import GROUPS, Coded
from kvcompile.kernels.values import Whole, float_bits

F16_MAX, F16_NORMAL = 65504.0, 2.0**-14


@dataclass(frozen=True)
class Int(Coded):
    """x -> code * scale + low, code = round((x - low) / scale) in 0 .. 2**bits - 1.

    A group is `group` tokens of one channel (axis=channel) or `group` channels of one token
    (axis=token; the whole head if it is narrower). `low` is rounded down to fp16 and `scale` to
    nearest, so that |error| <= scale / 2 holds for the stored scale. Source: KIVI, section 3.
    With symmetric=true x -> (code - 2**(bits-1)) * scale, and scale is rounded up. With `clip` the
    codes span that share of the group's range, about its middle; what lies outside is clipped.
    """

    bits: int = 8
    axis: str = "token"
    group: int = 32
    symmetric: bool = False
    clip: float = 1.0
    name: ClassVar[str] = "int"
    examples: ClassVar[tuple[str, ...]] = ("int(bits=2, axis=channel, group=16)",
        "int(bits=4, axis=token, group=64)", "int(group=128, clip=0.95)", "int(clip=0.5)",
        "int(bits=4, symmetric=true)")

    def __post_init__(self) -> None:
        for key, legal in (("bits", (2, 4, 8)), ("axis", ("channel", "token")),
                           ("group", GROUPS), ("symmetric", (False, True))):
            if getattr(self, key) not in legal:
                names = ", ".join(map(str, legal))
                raise RecipeError(f"int({key}={getattr(self, key)}): {key} must be one of {names}")
        if not 0.5 <= self.clip <= 1 or self.symmetric and self.clip < 1:
            raise RecipeError(f"int(clip={self.clip}): clip must be from 0.5 to 1, and 1 where "
                              "symmetric=true")

    @property
    def _cut(self) -> float:
        """The share of the range that is clipped at either end."""
        return (1 - self.clip) / 2

    @property
    def values(self) -> Whole:
        if self.symmetric or self.clip == 1:
            return Whole(self.bits, 2 ** (self.bits - 1) if self.symmetric else 0)
        beyond = self._cut / self.clip * (1 + 2.0**-10) + 2.0**-11  # of the scale's rounding
        return Whole(self.bits, 0, (2**self.bits - 1) * beyond)

    @property
    def has_low(self) -> bool:  # type: ignore[override]
        return not self.symmetric

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.symmetric:  # the largest magnitude becomes code 1 or 2**bits - 1
            most = x.abs().amax(-1, keepdim=True) / max(2 ** (self.bits - 1) - 1, 1)
            return round_up(most), None
        low, high = (y + 0.0 for y in (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))  # no -0
        if self.clip < 1:
            cut = (high - low) * self._cut
            low, high = low + cut, high - cut
        rounded = low.to(torch.float16)
        below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        low = torch.where(rounded.float() > low, below, rounded)
        want = (high - low.float()) / (2**self.bits - 1)
        scale = want.to(torch.float16)
        above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
        short = (scale.float() < want) & (want < F16_NORMAL)  # subnormals: round up, never to zero
        return torch.where(short, above, scale).clamp_max(F16_MAX), low

    @property
    def cpp_fit(self) -> str:
        if self.symmetric:
            return f"Peak<{max(2 ** (self.bits - 1) - 1, 1)}>"
        return f"Asymmetric<{self.bits}, {float_bits(self._cut)}u>"

    @property
    def triton_fit(self) -> str:
        if self.symmetric:
            return f"fit_peak(g, inside, AXIS, {max(2 ** (self.bits - 1) - 1, 1)})"
        return f"fit_range(g, inside, AXIS, {2**self.bits - 1}, {self._cut!r})"

    def limit(self, dtype: torch.dtype) -> float:
        return F16_MAX / 2  # low fits fp16, and so does high - low


def round_up(x: Tensor) -> Tensor:
    """x >= 0 as the nearest fp16 that is not smaller."""
    near = x.to(torch.float16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < x, above, near).clamp_max(F16_MAX)


FORMAT = Int
