"""Prefill: a prompt into an empty cache, beside Hugging Face eager, and what compressing takes."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcompile.bench.row import Row
from kvcompile.bench.settings import Settings
from kvcompile.bench.timing import in_turn, seconds

RECIPE, PEER = "kivi(bits=4)", "HF eager, DynamicCache"
FASTER, SHARE = 2, 0.1


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds for the prompt, and of them the share of storing K and V."""
    n, rounds = settings.contexts((1024,), (4096,))[0], 2 if settings.quick else 5
    ids = settings.ids(n)
    ours = {recipe: partial(prefill, settings.optimized(recipe), ids)
            for recipe in ((RECIPE,) if settings.quick else (RECIPE, "full"))}
    times = in_turn({**ours, PEER: partial(prefill, settings.loaded[0], ids)}, rounds,
                    between=settings.bandwidth)
    for recipe in ours:
        yield Row("prefill", f"prefill {recipe}, {n:,} tokens", "s", times[recipe], PEER,
                  times[PEER], target=settings.target(">=", FASTER) if recipe == RECIPE else None)
    shares = [_shares(settings.optimized(RECIPE), ids) for _ in range(rounds)]
    yield Row("prefill", f"compressing in prefill {RECIPE}, {n:,} tokens", "s",
              [spent for spent, _ in shares], "the rest of prefill", [rest for _, rest in shares],
              inverse=True, target=settings.target("<=", SHARE))


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> Tensor:
    """The token that follows, with a cache of its own that is then dropped."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1)


def _shares(model: Any, ids: Tensor) -> tuple[float, float]:
    """(seconds of storing, seconds of everything else) in one prefill."""
    alone = model.kvcompile.engine.alone
    before = alone.seconds
    total = seconds(partial(prefill, model, ids))
    return alone.seconds - before, total - (alone.seconds - before)
