"""The demo: one long text, one recipe, and Hugging Face's own cache beside it, all measured."""

import time
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvcompile.explain import Report, explain
from kvcompile.measure.generate import Run, timed
from kvcompile.measure.perplexity import Forced, forced_decodes
from kvcompile.optimize import optimize
from kvcompile.registry import module
from kvcompile.show import as_text, progress

PROMPT, NEW = 4000, 48  # tokens of the prompt, and generated after it
CONTEXT, STEPS = 2048, 96  # tokens of the held-out text: prompt, and decoded one at a time
PROMPT_AT, HELD_OUT = 12_000, 20_000  # where in the text they start


@dataclass(frozen=True)
class Comparison:
    """A model and its optimized form on the same tokens: (Hugging Face, kvcompile) throughout."""

    report: Report
    text: str
    streamed: bool
    context: int
    runs: tuple[Run, Run]
    forced: tuple[Forced, Forced]
    optimize_s: float
    compile_s: float
    total_s: float

    @property
    def agreement(self) -> int:
        """Forced steps whose likeliest next token is the same."""
        want, got = self.forced
        return sum(a == b for a, b in zip(want.likeliest, got.likeliest, strict=True))

    @property
    def alike(self) -> int:
        """Generated tokens up to the first one that differs."""
        return [*(self.runs[0].new == self.runs[1].new).flatten().tolist(), False].index(False)

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        sides = {
            name: {**run.as_dict(), "perplexity": forced.perplexity,
                   "forced_ms_per_token": forced.median_ms}
            for name, run, forced in zip(("hugging_face", "kvcompile"), self.runs, self.forced,
                                         strict=True)}
        return {**self.report.as_dict(), "text": self.text, **sides, "context": self.context,
                "forced_steps": len(self.forced[0].nll), "agreement": self.agreement,
                "alike": self.alike, "optimize_s": self.optimize_s, "compile_s": self.compile_s,
                "total_s": self.total_s}

    def __str__(self) -> str:
        grid = Table("", "Hugging Face", str(self.report.program.recipe), "ratio", box=box.SIMPLE,
                     pad_edge=False)
        for column in grid.columns[1:]:
            column.justify = "right"
        (theirs, ours), (want, got) = self.runs, self.forced
        steps = len(got.nll)

        def line(what: str, a: float | None, b: float | None, form: str) -> None:
            if a is not None and b is not None:
                grid.add_row(what, format(a, form), format(b, form), f"{b / a:.2f}")

        line(f"KV cache of {ours.cached:,} tokens, bytes", theirs.nbytes, ours.nbytes, ",")
        line(f"perplexity, forced decode of {steps} tokens after {self.context:,}",
             want.perplexity, got.perplexity, ".3f")
        line("ms per token there (median, steps in turn)", want.median_ms, got.median_ms, ".1f")
        line(f"ms per token after {ours.prompt.numel():,} (median, back to back)",
             theirs.ms_per_token, ours.ms_per_token, ".1f")
        line(f"s for the prompt of {ours.prompt.numel():,} tokens", theirs.prefill, ours.prefill,
             ".2f")
        spent = [f"{self.agreement} of {steps} times the likeliest next token of the forced text "
                 "is the uncompressed model's",
                 f"the generated texts are alike for {self.alike} of {ours.new.numel()} tokens",
                 f"optimize {self.optimize_s:.1f} s, compiling {self.compile_s:.1f} s, everything "
                 f"{self.total_s:.0f} s"]
        return "\n".join([*([] if self.streamed else [self.text]), "", self.report.table(), "",
                          as_text(grid), "", *spent])


def demo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: str, *,
         streamer: BaseStreamer | None = None, compile: bool = True) -> Comparison:
    """Continue 4,000 tokens of pydoc's topics; score another part of them by forced decode."""
    topics = module("models", "smollm2").topics_ids
    return compare(model, tokenizer, recipe, topics(tokenizer, PROMPT, skip=PROMPT_AT),
                   topics(tokenizer, CONTEXT + STEPS + 1, skip=HELD_OUT), new=NEW, context=CONTEXT,
                   streamer=streamer, compile=compile)


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, recipe: str,
            prompt: Tensor, text: Tensor, *, new: int, context: int,
            streamer: BaseStreamer | None = None, compile: bool = True) -> Comparison:
    """Generate `new` tokens after `prompt`, and force `text` after its first `context` tokens."""
    start = time.perf_counter()
    with progress("capturing and checking the model"):
        optimized = optimize(model, recipe, compile=compile)
    ready = time.perf_counter()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    with progress("compiling"):  # what a first prompt and a first step wait for
        timed(optimized, prompt[:, :2], None, do_sample=False, max_new_tokens=2, min_new_tokens=2)
    compiled = time.perf_counter()
    with progress("generating with the compressed cache", unless=streamer is not None):
        ours = timed(optimized, prompt, streamer, **options)
    with progress("generating with Hugging Face's cache"):
        theirs = timed(model, prompt, None, **options)
    with progress("scoring the held-out text with both"):
        want, got = forced_decodes([model, optimized], text, context)
    return Comparison(explain(optimized), text_of(ours.new, tokenizer), streamer is not None,
                      context, (theirs, ours), (want, got), ready - start,
                      compiled - ready, time.perf_counter() - start)


def text_of(ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Tokens as text; as numbers where there is no tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    return str(tokenizer.decode(ids, skip_special_tokens=True))
