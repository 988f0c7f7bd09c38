"""The C++ text of kvc.attend for one query per row, printed from a store's formats."""

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvcompile.checks.rounding import Arithmetic
from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, term_of
from kvcompile.format import Side as SideName
from kvcompile.kernels.dense import CPP
from kvcompile.kernels.rebuild import Made
from kvcompile.store import SIDES, Store

FOLDER = Path(__file__).parent / "cpp"
VECTORS = tuple(FOLDER / f"{name}.h" for name in ("vector", "avx512", "halves", "numbers"))
READERS = (*VECTORS, *(FOLDER / f"{name}.h" for name in (
    "coded", "dense", "latent", "wrapper", "direction", "subspace", "tail", "tier")))
FILES = (*READERS, FOLDER / "rebuild.h", FOLDER / "attend.h")
TIERS = ("sinks", "body", "recent")
MOST = 1024  # channels of a head


class Shape(NamedTuple):
    """What a kernel is printed for, beside the store."""

    heads: int                  # kv heads
    queries: int                # query heads that share a kv head
    dims: tuple[int, int]       # Dk, Dv
    dtype: torch.dtype          # of q, k, v and the output
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    mass: bool = False          # whether the weight of each token is asked for
    stored: bool = True         # whether anything is stored: in a prompt nothing is
    made: Made | None = None    # where keys are rebuilt at read; `dims` are those of what is stored


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    """How the kernels compute. For 16-bit models q and weights are rounded to 16-bit integers of
    the largest among them, and 2^x is right to 3e-6."""
    if dtype is torch.float32:
        return Arithmetic()
    return Arithmetic(weights=4 * 3e-6, out=torch.finfo(dtype).eps / 2, q=1 / 65534, p=1 / 65534)


def unsupported(store: Store, shape: Shape) -> str | None:
    """Why no kernel can be printed; None if one can."""
    why = missing(store, shape.dims, shape.dtype, "cpp" if store.members == 1 else "cpp_member",
                  "reader")
    for tier in store.tiers("k") if store.v_in_k and not why else ():
        fmt = store.format("k", tier)
        if not hasattr(fmt, "cpp_in_k"):
            return f"format {fmt.name} has no C++ reader of V inside of K"
    return why


def missing(store: Store, dims: tuple[int, int], dtype: torch.dtype, attribute: str, what: str
            ) -> str | None:
    """Why a tier has no C++ reader or writer, which `attribute` of its format names; or None."""
    if dtype not in CPP:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    for side, dim in zip(SIDES, dims, strict=True):
        if dim % 16 or dim > MOST:
            return f"head dimension {dim} is not a multiple of 16 up to {MOST}"
        for tier in store.tiers(side):
            fmt = store.format(side, tier)
            if not hasattr(fmt, attribute):
                return f"format {fmt.name} has no C++ {what}"
            try:
                if what == "reader":
                    reader(store, side, tier, dim, dtype)
                else:
                    getattr(fmt, attribute)(dim * store.members, dtype, side)
            except RecipeError as error:
                return f"{term_of(fmt)}: {error}"
    return None


def reader(store: Store, side: SideName, tier: str, dim: int, dtype: torch.dtype
           ) -> tuple[str, list[int]]:
    """The C++ type that reads one layer's `dim` channels of a tier, and how far one of several
    members is from the one before in each plane."""
    fmt = store.format(side, tier)
    if store.members == 1:
        return fmt.cpp(dim, dtype, side), []  # type: ignore[attr-defined]
    return fmt.cpp_member(dim, store.members, dtype, side)  # type: ignore[attr-defined]


@cache
def headers() -> tuple[str, ...]:
    """What every kernel's text starts with."""
    return tuple(file.read_text() for file in FILES)


