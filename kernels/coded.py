"""Formats of small codes: x = value(code) * scale [+ low], packed as the kernels read them.

A group of numbers shares a scale: `group` tokens of one channel (axis=channel) or `group`
channels of one token (axis=token; the whole head if it is narrower).

With F = 8 / bits codes to a byte, a page of 128 tokens of K lies as

    [128 / 16 token groups][channels / 4F][16 tokens][4 channels] bytes,

field f of a byte being 4 channels further: 64 bytes are 4F channels of 16 tokens. A page of V is

    [128 / 4 token quads][channels / F][4 tokens] bytes,

64 bytes of which are 16F channels of 4 tokens: field f is 16 channels further (fewer in the rest
of a head that is no multiple of 16F).
"""

from abc import ABC, abstractmethod
from math import lcm
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, Planes, Side, StepPlane, term_of
from kvcompile.kernels.values import Values

GROUPS = (16, 32, 64, 128)


class Coded(ABC):
    """Base of the formats: a subclass gives `axis`, `group`, `values`, and `fit` (scale, low)."""

    name: ClassVar[str]
    axis: Any = "token"  # a field, or the same for all of a class
    group: int = 32
    scale_dtype: ClassVar[torch.dtype] = torch.float16
    has_low: ClassVar[bool] = False

    @property
    @abstractmethod
    def values(self) -> Values:
        """What the codes mean."""

    @abstractmethod
    def fit(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [..., group] -> scale and low [..., 1] as they are stored."""

    def scale(self, stored: Tensor) -> Tensor:
        """Stored scales as fp32."""
        return stored.float()

    @property
    def step(self) -> int:
        return self.group if self.axis == "channel" else 1

    def _group(self, dim: int) -> int:
        """Channels in a group, where groups run along channels."""
        group = min(self.group, dim)
        if dim % group:
            legal = [g for g in GROUPS if dim % g == 0] + [dim]
            raise RecipeError(f"{term_of(self)}: head dimension {dim} is not a multiple of group="  # type: ignore[arg-type]
                              f"{self.group}; use group={' or '.join(map(str, legal))}")
        return group

    def planes(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        if self.axis == "channel":
            scale = StepPlane(self.scale_dtype, (dim,))
        else:
            scale = StepPlane(self.scale_dtype, (dim // self._group(dim),), PAGE, 1)
        planes = {"codes": self._codes(dim, side), "scale": scale}
        return {**planes, "low": scale} if self.has_low else planes

    def _codes(self, dim: int, side: Side) -> StepPlane:
        shape: tuple[int, ...] = (k_tiles(dim, self.values.bits), 4)
        lanes = 16
        if side == "v":
            shape, lanes = (v_bytes(dim, self.values.bits),), 4
        if self.step == 1:
            return StepPlane(torch.uint8, shape, lanes, 1)
        return StepPlane(torch.uint8, (self.step // lanes, *shape[:1], lanes, *shape[1:]))

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        grouped = self._grouped(x.float())
        scale, low = self.fit(grouped)
        codes = self._ungrouped(self.values.encode(_normal(grouped, self.scale(scale), low)))
        pack = pack_k if side == "k" else pack_v
        planes = {"codes": self._arrange(pack(codes, self.values.bits), side),
                  "scale": scale.squeeze(-1)}
        return planes if low is None else {**planes, "low": low.squeeze(-1)}

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        scale = self.scale(planes["scale"])[..., None]
        x = self.values.decode(self._grouped(self.codes(planes, dim, side))) * scale
        if "low" in planes:
            x = x + planes["low"].float()[..., None]
        return self._ungrouped(x).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        half = self.values.half_gap(self._grouped(self.codes(planes, dim, side)))
        return self._ungrouped(half * self.scale(planes["scale"])[..., None])

    def codes(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        """uint8 [..., n * step, dim]: the codes of encoded planes."""
        packed = planes["codes"]
        if self.step > 1:  # [..., n, step / lanes, bytes, lanes(, 4)] -> [..., tokens, bytes(, 4)]
            at = -2 if side == "k" else -1
            packed = packed.movedim(at, at - 1).flatten(at - 3, at - 1)
        unpack = unpack_k if side == "k" else unpack_v
        return unpack(packed, self.values.bits, dim)

    def _arrange(self, packed: Tensor, side: Side) -> Tensor:
        if self.step == 1:
            return packed
        at, lanes = (-3, 16) if side == "k" else (-2, 4)
        steps = packed.unflatten(at, (-1, self.step // lanes, lanes))
        return steps.movedim(at, at + 1)

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., n * step, dim] -> groups last: [..., n, dim, group] or [..., n, groups, group]."""
        if self.axis == "channel":
            return x.unflatten(-2, (-1, self.group)).transpose(-1, -2)
        return x.unflatten(-1, (-1, self._group(x.shape[-1])))

    def _ungrouped(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2).flatten(-3, -2) if self.axis == "channel" else x.flatten(-2)

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/coded.h`); RecipeError if none does."""
        rest = v_bytes(dim % (128 // self.values.bits), self.values.bits)
        if side == "v" and self.axis == "token" and self.group < dim and rest and 16 % rest:
            raise RecipeError(f"{rest} channels abreast cut a group of {self.group}")
        group = self.group if self.axis == "channel" else self._group(dim)
        scale = "half" if self.scale_dtype is torch.float16 else "exponent"
        low = "true" if self.has_low else "false"
        return (f"Coded{side.upper()}<{dim}, {self.values.cpp}, {self.axis}_axis, {group}, "
                f"{scale}, {low}>")

    def cpp_in_k(self, dim: int, values: int, dtype: torch.dtype) -> str:
        """The C++ type that reads V, the first `values` channels of K (`kernels/cpp/latent.h`)."""
        return f"CodedInK<{self.cpp(dim, dtype, 'k')}, {values}>"

    @property
    def cpp_fit(self) -> str:
        """The C++ type that does what `fit` does (`kernels/cpp/append.h`)."""
        raise RecipeError(f"format {self.name} has no C++ writer")

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the planes; RecipeError if none does."""
        group = self.group if self.axis == "channel" else self._group(dim)
        scale = "half" if self.scale_dtype is torch.float16 else "exponent"
        flags = ("true" if side == "k" else "false", "true" if self.has_low else "false")
        return (f"CodedWriter<{flags[0]}, {dim}, {self.values.cpp}, {self.cpp_fit}, "
                f"{self.axis}_axis, {group}, {scale}, {flags[1]}>")

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of decoded numbers (`kernels/triton_source.py`)."""
        codes = f"{side}_codes({planes[0]}, page, at, N, {dim}, DP, {self.values.bits})"
        group = self.group if self.axis == "channel" else self._group(dim)
        return (f"by_{self.axis}({self.values.triton(codes)}, {planes[1]}, {planes[-1]}, page, at, "
                f"keep, N, {dim}, DP, {group}, {self.has_low})")

    @property
    def triton_fit(self) -> str:
        """What does as `fit` does, of `g` and `inside` along AXIS (`kernels/triton/numbers.py`)."""
        raise RecipeError(f"format {self.name} has no Triton writer")

    def triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                      ) -> list[str]:
        """Statements that store the tile `x`; RecipeError if none can."""
        where = "page, at, keep"
        axis, group = (1, self.group) if self.axis == "channel" else (2, self._group(dim))
        sizes = f"N, {dim}, DP, {group}"
        lines = [f"g, inside = group_{self.axis}(x, {sizes})",
                 f"scale, low = {self.triton_fit.replace('AXIS', str(axis))}",
                 f"store_{self.axis}({planes[1]}, {where}, scale, {sizes})"]
        if self.has_low:
            lines.append(f"store_{self.axis}({planes[2]}, {where}, low, {sizes})")
        code = self.values.triton_code(f"normal(g, scale, low, {axis}, {self.has_low})")
        return [*lines, f"codes = {code}",
                f"{side}_store({planes[0]}, {where}, tl.reshape(codes, (N, DP)), N, {dim}, "
                f"DP, {self.values.bits})"]

    def triton_pieces(self, dim: int, side: Side) -> tuple[int, list[int]]:
        """Channels that can be written by themselves, and how much of each plane is theirs."""
        fields = 8 // self.values.bits
        many = 4 * fields if side == "k" else 16 * fields  # whole words, or whole tiles
        if side == "v" and dim % many:
            raise RecipeError("the rest of a head lies apart")
        group = 1 if self.axis == "channel" else self._group(dim)
        many = lcm(many, group)
        scales = many if self.axis == "channel" else many // group * PAGE
        return many, [many // fields * (16 if side == "k" else 4), *[scales] * (1 + self.has_low)]


def _normal(x: Tensor, scale: Tensor, low: Tensor | None) -> Tensor:
    shifted = x if low is None else x - low.float()
    return shifted / torch.where(scale == 0, 1, scale)


def k_tiles(dim: int, bits: int) -> int:
    """Tiles of 4F channels in a head of `dim` channels."""
    return -(-dim // (32 // bits))


def v_bytes(dim: int, bits: int) -> int:
    """Bytes that the codes of a token's `dim` channels take."""
    return -(-dim // (8 // bits))


def pack_k(codes: Tensor, bits: int) -> Tensor:
    """codes [..., tokens, dim] -> [..., tokens, tiles, 4] bytes."""
    fields = 8 // bits
    tiles = k_tiles(codes.shape[-1], bits)
    codes = pad(codes, (0, tiles * 4 * fields - codes.shape[-1]))
    return _merge(codes.unflatten(-1, (tiles, fields, 4)), -2, bits)


def unpack_k(packed: Tensor, bits: int, dim: int) -> Tensor:
    return _split(packed, -2, bits).flatten(-3)[..., :dim]


def pack_v(codes: Tensor, bits: int) -> Tensor:
    """codes [..., tokens, dim] -> [..., tokens, bytes]."""
    fields, dim = 8 // bits, codes.shape[-1]
    full = dim // (16 * fields) * 16 * fields
    parts = [_merge(codes[..., :full].unflatten(-1, (-1, fields, 16)), -2, bits).flatten(-2)]
    if full < dim:
        rest = v_bytes(dim - full, bits)
        tail = pad(codes[..., full:], (0, rest * fields - dim + full))
        parts.append(_merge(tail.unflatten(-1, (fields, rest)), -2, bits))
    return torch.cat(parts, -1)


def unpack_v(packed: Tensor, bits: int, dim: int) -> Tensor:
    fields = 8 // bits
    full = dim // (16 * fields) * 16
    parts = [_split(packed[..., :full].unflatten(-1, (-1, 16)), -2, bits).flatten(-3)]
    if full < packed.shape[-1]:
        parts.append(_split(packed[..., full:], -2, bits).flatten(-2))
    return torch.cat(parts, -1)[..., :dim]


def _merge(codes: Tensor, axis: int, bits: int) -> Tensor:
    """Bytes of the codes along `axis`, the first in the lowest bits."""
    parts: Any = codes.unbind(axis)
    packed = parts[0].clone()
    for field, part in enumerate(parts[1:], 1):
        packed |= part << (field * bits)
    return packed


def _split(packed: Tensor, axis: int, bits: int) -> Tensor:
    """Inverse of _merge: the codes of each byte along a new `axis`."""
    fields = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(fields, axis)
