"""What a compressed cache still finds: keys hidden in prose, asked for before or after compression.

A passkey prompt hides one number, a needle prompt several under names, of which one is asked for.
Query-aware, the question is part of the prompt that is compressed, and its length is given;
query-agnostic, the context is compressed alone and the question follows it.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from kvcompile.errors import KVCompileError
from kvcompile.measure.baseline import cache_nbytes
from kvcompile.measure.prose import prose
from kvcompile.optimize import optimize
from kvcompile.show import as_text, progress

NAMES = ("London", "Cairo", "Lima", "Oslo", "Tokyo", "Paris")


@dataclass(frozen=True)
class Example:
    """Token ids [1, T] of a context and of a question, and the digits of the answer."""

    context: Tensor
    question: Tensor
    answer: str


@dataclass(frozen=True)
class Recall:
    """Shares of examples that were answered, and bytes of the compressed contexts on average."""

    recipe: str
    aware: bool
    passkey: float
    needle: float
    kv_bytes: int


@dataclass(frozen=True)
class Recalls:
    """The scores of some recipes on the same examples; the first is the uncompressed model's."""

    tokens: int
    examples: int
    scores: Sequence[Recall]

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        return {"tokens": self.tokens, "examples": self.examples,
                "scores": [asdict(s) for s in self.scores]}

    def __str__(self) -> str:
        grid = Table("recipe", "question", "passkey", "needle", "KV bytes", box=box.SIMPLE,
                     pad_edge=False)
        for column in grid.columns[2:]:
            column.justify = "right"
        for s in self.scores:
            grid.add_row(s.recipe, "known" if s.aware else "unknown", f"{s.passkey:.0%}",
                         f"{s.needle:.0%}", f"{s.kv_bytes:,}")
        return "\n".join([f"{self.examples} examples of each kind in {self.tokens:,} tokens of "
                          "prose; whether the question is known when the prompt is compressed", "",
                          as_text(grid)])


def example(model: PreTrainedModel, tokenizer: Any, tokens: int, keys: int, seed: int) -> Example:
    """A context of about `tokens` tokens that hides `keys` numbers at random depths."""
    chance = random.Random(seed)
    text = prose(model, tokenizer, tokens, 1000 * seed)
    names = chance.sample(NAMES, keys)
    numbers = [str(chance.randrange(10000, 100000)) for _ in names]
    hide = [f"\n\nThe pass key of {name} is {number}. Remember it.\n\n" if keys > 1 else
            f"\n\nThe pass key is {number}. Remember it. {number} is the pass key.\n\n"
            for name, number in zip(names, numbers, strict=True)]
    parts, cuts = [], sorted(chance.sample(range(tokens // 20, tokens - tokens // 20), keys))
    for start, stop, hidden in zip([0, *cuts], [*cuts, tokens], [*hide, ""], strict=True):
        parts += [text[0, start:stop], _ids(tokenizer, hidden)]
    which = chance.randrange(keys)
    of = f" of {names[which]}" if keys > 1 else ""
    ask = f"\n\nWhat is the pass key{of}? The pass key{of} is"
    return Example(torch.cat(parts)[None], _ids(tokenizer, ask)[None], numbers[which])


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)


def recall(model: PreTrainedModel, tokenizer: Any, recipes: Sequence[str], *, tokens: int,
           examples: int = 4, aware: Sequence[bool] = (True, False), compile: bool = True
           ) -> Recalls:
    """Ask an uncompressed model, and one for each of `recipes`, the same questions."""
    if tokens < 200 or examples < 1:
        raise KVCompileError(f"recall needs at least 200 tokens and one example, not {tokens} and "
                             f"{examples}")
    sets = [[example(model, tokenizer, tokens, keys, seed) for seed in range(examples)]
            for keys in (1, 4)]
    exact = optimize(model, "full", compile=compile)
    scores = []
    for i, recipe in enumerate(["full", *recipes]):
        ours = exact if recipe == "full" else optimize(exact, recipe, compile=compile)
        for known in aware:
            with progress(f"asking {recipe} ({i + 1} of {len(recipes) + 1})"):
                each = [[_ask(ours, tokenizer, e, known) for e in some] for some in sets]
            right = [sum(fine for fine, _ in some) / len(some) for some in each]
            held = [nbytes for some in each for _, nbytes in some]
            scores.append(Recall(recipe, known, right[0], right[1], sum(held) // len(held)))
    return Recalls(tokens, examples, scores)


def _ask(model: Any, tokenizer: Any, e: Example, aware: bool) -> tuple[bool, int]:
    """Whether the answer comes first, and the bytes of the cache before it."""
    from kvcompile.prefill import prefill

    ids = torch.cat([e.context, e.question], 1).to(model.device)
    length = e.question.shape[1]
    held = prefill(model, ids[:, :-1] if aware else e.context, question_length=max(
        0, length - 1) if aware else 0)
    nbytes = cache_nbytes(held)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
                         do_sample=False, past_key_values=copy.deepcopy(held))
    said = tokenizer.decode(out[0, ids.shape[1]:])
    return said.strip().startswith(e.answer), nbytes
