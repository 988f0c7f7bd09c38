"""The C++ text of kvc.append, and of kvc.storable for one token, printed from the formats."""

from functools import cache
from hashlib import sha256

import torch

from kvcompile.format import PAGE
from kvcompile.kernels.cpp_attend import FOLDER, READERS, TIERS, missing, tiers
from kvcompile.kernels.dense import CPP
from kvcompile.store import SIDES, Store

FILES = (*READERS, *(FOLDER / f"{name}.h" for name in (
    "append", "wrapper_writer", "direction_writer", "lowrank_writer")))


def unsupported(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why no kernel can be printed; None if one can."""
    return missing(store, dims, dtype, "cpp_writer", "writer")


@cache
def headers() -> tuple[str, ...]:
    """What every kernel's text starts with."""
    return tuple(file.read_text() for file in FILES)


def functions(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> str:
    """What stands before the kernel's function: the types that a store's tiers are written by."""
    lines = []
    for side, dim in zip(SIDES, dims, strict=True):
        how, up, held = store.side(side), side.upper(), store.written(side)
        for tier in TIERS:
            writer = "None"
            if tier in held:
                writer = store.format(side, tier).cpp_writer(  # type: ignore[attr-defined]
                    dim * store.members, dtype, side)
            lines.append(f"using {up}{tier.capitalize()} = {writer};")
        rings = ", ".join(str((store.ring(side, t) or 0) // PAGE) for t in ("body", "recent"))
        lines.append(f"using {up}Queue = Queue<{store.sinks}, {store.window}, {store.grain}, "
                     f"{how.block}, {how.lag}, {rings}>;")
    text = "\n".join(lines)
    return f"namespace kvc::{_name(store, dims, dtype)} {{\n{text}\n}}"


def statements(store: Store, dims: tuple[int, int], dtype: torch.dtype, heads: int,
               slots: list[int], threads: int, by_head: bool = False) -> str:
    """The kernel's statements: k0, v0, .. of the layers `slots`, of members one after another,
    valid [B, S] (or `by_head`, [B, H, S]) and plane0.. (the count first, all written). Tokens of a
    head are stored one after another; heads, and K and V, at the same time."""
    number, members, pointer = len(slots), store.members, f"const {_cpp(dtype)}*"
    per = len(store.sides)
    name = f"kvc::{_name(store, dims, dtype)}::"
    number_of, row = ("valid_size[2]", "(b * heads + h)") if by_head else ("valid_size[1]", "b")
    lines = [f"const int64_t batch = valid_size[0], tokens = {number_of}, heads = {heads};",
             f"const int64_t slots[] = {{{', '.join(map(str, slots))}}};"]
    for side in SIDES:
        names = ", ".join(f"({pointer}){side}{i}" for i in range(number * members))
        lines.append(f"{pointer} {side}_at[] = {{{names}}};")
        for d, what in enumerate(("row", "head", "token")):
            strides = ", ".join(f"{side}{i}_stride[{d}]" for i in range(number * members))
            lines.append(f"const int64_t {side}_{what}[] = {{{strides}}};")
    lines += [f"#pragma omp parallel for num_threads({threads})",
              f"for (int64_t i = 0; i < {per} * {number} * batch * heads; i++) {{",
              f"  const int64_t layer = i / {per} / batch / heads, b = i / {per} / heads % batch,",
              f"      h = i / {per} % heads, place = (slots[layer] * batch + b) * heads + h;",
              "  kvc::Tier " + ", ".join(f"{s}_{t}{{}}" for s in SIDES for t in TIERS) + ";"]
    lines += ["  " + line for line in tiers(store, dims, dtype, "", "place")]
    lines += ["  int64_t count = plane0[place];", "  for (int64_t t = 0; t < tokens; t++) {",
              f"    if (!valid[{row} * tokens + t]) continue;"]
    for side, dim in zip(store.sides, dims, strict=False):
        up = side.upper()
        types = ", ".join(f"{name}{up}{part}" for part in ("Queue", "Sinks", "Body", "Recent"))
        lines += [
            f"    {'else' if side == 'v' else f'if (i % {per} == 0)'} {{",
            f"      {pointer} x[{members}];",
            f"      for (int64_t m = 0, j = layer * {members}; m < {members}; m++, j++)",
            f"        x[m] = {side}_at[j] + b * {side}_row[j] + h * {side}_head[j] + "
            f"t * {side}_token[j];",
            f"      kvc::append_one<{types}, {dim}, {members}>({side}_sinks, {side}_body, "
            f"{side}_recent, count, x);", "    }"]
    lines += ["    count++;", "  }", "}",
              f"for (int64_t i = 0; i < {number} * batch * heads; i++) {{",
              "  [[maybe_unused]] const int64_t b = i / heads % batch, h = i % heads;",
              "  int64_t more = 0;",
              f"  for (int64_t t = 0; t < tokens; t++) more += valid[{row} * tokens + t];",
              "  const_cast<int32_t&>(plane0[(slots[i / heads / batch] * batch + b) * heads + "
              "i % heads]) += more;", "}"]
    return "\n".join(lines)


def check(dtypes: list[torch.dtype], k_limits: list[float], v_limits: list[float]) -> str:
    """kvc.storable's statements: k0, v0, .. [B, H, 1, D] -> bool out[layer]."""
    lines = ["auto fine = [](const auto* x, const auto* size, const auto* stride, float limit) {",
             "  bool ok = true;",
             "  for (int64_t b = 0; b < size[0]; b++) for (int64_t h = 0; h < size[1]; h++)",
             "    for (int64_t d = 0; d < size[3]; d++)",
             "      ok &= std::fabs(kvc::read(x + b * stride[0] + h * stride[1] + d)) <= limit;",
             "  return ok;", "};"]
    for i, dtype in enumerate(dtypes):
        pointer, both = f"const {_cpp(dtype)}*", []
        for side, limit in (("k", k_limits[i]), ("v", v_limits[i])):
            name = f"{side}{i}"
            both.append(f"fine(({pointer}){name}, {name}_size, {name}_stride, {limit!r})")
        lines.append(f"out[{i}] = {' && '.join(both)};")
    return "\n".join(lines)


def _name(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> str:
    """A name of its own for every kernel: several may stand in one file."""
    return "append" + sha256(repr((str(store), dims, dtype)).encode()).hexdigest()[:12]


def _cpp(dtype: torch.dtype) -> str:
    return "float" if dtype is torch.float32 else f"kvc::{CPP[dtype]}"
