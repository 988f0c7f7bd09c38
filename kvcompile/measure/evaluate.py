"""`kvcompile eval`: what recipes cost in quality and save in memory, one row a recipe.

Everything is scored with the cache in the loop: a text and the uncompressed model's own greedy
continuation of its prompt are forced through the compressed cache token by token.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.fx import Interpreter
from transformers import PreTrainedModel

from kvcompile.errors import KVCompileError
from kvcompile.ir import ATTEND
from kvcompile.measure.baseline import cache_nbytes, uncompressed
from kvcompile.measure.perplexity import forced_after, prefill
from kvcompile.method import methods
from kvcompile.optimize import optimize
from kvcompile.show import as_text, progress

HF = "Hugging Face"


@dataclass(frozen=True)
class Score:
    """One recipe.

    perplexity       of the text after its first `context` tokens, by forced decode
    agreement        share of the uncompressed model's greedy tokens that are likeliest here too
    alike            greedy tokens up to the first that differs
    attention_error  |o - o'| / |o| of the attention outputs in one decode step, mean of the layers,
                     what earlier layers pass on included; o is what `full` computes
    kv_bytes         of the cache after the prompt; `share` of what 16 bits a number take
    ms_per_token     median of the decode steps
    """

    recipe: str
    perplexity: float | None = None
    agreement: float | None = None
    alike: int | None = None
    attention_error: float | None = None
    kv_bytes: int | None = None
    share: float | None = None
    ms_per_token: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The scores of some recipes on the same tokens; the first is the uncompressed model's."""

    model: str
    context: int
    tokens: int
    scores: Sequence[Score]

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        return {"model": self.model, "context": self.context, "tokens": self.tokens,
                "scores": [{**asdict(s), "note": s.note or None} for s in self.scores]}

    def __str__(self) -> str:
        grid = Table("recipe", "perplexity", "agreement", "alike", "attention error", "KV bytes",
                     "of 16 bits", "ms a token", box=box.SIMPLE, pad_edge=False)
        for column in grid.columns[1:]:
            column.justify = "right"
        for s in self.scores:
            grid.add_row(s.recipe, *(
                "-" if value is None else format(value, form) for value, form in (
                    (s.perplexity, ".3f"), (s.agreement, ".1%"), (s.alike, "d"),
                    (s.attention_error, ".4f"), (s.kv_bytes, ",d"), (s.share, ".1%"),
                    (s.ms_per_token, ".1f"))))
        head = (f"{self.model}: {self.tokens:,} tokens forced through the cache one by one after "
                f"{self.context:,}")
        return "\n".join([head, "", as_text(grid), *(
            f"{s.recipe}: {s.note}" for s in self.scores if s.note)])


def defaults(also: str) -> list[str]:
    """Every known method with its own parameters, and `also`."""
    return list(dict.fromkeys([*methods(), also]))


def evaluate(model: PreTrainedModel, text: Tensor, context: int, recipes: Sequence[str], *,
             name: str = "", lenient: bool = False, compile: bool = True) -> Evaluation:
    """Score `recipes` on `text` [1, T], of which the first `context` tokens are the prompt.

    With `lenient` a recipe that this model refuses is a row with a note instead of an error.
    """
    tokens = text.shape[1] - context - 1
    if context < 1 or tokens < 1:
        raise KVCompileError(f"a text of {text.shape[1]} tokens leaves none to score after "
                             f"{context}")
    with progress("capturing and checking the model"):
        exact = optimize(model, "full", compile=compile)
    ready: dict[str, PreTrainedModel | str] = {}
    for recipe in recipes:
        try:
            ready[recipe] = optimize(exact, recipe, compile=compile)
        except KVCompileError as error:
            if not lenient:
                raise
            ready[recipe] = " ".join(str(error).split())
    with progress("scoring the uncompressed model"):
        prompt = text[:, :context]
        cache, logits = prefill(model, prompt)
        nbytes = _sixteen_bits(model, context)
        own = torch.cat([prompt, _greedy(model, copy.deepcopy(cache), logits, tokens + 1)], 1)
        first = _score(model, HF, cache, text, own, context, nbytes)
        want = _attended(exact, prefill(exact, prompt)[0], text[:, context : context + 1])
    scores = [first]
    for i, (recipe, candidate) in enumerate(ready.items()):
        if isinstance(candidate, str):
            scores.append(Score(recipe, note=candidate))
            continue
        with progress(f"scoring {recipe} ({i + 1} of {len(ready)})"):
            cache, _ = prefill(candidate, prompt)
            got = _attended(candidate, copy.deepcopy(cache), text[:, context : context + 1])
            score = _score(candidate, recipe, cache, text, own, context, nbytes)
            scores.append(replace(score, attention_error=_error(want, got)))
    return Evaluation(name or type(model).__name__, context, tokens, scores)


def _score(model: PreTrainedModel, recipe: str, cache: Any, text: Tensor, own: Tensor,
           context: int, nbytes: int) -> Score:
    held = cache_nbytes(cache)
    greedy = forced_after(model, copy.deepcopy(cache), own, context)
    forced = forced_after(model, cache, text, context)
    alike = [*greedy.hit, False].index(False)
    return Score(recipe, forced.perplexity, sum(greedy.hit) / len(greedy.hit), alike, None, held,
                 held / nbytes, forced.median_ms)


def _sixteen_bits(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of Hugging Face's cache of `tokens` tokens if every number took 16 bits."""
    return sum(layer.nbytes(tokens) for layer in uncompressed(model)) * 2 // model.dtype.itemsize


@torch.no_grad()
def _greedy(model: PreTrainedModel, cache: Any, logits: Tensor, new: int) -> Tensor:
    """[1, new]: the likeliest tokens after a prompt whose last logits are `logits` [1, 1, V]."""
    out = [logits.argmax(-1)]
    while len(out) < new:
        after = model(input_ids=out[-1], past_key_values=cache, use_cache=True)
        out.append(after.logits[:, -1:].argmax(-1))
    return torch.cat(out, 1)


class _Attended(Interpreter):
    """Runs a graph and keeps what every kvc.attend returns."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self.outputs: list[Tensor] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        if target is ATTEND:
            self.outputs.append(out[0].float())
        return out


@torch.no_grad()
def _attended(model: Any, cache: Any, token: Tensor) -> list[Tensor]:
    """The attention outputs of one decode step, layer by layer; `cache` cannot be used further."""
    positions = torch.full_like(token, cache.get_seq_length())
    valid = torch.ones_like(token, dtype=torch.bool)
    run = _Attended(model.kvcompile.program.phases["extend"])
    run.run(token, positions, valid, torch.zeros(1, dtype=torch.long),
            *cache.begin(valid, positions))
    return run.outputs


def _error(want: Sequence[Tensor], got: Sequence[Tensor]) -> float | None:
    """Mean over the layers of |want - got| / |want|; None where the layers are not the same."""
    if [x.shape for x in want] != [x.shape for x in got]:
        return None
    each = [float((a - b).norm() / a.norm()) for a, b in zip(want, got, strict=True)]
    return sum(each) / len(each)
