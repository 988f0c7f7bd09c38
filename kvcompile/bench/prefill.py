"""Prefill: a prompt into an empty cache, beside Hugging Face eager, and what compressing takes."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompile.bench.row import Row
from kvcompile.bench.settings import Settings
from kvcompile.bench.timing import in_turn, seconds
from kvcompile.ir import APPEND

RECIPE, PEER = "kivi(bits=4)", "HF eager, DynamicCache"
FASTER, SHARE = 2, 0.1


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds for the prompt, and of them the share of kvc.append."""
    n, rounds = settings.contexts((1024,), (4096,))[0], 2 if settings.quick else 5
    ids = settings.ids(n)
    ours = {recipe: partial(prefill, settings.optimized(recipe), ids)
            for recipe in ((RECIPE,) if settings.quick else (RECIPE, "full"))}
    times = in_turn({**ours, PEER: partial(prefill, settings.loaded[0], ids)}, rounds,
                    between=settings.bandwidth)
    for recipe in ours:
        yield Row("prefill", f"prefill {recipe}, {n:,} tokens", "s", times[recipe], PEER,
                  times[PEER], target=settings.target(">=", FASTER) if recipe == RECIPE else None)
    shares = [_shares(ours[RECIPE]) for _ in range(rounds)]
    yield Row("prefill", f"compressing in prefill {RECIPE}, {n:,} tokens", "s",
              [spent for spent, _ in shares], "the rest of prefill", [rest for _, rest in shares],
              inverse=True, target=settings.target("<=", SHARE))


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> Tensor:
    """The token that follows, with a cache of its own that is then dropped."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1)


def _shares(call: partial) -> tuple[float, float]:
    """(seconds inside kvc.append, seconds of everything else) in one prefill."""
    with _Appends() as watch:
        total = seconds(call)
    return watch.spent, total - watch.spent


class _Appends(TorchDispatchMode):
    """Adds up the seconds of kvc.append; the ops that it is made of are not seen one by one."""

    spent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func is APPEND:
            self.spent += time.perf_counter() - start
        return out
