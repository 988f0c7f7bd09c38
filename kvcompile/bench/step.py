"""The decode step of a model: ours under several recipes, Hugging Face's caches, and the floor."""

import gc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache, StaticCache

from kvcompile.bench.row import Row
from kvcompile.bench.settings import Settings
from kvcompile.bench.timing import in_turn
from kvcompile.errors import KVCompileError
from kvcompile.measure.baseline import cache_nbytes

RECIPE = "kivi(bits=4)"
RECIPES = {True: (RECIPE, "full"), False: (RECIPE, "kivi(bits=2)", "int8", "full")}  # by quick
QUANTIZED = {"quanto": "optimum.quanto", "hqq": "hqq"}  # transformers' backends: their modules
EAGER, STATIC = "HF eager, DynamicCache", "HF compiled, StaticCache"
FLOOR = 1.5  # times weights and K, V over the streaming bandwidth
FASTER = {4096: 4, 8000: 6}  # than Hugging Face eager, at these lengths
STATIC_AT = 4096  # the one length that it is compiled for
BURST = 3  # steps in a row in each turn


class Decoder:
    """A model and its cache: each call is one greedy step, from token id to token id."""

    def __init__(self, model: Any, forward: Callable | None = None, cache: Any = None) -> None:
        self.model, self.cache = model, cache
        self.forward = forward or model
        self.last = torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def fill(self, ids: Tensor) -> None:
        """Prefill the cache with what `ids` [1, n] holds beyond it."""
        new = ids[:, 0 if self.cache is None else self.cache.get_seq_length() :]
        out = self.model(input_ids=new, past_key_values=self.cache, use_cache=True,
                         logits_to_keep=1)
        self.cache, self.last = out.past_key_values, out.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def __call__(self) -> None:
        out = self.forward(input_ids=self.last, past_key_values=self.cache, use_cache=True)
        self.last = out.logits[:, -1:].argmax(-1)


def rows(settings: Settings) -> Iterator[Row]:
    """One row per recipe and peer at every length, and the floor of each recipe.

    Recipes that `settings` names stand beside the first of them and Hugging Face eager alone.
    """
    rounds = 5 if settings.quick else 10
    steps = 1 + BURST * rounds
    model, _ = settings.loaded
    recipes = settings.recipes or RECIPES[settings.quick]
    few = settings.quick or bool(settings.recipes)
    lengths = settings.contexts((2048,), (512, 2048, 4096, 8000), steps)
    ids = settings.ids(max(lengths))
    ours = {recipe: Decoder(settings.optimized(recipe)) for recipe in recipes}
    theirs = {EAGER: Decoder(model)}
    missing: dict[str, str] = {}
    if settings.quick and not settings.recipes:
        missing = {STATIC: "not with --quick: it compiles for a minute"}
    for backend, name in () if settings.recipes else QUANTIZED.items():
        peer = f"HF eager, QuantizedCache {backend}"
        if settings.quick or _absent(name):
            missing[peer] = "not with --quick" if settings.quick else f"{name} is not installed"
        else:
            theirs[peer] = Decoder(model, cache=QuantizedCache(backend, model.config, nbits=4))
    for n in lengths:
        calls: dict[str, Decoder] = {}
        for name, call in {**ours, **theirs}.items():
            try:
                call.fill(ids[:, :n])
                calls[name] = call
                call()  # compiles what is to be compiled
            except Exception as error:  # noqa: BLE001  # a peer's failure is a row, not the end
                if name in ours or name == EAGER:
                    raise
                missing[name] = _told(error)
                del theirs[name]
        if not few and n == min(lengths, key=lambda n: abs(n - STATIC_AT)):
            try:
                calls[STATIC] = _static(model, theirs[EAGER], steps)
            except Exception as error:  # noqa: BLE001
                missing[STATIC] = _told(error)
        calls = {name: call for name, call in calls.items() if name not in missing}
        nbytes = {name: cache_nbytes(call.cache) for name, call in ours.items()}
        probed = len(settings.bandwidth.samples)
        times = {name: [1e3 * t for t in took] for name, took in in_turn(
            calls, rounds, between=settings.bandwidth, burst=BURST, warm=0).items()}
        stream = settings.bandwidth.since(probed)
        yield from (_beside if settings.recipes else _compare)(settings, n, times, recipes)
        for peer, why in missing.items():
            yield Row("step", _what(RECIPE, n), "ms", times[RECIPE], peer, note=why)
        for recipe in recipes:
            total = weight_bytes(model) + nbytes[recipe]
            yield Row("step", _what(recipe, n), "ms", times[recipe],
                      f"floor: {total / 1e6:.0f} MB streamed",
                      [total / 1e6 / x for x in stream], inverse=True,
                      target=settings.target("<=", FLOOR) if recipe == RECIPE else None)
        del calls
        gc.collect()


def _compare(settings: Settings, n: int, times: dict[str, list[float]],
             recipes: tuple[str, ...]) -> Iterator[Row]:
    """Our recipes beside Hugging Face eager, and the first of them beside everything else."""
    for recipe in recipes:
        factor = FASTER.get(n) if recipe == RECIPE else None
        yield Row("step", _what(recipe, n), "ms", times[recipe], EAGER, times[EAGER],
                  target=settings.target(">=", factor) if factor else None)
    for name, took in times.items():
        if name not in recipes and name != EAGER:
            yield Row("step", _what(RECIPE, n), "ms", times[RECIPE], name, took)
    yield Row("step", _what(RECIPE, n), "ms", times[RECIPE], "full, compiled by us", times["full"],
              target=settings.target(">=", 1) if n >= 2048 else None)


def _beside(settings: Settings, n: int, times: dict[str, list[float]],
            recipes: tuple[str, ...]) -> Iterator[Row]:
    """Each recipe beside Hugging Face eager, and all the others beside the first."""
    for recipe in recipes:
        yield Row("step", _what(recipe, n), "ms", times[recipe], EAGER, times[EAGER])
    for recipe in recipes[1:]:
        yield Row("step", _what(recipe, n), "ms", times[recipe], recipes[0], times[recipes[0]])


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a step reads: all parameters, an embedding only if it is the head."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    unread = table.weight if head is None or head.weight is not table.weight else None
    return sum(p.nbytes for p in model.parameters() if p is not unread)


def _static(model: Any, filled: Decoder, steps: int) -> Decoder:
    """A compiled model on a StaticCache with what `filled` holds and room for `steps` tokens."""
    length = filled.cache.get_seq_length()
    cache = StaticCache(model.config, max_cache_len=length + steps)
    for i, layer in enumerate(filled.cache.layers):
        cache.update(layer.keys, layer.values, i)
    torch._dynamo.reset()  # a length is compiled for itself, as by generate()
    call = Decoder(model, torch.compile(model.forward), cache)
    call.last = filled.last.clone()
    call()  # compiles
    return call


def _what(recipe: str, tokens: int) -> str:
    return f"step {recipe}, {tokens:,} tokens"


def _absent(name: str) -> bool:
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:
        return True


def _told(error: Exception) -> str:
    if isinstance(error, KVCompileError):
        return str(error)
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:200]
