"""explain(): what a recipe makes of a model, layer by layer, and what its cache takes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from textwrap import fill
from typing import Any

from rich import box
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from kvcompile.between import MANY, covered
from kvcompile.errors import CacheFullError, KVCompileError
from kvcompile.format import PAGE
from kvcompile.measure.baseline import Uncompressed, uncompressed
from kvcompile.optimize import Optimized
from kvcompile.plan import runs
from kvcompile.program import Program, capture
from kvcompile.recipe import Recipe
from kvcompile.rows import Row, layer_rows
from kvcompile.rule import Rule
from kvcompile.show import WIDTH, as_text
from kvcompile.site import Site, groups

TOKENS = 4096  # the length for which str() gives bytes


def explain(model: nn.Module, recipe: str | Recipe | None = None) -> "Report":
    """What `recipe` makes of a model: which passes change which layers, storage, bytes, kernels.

    A plain model is captured (recipe: `full` unless given); optimize() may still refuse it, since
    its self-check runs there. An optimized model shows its own program, or another recipe lowered
    from the same capture.
    """
    if not isinstance(model, Optimized):
        theirs = uncompressed(model) if isinstance(model, PreTrainedModel) else ()
        return Report(capture(model, recipe or "full"), theirs)
    state = model.kvcompile
    program = state.program if recipe is None else state.program.lower(recipe)
    return Report(program, uncompressed(state.model), state.max_length)


class Report:
    """The result of `explain`: `str()` is a table, `rows` its data, one row per layer and pass."""

    def __init__(self, program: Program, baseline: Sequence[Uncompressed],
                 max_length: int | None = None) -> None:
        self.program, self.max_length, self.sites = program, max_length, program.sites
        self.baseline = tuple(baseline) or tuple(
            Uncompressed(site.exact_bytes_per_token, site.window) for site in self.sites)

    @cached_property
    def rows(self) -> list[Row]:
        """What became of every layer, one row per layer and pass, layer by layer."""
        sizes: list[float] = [layer.bytes_per_token for layer in self.baseline]
        if len(sizes) != len(self.sites):  # the model shares K and V among layers
            sizes = [site.exact_bytes_per_token for site in self.sites]
        return layer_rows(self.program, sizes)

    def kv_bytes(self, tokens: int, batch: int = 1) -> int:
        """`KVCache.nbytes` after one call with a prompt of `tokens` tokens in every row.

        At most so many where scores decide how many tokens a head keeps (`bounded`).
        """
        _positive(tokens=tokens, batch=batch)
        reserve = self.max_length or 0
        if reserve and tokens > reserve:
            raise CacheFullError(f"{tokens} tokens exceed max_length={reserve}")
        total = 0
        for layers in groups(self.sites):
            own = [self.sites[i] for i in layers]
            if own[0].rule:
                total += batch * self._selected(own, tokens)
            else:
                total += sum(s.own.nbytes(s.dims, s.dtype, s.heads, [tokens] * batch, reserve)
                             for s in own)
        return total

    @property
    def bounded(self) -> bool:
        """Whether `kv_bytes` is an upper bound."""
        return any(site.rule and not site.salient for site in self.sites)

    def _selected(self, sites: Sequence[Site], tokens: int) -> int:
        """Bytes of a row in a group of layers with rules, at most."""
        most = []
        for site in sites:
            rule = Rule.parse(site.rule)
            each, every = rule.most(tokens, site.heads)
            if self.max_length:  # pages for what may follow
                more = each + self.max_length - tokens
                if rule.every:
                    limit = max(rule.budgeter.limit([each] * site.heads, tokens,
                                                    [0.0] * site.heads))
                    more = min(more, limit + max(PAGE, rule.every))
                each, every = more, site.heads * more
            most.append((each, every))
        widest = max(each for each, _ in most)
        return sum(s.layout.at_most(s.dims, s.dtype, s.heads, each, every, widest)
                   for s, (each, every) in zip(sites, most, strict=True))

    def baseline_kv_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of Hugging Face's own cache after the same call (of K and V for other models)."""
        _positive(tokens=tokens, batch=batch)
        return batch * sum(layer.nbytes(tokens) for layer in self.baseline)

    def __str__(self) -> str:
        return f"{self.table()}\n{self.memory(self.max_length or TOKENS)}"

    def table(self) -> str:
        """Layers whose rows are equal share a block; what repeats within it is left out."""
        table = Table(*("layer", "pass", "outcome", "storage", "bytes/token", "kernel"),
                      box=box.SIMPLE, pad_edge=False)
        for column in table.columns:
            column.overflow = "fold"
        for layers, block in self._blocks():
            for i, row in enumerate(block):
                above = block[i - 1] if i else None
                what = row.what if row.status == "rewritten" else f"{row.status}: {row.what}"
                table.add_row(
                    "" if above else layers, row.name, f"{what} ({row.node})" if row.node else what,
                    "" if above and above.storage == row.storage else row.storage,
                    "" if above and row.before == row.after else f"{row.before:g} -> {row.after:g}",
                    "" if above else row.kernel)
        return "\n".join([f"{self.program.name}, recipe: {self.program.recipe}", "", as_text(table),
                          "", *self._notes()])

    def memory(self, tokens: int, batch: int = 1) -> str:
        """One line: bytes of the cache after `tokens` tokens, uncompressed and by the recipe."""
        full, ours = self.baseline_kv_bytes(tokens, batch), self.kv_bytes(tokens, batch)
        each = f" in each of {batch} rows" if batch > 1 else ""
        share = f" ({ours / full:.1%})" if full else ""
        most = "at most " if self.bounded else ""
        return (f"{tokens:,} tokens{each}: {full:,} bytes uncompressed -> {most}{ours:,} bytes"
                f"{share}")

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        plain = [{"pass" if key == "name" else key: value for key, value in asdict(row).items()}
                 for row in self.rows]
        return {"model": self.program.name, "recipe": str(self.program.recipe),
                "max_length": self.max_length, "rows": plain}

    def to_json(self) -> str:
        """`as_dict` as JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def _blocks(self) -> list[tuple[str, list[Row]]]:
        """(layers in short, the rows of each of them), in order of the first layer."""
        layers: dict[tuple, list[int]] = {}
        for site in self.sites:
            own = [row for row in self.rows if row.layer == site.layer]
            key = tuple(tuple(asdict(row).values())[1:] for row in own)
            layers.setdefault(key, []).append(site.layer)
        return [(runs(which).split(" ", 1)[1], [r for r in self.rows if r.layer == which[0]])
                for which in layers.values()]

    def _notes(self) -> list[str]:
        """`eager body (layers 0-29): why`, for kernels that are not fused; and what runs a prompt
        between its attentions."""
        found: dict[tuple[str, str], set[int]] = {}
        for row in self.rows:
            found.setdefault((row.kernel, row.why), set()).add(row.layer)
        lines = [f"{kernel} ({runs(layers)}): {why}"
                 for (kernel, why), layers in found.items() if why]
        compiled, places = covered(self.program.phases["prefill"])
        rest = "" if compiled == places else (
            f" in {compiled} of {places} places; the others, which no other layer equals or whose "
            "sizes are not of rows and tokens alone, run as torch's operators")
        if places:
            lines.append(f"a prompt of {MANY:,} tokens or more: what lies between attentions is "
                         f"compiled{rest}")
        return [fill(line, WIDTH, subsequent_indent="    ") for line in lines]


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise KVCompileError(f"{name}={value!r}: must be a positive whole number")
