"""nuq: codes of a calibrated codebook, over each group's own range."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.kernels.coded import GROUPS, Coded
from kvcompile.kernels.int_group import F16_MAX, round_up
from kvcompile.kernels.values import Given, Table
from kvcompile.recipe import Slice


@dataclass(frozen=True)
class Nuq(Coded):
    """x -> table[code] * scale + low: the middle of a group's range and half its width, in fp16.

    The non-uniform datatype of KVQuant (arXiv:2401.18079, section 3.3): a codebook of [-1, 1] that
    calibration finds, one for K and one for V of each layer. A slice in its place is that of the
    layer's own numbers (`kvcompile/constants.py`).
    """

    table: tuple[float, ...] | Slice = ()
    axis: str = "token"
    group: int = 128
    name: ClassVar[str] = "nuq"
    examples: ClassVar[tuple[str, ...]] = ("nuq(table=[-0.7, -0.2, 0.1, 0.6])",
        "nuq(table=[-1, -0.9, -0.8, -0.6, -0.5, -0.3, -0.2, 0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, "
        "1], axis=channel, group=32)")
    has_low: ClassVar[bool] = True
    per_layer: ClassVar[tuple[str, ...]] = ("table",)

    def __post_init__(self) -> None:
        for key, legal in (("axis", ("channel", "token")), ("group", GROUPS)):
            if getattr(self, key) not in legal:
                names = ", ".join(map(str, legal))
                raise RecipeError(f"nuq({key}={getattr(self, key)}): {key} must be one of {names}")
        if isinstance(self.table, Slice):
            return
        numbers = self.table if isinstance(self.table, tuple) else ()
        if len(numbers) not in (4, 16) or not all(type(x) in (int, float) for x in numbers):
            raise RecipeError("nuq(table=[...]): table must list 4 or 16 numbers")
        if list(numbers) != sorted(set(numbers)) or max(map(abs, numbers)) > 1:
            raise RecipeError("nuq(table=[...]): table must ascend within -1 to 1")

    @property
    def values(self) -> Table | Given:
        if isinstance(self.table, Slice):
            return Given(self.table.start or 0, self.table.stop or 0)
        return Table(self.table)

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        low = ((least + most) / 2).to(torch.float16)
        return round_up(torch.maximum(most - low.float(), low.float() - least)), low

    @property
    def cpp_fit(self) -> str:
        return "Middle"

    @property
    def triton_fit(self) -> str:
        return "fit_middle(g, inside, AXIS)"

    def limit(self, dtype: torch.dtype) -> float:
        return F16_MAX / 2


FORMAT = Nuq
