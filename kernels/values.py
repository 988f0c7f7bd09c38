"""What a code means: the number that each 8-, 4- or 2-bit code stands for, before any scale."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcompile.errors import KVCompileError

FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Whole:
    """Whole numbers: code - offset. What is encoded lies up to `beyond` outside their range."""

    bits: int
    offset: int = 0
    beyond: float = 0.0

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float() - self.offset

    def encode(self, x: Tensor) -> Tensor:
        return (x.round() + self.offset).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def half_gap(self, codes: Tensor) -> Tensor:
        """|x - decode(encode(x))| <= half_gap for every x within the range of the codes."""
        half = torch.full_like(codes, 0.5, dtype=torch.float32)
        if self.beyond > 0.5:
            half[(codes == 0) | (codes == 2**self.bits - 1)] = self.beyond
        return half

    @property
    def cpp(self) -> str:
        return f"Whole<{self.bits}, {self.offset}>"

    def triton(self, codes: str) -> str:
        return f"whole({codes}, {self.offset})"

    def triton_code(self, x: str) -> str:
        return f"whole_code({x}, {self.bits}, {self.offset})"


@dataclass(frozen=True)
class Float8:
    """8-bit floats, e4m3 or e5m2."""

    kind: str

    @property
    def bits(self) -> int:
        return 8

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(FLOATS[self.kind]).float()

    def encode(self, x: Tensor) -> Tensor:
        most = torch.finfo(FLOATS[self.kind]).max
        return x.clamp(-most, most).to(FLOATS[self.kind]).view(torch.uint8)

    def half_gap(self, codes: Tensor) -> Tensor:
        info = torch.finfo(FLOATS[self.kind])
        return self.decode(codes).abs() * info.eps / 2 + info.smallest_normal * info.eps / 2

    @property
    def cpp(self) -> str:
        return f"Float8<{'4' if self.kind == 'e4m3' else '5'}>"

    def triton(self, codes: str) -> str:
        return f"float8({codes}, {self.kind[1]})"

    def triton_code(self, x: str) -> str:
        return f"float8_code({x}, {self.kind[1]}, {torch.finfo(FLOATS[self.kind]).max})"


@dataclass(frozen=True)
class Table:
    """A codebook: `numbers`, ascending, 4 or 16 of them; the nearest one to an x in [-1, 1]."""

    numbers: tuple[float, ...]

    @cached_property
    def bits(self) -> int:
        return len(self.numbers).bit_length() - 1

    def _tensor(self, like: Tensor) -> Tensor:
        return torch.tensor(self.numbers, dtype=torch.float32, device=like.device)

    def decode(self, codes: Tensor) -> Tensor:
        return self._tensor(codes)[codes.long()]

    def encode(self, x: Tensor) -> Tensor:
        table = self._tensor(x)
        return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)

    def half_gap(self, codes: Tensor) -> Tensor:
        table = self._tensor(codes)
        half = table.diff() / 2
        below = torch.cat([table[:1] + 1, half])
        return torch.maximum(below, torch.cat([half, 1 - table[-1:]]))[codes.long()]

    @property
    def cpp(self) -> str:
        numbers = (self.numbers * 16)[:16]  # a short table is repeated: higher bits do not matter
        return "Table<" + f"{self.bits}, " + ", ".join(f"{float_bits(x)}u" for x in numbers) + ">"

    def triton(self, codes: str) -> str:
        numbers = ", ".join(repr(x) for x in torch.tensor(self.numbers).tolist())
        return f"table{len(self.numbers)}({codes}, {numbers})"

    def triton_code(self, x: str) -> str:
        table = torch.tensor(self.numbers)
        middles = ((table[1:] + table[:-1]) / 2).tolist()
        return f"above({x}, {middles[0]!r})" + "".join(
            f" + above({x}, {m!r})" for m in middles[1:])


@dataclass(frozen=True)
class Given:
    """A codebook of the layer's own: its numbers from `start` to `stop` (kvcompile/constants.py).

    Kernels read them where they lie; a plain body is given the `Table` that they are.
    """

    start: int
    stop: int

    @property
    def bits(self) -> int:
        return (self.stop - self.start).bit_length() - 1

    def decode(self, codes: Tensor) -> Tensor:
        raise KVCompileError("the numbers of the layer are not known here")

    encode = half_gap = decode

    @property
    def cpp(self) -> str:
        return f"Given<{self.bits}, {self.start}>"

    def triton(self, codes: str) -> str:
        return f"given{self.stop - self.start}({codes}, constants + {self.start})"

    def triton_code(self, x: str) -> str:
        return f"given_code({x}, constants + {self.start}, {self.stop - self.start})"


def float_bits(x: float) -> int:
    """The bits of `x` as a 32-bit float."""
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32)) & 0xFFFFFFFF


Values = Whole | Float8 | Table | Given
