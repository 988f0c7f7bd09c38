"""The C++ text of kvc.evict for one token a row, printed from the planes and the rules."""

from collections.abc import Mapping, Sequence
from math import prod

import torch

from kvcompile.format import PAGE
from kvcompile.kernels.cpp_attend import FOLDER, VECTORS
from kvcompile.kernels.evict import alike, movable, tables
from kvcompile.rule import Rule
from kvcompile.store import Store

FILES = (*VECTORS, FOLDER / "evict.h")


def unsupported(store: Store, rules: Sequence[str]) -> str | None:
    """Why no kernel can be printed; None if one can."""
    if not movable(store):
        return "whole pages leave, by their page tables"
    if store.rest:
        return "what leaves is read and added up"
    for rule in map(Rule.parse, rules):
        if hasattr(rule.budgeter, "below"):
            return f"{rule.budget.name} says token by token what leaves"
        if not getattr(rule.scorer, "cpp", "") or hasattr(rule.scorer, "final"):
            return f"scorer {rule.score.name} is not told in C++"
    return None


def headers() -> tuple[str, ...]:
    """What every kernel's text starts with."""
    return tuple(file.read_text() for file in FILES)


def statements(store: Store, dims: tuple[int, int], dtype: torch.dtype, heads: int,
               rules: Sequence[str], slots: Sequence[int], group: int, threads: int) -> str:
    """The kernel's statements: mass0, .. of the layers that observe, in order, positions, valid
    [B, 1] and plane0.. (all may be written). Rows of layers are done at the same time."""
    specs = [spec.name for spec in store.planes(dims, dtype)]
    plane = {name: f"plane{i}" for i, name in enumerate(specs)}
    table, lines, observed = plane["slots.all.table"], ["const int64_t batch = valid_size[0];"], 0
    moves = _moves(store, dims, dtype, plane)
    for own in alike(rules):
        rule = Rule.parse(rules[own[0]])
        masses = [f"mass{observed + i}" for i in range(len(own))] if rule.observes else []
        observed += len(masses)
        share = rule.recent if isinstance(rule.recent, float) else -1.0
        limits = f"{{{rule.every}, {rule.sinks}, {int(rule.recent)}, {share!r}f}}"
        shared = "true" if getattr(rule.scorer, "shared", False) else "false"
        lines += [
            "{", f"const int64_t slots[] = {{{', '.join(str(slots[i]) for i in own)}}};",
            *_given(masses),
            f"#pragma omp parallel for num_threads({threads})",
            f"for (int64_t i = 0; i < {len(own)} * batch; i++) {{",
            "  const int64_t layer = i / batch, b = i % batch;",
            f"  const int64_t row = (slots[layer] * batch + b) * {heads};",
            "  if (!valid[b]) continue;",
            "  const int64_t position = positions[positions_size[0] > 1 ? b * positions_stride[0] "
            ": 0];",
            f"  kvc::evict_row<{shared}>(kvc::Known<{PAGE}>{{{table} + row * {table}_size[3], "
            f"{plane['slots.all.position']}, {plane['slots.all.score']}}}, {table}_size[3],",
            f"      const_cast<int32_t*>(plane0) + row, {plane['limit']} + row, {heads}, position, "
            f"kvc::Limits{limits},",
            "      [&](long h, long count, float* scores) {",
            *(f"        {line}" for line in _update(rule, heads, group)), "      },",
            "      [&](long h, long to, long from) {", *(f"        {line}" for line in moves),
            "      });", "}", "}"]
    return "\n".join(lines)


def _given(masses: Sequence[str]) -> list[str]:
    """The masses of some layers, and how many places each has for a head."""
    return masses and [f"const float* masses[] = {{{', '.join(masses)}}};",  # type: ignore[return-value]
                       f"const int64_t widths[] = {{{', '.join(f'{m}_size[2]' for m in masses)}}};"]


def _update(rule: Rule, heads: int, group: int) -> list[str]:
    """C++ that makes the scores of a head, the last of which is new, what they are after a step."""
    if not rule.observes:
        return [f"scores[count - 1] = {rule.scorer.cpp};"]
    return [f"const float* got = masses[layer] + (b * {heads} + h) * widths[layer];",
            "const long width = std::min<long>(count, widths[layer]);",
            "long seen = 0;",
            f"for (long n = 0; n < width; n++) seen += got[n] / {group}.0f > 0;",
            "[[maybe_unused]] const float held = (float)std::max(1L, seen);",
            "for (long n = 0; n < count; n++) {",
            f"  [[maybe_unused]] const float score = scores[n], mass = n < width ? got[n] / "
            f"{group}.0f : 0.0f;",
            "  [[maybe_unused]] const bool fresh = n == count - 1;",
            f"  scores[n] = {rule.scorer.cpp};", "}"]


def _moves(store: Store, dims: tuple[int, int], dtype: torch.dtype, plane: Mapping[str, str]
           ) -> list[str]:
    """C++ that copies what is stored of token `from` of head h to the place `to`."""
    lines = []
    for table, planes in tables(store, dims, dtype).items():
        own = plane[table]
        for name, spec in planes.items():
            sizes = (PAGE, spec.dtype.itemsize, prod(spec.shape), spec.lanes,
                     prod(spec.shape[spec.at:]))
            lines.append(f"kvc::move_token<{', '.join(map(str, sizes))}>({plane[name]}, {own} + "
                         f"(row + h) * {own}_size[3], to, from);")
    return lines
