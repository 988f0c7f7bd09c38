"""outliers: the extreme numbers of each group are stored apart, the others by another format."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, Planes, Side, StepPlane
from kvcompile.kernels.coded import Coded
from kvcompile.kernels.int_group import F16_MAX
from kvcompile.kernels.wrapper import Wrapper, total
from kvcompile.recipe import Term


@dataclass(frozen=True)
class Outliers(Wrapper):
    """x -> of(x without its outliers) + what is missing there (fp16) and where (a byte each).

    The `fraction` of every group of `of` that is farthest from the group's mean is taken out, so
    that the scale fits the others: KVQuant's dense-and-sparse (arXiv:2401.18079, section 3.4), and
    GEAR's sparse part. At least one number of each group.
    """

    of: Term = Term("int")
    fraction: float = 0.01
    name: ClassVar[str] = "outliers"
    examples: ClassVar[tuple[str, ...]] = ("outliers(of=int(bits=2, axis=channel, group=128))",
        "outliers(of=nf4, fraction=0.05)")

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 0.25:
            raise RecipeError(f"outliers(fraction={self.fraction}): fraction must be above 0 and "
                              "at most 0.25")
        if not isinstance(self.inner, Coded):
            raise RecipeError(f"outliers(of={self.of}): {self.inner.name} has no groups; use "
                              "int or nf4")

    @property
    def _coded(self) -> Coded:
        assert isinstance(self.inner, Coded)
        return self.inner

    @property
    def step(self) -> int:
        return self.inner.step

    def _shape(self, dim: int) -> tuple[int, int, int]:
        """Groups in a step, numbers in a group, outliers in a group."""
        coded = self._coded
        group = coded.group if coded.axis == "channel" else coded._group(dim)
        return (dim if coded.axis == "channel" else dim // group, group,
                ceil(self.fraction * group - 1e-9))

    def own(self, dim: int) -> Planes:
        groups, _, taken = self._shape(dim)
        lanes, at = (1, 0) if self._coded.axis == "channel" else (PAGE, 2)
        return {"place": StepPlane(torch.uint8, (groups, taken), lanes, at),
                "rest": StepPlane(torch.float16, (groups, taken), lanes, at)}

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        coded, dim = self._coded, x.shape[-1]
        grouped = coded._grouped(x.float())                              # [..., groups, group]
        taken = self._shape(dim)[2]
        group = grouped.shape[-1]
        far = (grouped - total(grouped) / group).abs()
        order = torch.arange(group - 1, -1, -1, device=x.device)         # of equals the first
        rank = far.contiguous().view(torch.int32).long() * group + order
        place = rank.topk(taken, -1).indices.sort(-1).values
        inside = torch.ones_like(grouped, dtype=torch.bool).scatter(-1, place, False)
        mean = total(torch.where(inside, grouped, 0.0)) / (group - taken)
        dense = torch.where(inside, grouped, mean)
        planes = coded.encode(coded._ungrouped(dense), side)
        stored = coded._grouped(coded.decode(planes, dim, torch.float32, side))
        rest = (grouped - stored).gather(-1, place).to(torch.float16)
        return {**planes, "place": place.to(torch.uint8), "rest": rest}

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        coded = self._coded
        dense = coded._grouped(coded.decode(planes, dim, torch.float32, side))
        full = dense.scatter_add(-1, planes["place"].long(), planes["rest"].float())
        return coded._ungrouped(full).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        coded = self._coded
        bound = coded._grouped(coded.error_bound(planes, dim, side))
        half = planes["rest"].float().abs() * 2.0**-11 + 2.0**-25        # of fp16's last place
        return coded._ungrouped(bound.scatter(-1, planes["place"].long(), half))

    def limit(self, dtype: torch.dtype) -> float:
        return min(F16_MAX, self.inner.limit(dtype)) / 2  # of a number and what stands for it

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/wrapper.h`)."""
        _, group, taken = self._shape(dim)
        return (f"Outliers{side.upper()}<{self.inner_cpp(dim, dtype, side)}, {dim}, "
                f"{self._coded.axis}_axis, {group}, {taken}>")

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the planes; RecipeError if none does."""
        inside = self.inner_writer(dim, dtype, side)
        return f"OutliersWriter<{inside}, {self.cpp(dim, dtype, side)}, {self._shape(dim)[2]}>"

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of decoded numbers (`kernels/triton/wrapper.py`)."""
        _, group, taken = self._shape(dim)
        inside = self.inner_triton(dim, dtype, side, planes[:-2])
        return (f"outliers({inside}, {planes[-2]}, {planes[-1]}, page, at, keep, N, {dim}, "
                f"DP, {group}, {taken}, {self._coded.axis == 'channel'})")

    def triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                      ) -> list[str]:
        """Statements that store the tile `x`; RecipeError if none can."""
        _, group, taken = self._shape(dim)
        if group & (group - 1):
            raise RecipeError(f"the Triton writer needs groups of a power of two, not {group}")
        coded = self._coded
        axis = 1 if coded.axis == "channel" else 2
        sizes = f"{axis}, N, {dim}, DP, {group}, {taken}"
        base = f" + tl.expand_dims(number_of(low), {axis})" if coded.has_low else ""
        return [f"whole_g, _ = group_{coded.axis}(x, N, {dim}, DP, {group})",
                f"dense_g, out = take_out(whole_g, {planes[-2]}, page, at, keep, {sizes})",
                "x = tl.reshape(dense_g, (N, DP))",
                *self.inner_triton_writer(dim, dtype, side, planes[:-2]),
                f"stored = {coded.values.triton('codes')} * "
                f"tl.expand_dims(number_of(scale), {axis}){base}",
                f"store_rest({planes[-1]}, page, at, keep, whole_g - stored, out, {sizes})"]

    def triton_pieces(self, dim: int, side: Side) -> tuple[int, list[int]]:
        """Channels that can be written by themselves, and how much of each plane is theirs."""
        many, inside = self._coded.triton_pieces(dim, side)
        _, group, taken = self._shape(dim)
        each = taken if self._coded.axis == "channel" else taken * PAGE // group
        return many, [*inside, *[each * many] * 2]


FORMAT = Outliers