def statements(store: Store, shape: Shape, threads: int, lse: bool = False) -> str:
    """The statements: q, k, v, valid, sinks, plane0.., slot -> out, mass and, with `lse`, that.

    Planes hold all layers of a group, the count first; `slot` points to the layer's number, and
    `member`, where a slot holds several, to the one that attends. `<name>_size` and `_stride` are
    the sizes and strides of a tensor.
    """
    own = name(store, shape, threads)
    lines = ["const int64_t batch = q_size[0];", f"using Config = kvc::{own};",
             "Config::Tiers tiers;",
             *tiers(store, shape.dims, shape.dtype, "tiers.", "slot[0] * batch * Config::H",
                    "member[0]" if store.members > 1 else "")]
    lines += [f"const auto* {x}_ = (const Config::T*){x};" for x in "qkv"]
    lines += ["auto* out_ = (Config::T*)out;",
              "kvc::attend<Config, Config::T>(tiers, plane0 + slot[0] *"
              f" batch * Config::H, valid, {'sinks' if shape.sinks else 'nullptr'}, batch,",
              "    const_cast<float*>(mass), mass_size[2]," if shape.mass else "    nullptr, 0,"]
    lines[2:2] = _widened(shape)
    lines += [f"    [&](long b, long h) {{ return {x}_ + b * {x}_stride[0] + h * {x}_stride[1]; }},"
              for x in "qkv"]
    lines += ["    [&](long b, long h) { return out_ + (b * Config::H * Config::G + h) * "
              "Config::DV; },",
              f"    {'const_cast<float*>(lse)' if lse else 'nullptr'}, "
              f"[&](long b, long h) {{ {_making(shape)} }});"]
    return "\n".join(lines)


def _widened(shape: Shape) -> list[str]:
    """Bases and offsets as fp32, once a call."""
    sizes = {"basis": "Config::H * Config::KEYS * Config::DQ * Config::DK",
             "offset": "Config::H * Config::KEYS * Config::DQ"}
    lines = []
    for name in (n for n in sizes if shape.made and getattr(shape.made, n)):
        lines += [f"static thread_local std::vector<float> {name}_({sizes[name]});",
                  f"for (size_t i = 0; i < {name}_.size(); i++) "
                  f"{name}_[i] = kvc::read((const Config::P*){name} + i);",
                  f"const float* {name}_at = {name}_.data();"]
    return lines


def _making(shape: Shape) -> str:
    """Statements that return what the keys of row `b` and kv head `h` are made of."""
    made, lines = shape.made, ["kvc::Making<Config> m;"]
    if made and made.basis:
        lines.append("m.basis = basis_at + h * Config::KEYS * Config::DQ * Config::DK;")
    if made and made.offset:
        lines.append("m.offset = offset_at + h * Config::KEYS * Config::DQ;")
    if made and made.rotary:
        lines += [f"m.{x} = (const Config::A*){x} + (cos_size[0] > 1 ? b * {x}_stride[0] : 0);"
                  for x in ("cos", "sin")]
        lines.append("m.numbers = cos_size[2];")
    return " ".join([*lines, "return m;"])


