"""int: asymmetric integers of 8, 4 or 2 bits in groups with a 16-bit scale and minimum."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError

F16_MAX, F16_NORMAL = 65504.0, 2.0**-14


@dataclass(frozen=True)
class Int:
    """x -> code * scale + low, code = round((x - low) / scale) in 0 .. 2**bits - 1.

    A group is `group` tokens of one channel (axis=channel) or `group` channels of one token
    (axis=token; the whole head if it is narrower). `low` is rounded down to fp16 and `scale` to
    nearest, so that |error| <= scale / 2 holds for the stored scale. Source: KIVI, section 3.
    """

    bits: int = 8
    axis: str = "token"
    group: int = 32
    name: ClassVar[str] = "int"

    def __post_init__(self) -> None:
        for key, legal in (("bits", (2, 4, 8)), ("axis", ("channel", "token")),
                           ("group", (16, 32, 64, 128))):
            if getattr(self, key) not in legal:
                names = ", ".join(map(str, legal))
                raise RecipeError(f"int({key}={getattr(self, key)}): {key} must be one of {names}")

    @property
    def step(self) -> int:
        return self.group if self.axis == "channel" else 1

    def _group(self, dim: int) -> int:
        """Channels in a group, where groups run along channels."""
        group = min(self.group, dim)
        if dim % group or dim * self.bits % 8:
            legal = [g for g in (16, 32, 64, 128) if dim % g == 0] + [dim]
            raise RecipeError(f"int(group={self.group}): head dimension {dim} is not a multiple of "
                              f"{self.group}; use group={' or '.join(map(str, legal))}")
        return group

    def planes(self, dim: int, dtype: torch.dtype) -> dict:
        if self.axis == "channel":
            return {"codes": (torch.uint8, (self.group * self.bits // 8, dim)),
                    "affine": (torch.float16, (2, dim))}
        return {"codes": (torch.uint8, (dim * self.bits // 8,)),
                "affine": (torch.float16, (2, dim // self._group(dim)))}

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., n * step, dim] -> [..., n, group, dim] or [..., n, dim / group, group]."""
        if self.axis == "channel":
            return x.unflatten(-2, (-1, self.group))
        return x.unflatten(-1, (-1, self._group(x.shape[-1])))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        axis = -2 if self.axis == "channel" else -1
        x = self._grouped(x.float())
        top = 2**self.bits - 1
        low = x.amin(axis, keepdim=True)
        rounded = low.to(torch.float16)
        below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        low = torch.where(rounded.float() > low, below, rounded)
        want = (x.amax(axis, keepdim=True) - low.float()) / top
        scale = want.to(torch.float16)
        above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
        short = (scale.float() < want) & (want < F16_NORMAL)  # subnormals: round up, never to zero
        scale = torch.where(short, above, scale).clamp_max(F16_MAX)
        divisor = torch.where(scale == 0, 1, scale).float()
        codes = ((x - low.float()) / divisor).round().clamp(0, top).to(torch.uint8)
        affine = torch.cat([scale, low], axis)
        if self.axis == "token":
            codes, affine = codes.flatten(-2), affine.movedim(-1, -2)
        return {"codes": self._pack(codes, -2 if self.axis == "channel" else -1), "affine": affine}

    def _pack(self, codes: Tensor, axis: int) -> Tensor:
        """Neighbours along `axis` share a byte, the first in the lowest bits."""
        per = 8 // self.bits
        parts = codes.unflatten(axis, (-1, per)).unbind(axis)
        packed = parts[0].clone()
        for i, part in enumerate(parts[1:], 1):
            packed |= part << (i * self.bits)
        return packed

    def _unpack(self, packed: Tensor, axis: int) -> Tensor:
        mask = 2**self.bits - 1
        parts = [(packed >> shift) & mask for shift in range(0, 8, self.bits)]
        return torch.stack(parts, axis).flatten(axis - 1, axis)

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        codes = self._unpack(planes["codes"], -2 if self.axis == "channel" else -1)
        affine = planes["affine"].float()
        if self.axis == "channel":
            scale, low = affine.split(1, -2)
            return (codes * scale + low).flatten(-3, -2).to(dtype)
        scale, low = affine.unbind(-2)
        grouped = codes.unflatten(-1, (-1, self._group(dim)))
        return (grouped * scale[..., None] + low[..., None]).flatten(-2).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int) -> Tensor:
        half = planes["affine"].float().select(-2, 0) / 2
        if self.axis == "channel":
            return half.repeat_interleave(self.group, -2)
        return half.repeat_interleave(self._group(dim), -1)

    def limit(self, dtype: torch.dtype) -> float:
        return F16_MAX / 2  # low fits fp16, and so does high - low


FORMAT = Int