def config(store: Store, shape: Shape, threads: int) -> str:
    """The struct that instantiates `kvc::attend`; raises RecipeError where there is no kernel."""
    why = unsupported(store, shape)
    if why:
        raise RecipeError(f"{store}: {why}")
    lines = [
        f"static constexpr int H = {shape.heads}, G = {shape.queries}, DK = {shape.dims[0]}, "
        f"DV = {shape.dims[1]}, THREADS = {threads};",
        f"static constexpr long SINKS = {store.sinks}, WINDOW = {store.window}, "
        f"GRAIN = {store.grain}, SEEN = {shape.window};",
        f"static constexpr float SCALE = {float(shape.scale)!r}f, "
        f"SOFTCAP = {float(shape.softcap)!r}f;",
        f"static constexpr bool HAS_SINKS = {_bool(shape.sinks)}, "
        f"ROUGH = {_bool(shape.dtype is not torch.float32)}, MASS = {_bool(shape.mass)}, "
        f"STORED = {_bool(shape.stored)};",
        f"using T = {number(shape.dtype)};",
        *_made(shape.made or Made(shape.dims[0]), shape.made is not None, store),
    ]
    for side, dim in zip(SIDES, shape.dims, strict=True):
        how, up = store.side(side), side.upper()
        lines.append(f"static constexpr long {up}_BLOCK = {how.block}, {up}_LAG = {how.lag};")
        for tier in TIERS:
            source = "k" if store.v_in_k else side
            held = tier in store.tiers(source)
            cpp = "None"
            if held and source != side:
                fmt: Any = store.format(source, tier)
                cpp = fmt.cpp_in_k(shape.dims[0], dim, shape.dtype)
            elif held:
                cpp = reader(store, side, tier, dim, shape.dtype)[0]
            lines.append(f"using {up}{tier.capitalize()} = {cpp};")
            if tier != "sinks":
                ring = store.ring(source, tier) if held else None
                lines.append(f"static constexpr long {up}_{tier.upper()}_RING = "
                             f"{0 if ring is None else ring // PAGE};")
    every = ", ".join(f"{side}_{tier}" for side in SIDES for tier in TIERS)
    lines.append(f"struct Tiers {{ kvc::Tier {every}; }};")
    text = "\n    ".join(lines)
    own = name(store, shape, threads)
    return f"namespace kvc {{\nstruct {own} {{\n    {text}\n}};\n}}"


def _made(made: Made, is_made: bool, store: Store) -> list[str]:
    """What the config says of keys that are made."""
    return [f"static constexpr int DQ = {made.dim}, KEYS = {made.keys}, ROTARY = {made.rotary};",
            f"static constexpr bool MADE = {_bool(is_made)}, BASIS = {_bool(made.basis)}, "
            f"OFFSET = {_bool(made.offset)}, HALVES = {_bool(made.style == 'half')}, "
            f"SHIFTED = {_bool(store.side_by_side)};",
            f"using A = {number(made.angles)};", f"using P = {number(made.parts)};"]


def number(dtype: torch.dtype) -> str:
    """The C++ type of numbers of the model's dtype."""
    return "float" if dtype is torch.float32 else f"kvc::{CPP[dtype]}"


def name(store: Store, shape: Shape, threads: int) -> str:
    """A name of its own for every kernel: several may stand in one file."""
    return "Attend" + sha256(repr((str(store), shape, threads)).encode()).hexdigest()[:12]


def tiers(store: Store, dims: tuple[int, int], dtype: torch.dtype, prefix: str, start: str,
          member: str = "") -> list[str]:
    """C++ that fills the `Tier` of every tier from the planes; tables begin at entry `start`.

    `member` says in C++ which of the store's members is read.
    """
    lines, at = [], 1
    for side, dim in zip(SIDES, dims, strict=True):
        for tier in store.tiers(side):
            name = f"{prefix}{side}_{tier}"
            count = len(store.format(side, tier).planes(dim * store.members, dtype, side))
            apart = reader(store, side, tier, dim, dtype)[1] if member else [0] * count
            lines += [f"{name}.pages = plane{at}_size[3];",
                      f"{name}.table = plane{at} + ({start}) * {name}.pages;"]
            lines += [f"{name}.plane[{i}] = plane{at + 1 + i}"
                      + (f" + {member} * {n};" if n else ";") for i, n in enumerate(apart)]
            at += 1 + count
    if store.constants:
        lines += [f"{prefix}{side}_{tier}.plane[kvc::CONSTANTS] = plane{at} + ({start}) * "
                  f"{store.constants};" for side in store.sides for tier in store.tiers(side)]
    if store.v_in_k:
        lines += [f"{prefix}v_{tier} = {prefix}k_{tier};" for tier in store.tiers("k")]
    return lines


def _bool(value: bool) -> str:
    return "true" if value else "false"
