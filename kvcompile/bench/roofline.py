"""The roofline's prediction of kvc.attend on this machine, beside what it takes.

What the model is given of the machine is measured in the same run, and never on what it predicts:

- the streaming bandwidth, by a probe between the timed calls;
- each kernel's launch and its rate of operations, on tokens that all lie in a few pages, so that it
  does all its work and memory does none;
- how far reading and computing overlap, on formats that are not predicted.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import median

from kvcompile.bench.attend import DTYPE, RECIPES, Attend
from kvcompile.bench.row import Row, Target
from kvcompile.bench.settings import Settings
from kvcompile.bench.timing import in_turn
from kvcompile.measure.roofline import Device, N, attention_flops, attention_seconds, read_bytes
from kvcompile.plan import plan
from kvcompile.site import Site
from kvcompile.store import Store

HEADS = (9, 3, 64)
NAMES = ("bf16", "int8", "int4, groups of 32")
CONTEXTS = (4096, 32768)
CACHED = (2048, 16384)  # tokens of the two calls that tell a kernel's launch and its rate
PAGES = 4               # in which they lie: a few hundred KB of K and V
OTHERS = ("kivi(bits=2)", "rtn", "fp8")  # which tell the overlap, of so many tokens:
BETWEEN = 16384


def rows(settings: Settings) -> Iterator[Row]:
    """Measured / predicted, and the overlap."""
    rounds = 5 if settings.quick else 9
    share = overlap(settings, rounds)
    yield Row("roofline", "reading and computing overlap", "of the shorter", [share],
              note=f"attend {', '.join(OTHERS)}, {BETWEEN:,} tokens")
    for name in NAMES:
        recipe = RECIPES[name][0]
        contexts = (settings.tokens,) if settings.tokens else CONTEXTS
        here, took = timed(settings, recipe, contexts, rounds)
        model = attention_seconds(site_of(recipe), replace(here, overlap=share))
        for tokens, measured in took.items():
            expected = float(model.subs(N, tokens))
            yield Row("roofline", f"attend {name}, 9/3 heads of 64, {tokens:,} tokens",
                      "ms a layer", [1e3 * t for t in measured], "predicted", [1e3 * expected],
                      inverse=True, target=Target("1 +-", 0.3),
                      note=f"{median(measured) / expected - 1:+.0%} of the prediction")


def site_of(recipe: str) -> Site:
    """A layer of HEADS."""
    q_heads, kv_heads, dim = HEADS
    return Site(0, q_heads, kv_heads, (dim, dim), DTYPE, 0, Store.of(plan(recipe, 1)[0].values))


def timed(settings: Settings, recipe: str, contexts: Sequence[int], rounds: int
          ) -> tuple[Device, dict[int, list[float]]]:
    """The machine as a kernel finds it, and the seconds that a layer of so many tokens takes whose
    K and V come from memory; all in turn, so that they see the same weather."""
    calls = {f"cached {n}": Attend(recipe, HEADS, n, 0, PAGES) for n in CACHED}
    calls |= {str(n): Attend(recipe, HEADS, n, settings.mib) for n in contexts}
    probed = len(settings.bandwidth.samples)
    times = in_turn(calls, rounds, between=settings.bandwidth, burst=3)
    each = {name: [t / calls[name].layers for t in times[name]] for name in calls}
    short, long = (median(each[f"cached {n}"]) for n in CACHED)
    done = [float(attention_flops(site_of(recipe)).subs(N, n)) for n in CACHED]
    rate = (done[1] - done[0]) / max(long - short, 1e-9)
    here = Device("this machine", 1e9 * median(settings.bandwidth.since(probed)), rate,
                  max(0.0, short - done[0] / rate), "measured")
    return here, {n: each[str(n)] for n in contexts}


def overlap(settings: Settings, rounds: int) -> float:
    """Which part of the shorter of reading and computing the longer one hides, over OTHERS."""
    found = []
    for recipe in OTHERS:
        site = site_of(recipe)
        here, took = timed(settings, recipe, (BETWEEN,), rounds)
        found.append((median(took[BETWEEN]) - here.launch,
                      float(read_bytes(site).subs(N, BETWEEN)) / here.bandwidth,
                      float(attention_flops(site).subs(N, BETWEEN)) / here.flops))
    return hidden(found)


def hidden(times: Iterable[tuple[float, float, float]]) -> float:
    """The overlap, 0 to 1, of calls that took so long, of which reading and computing alone would
    have taken so long: of all calls together, since each is measured no better than they are."""
    took, longer, shorter = (sum(x) for x in zip(*(
        (t, max(parts), min(parts)) for t, *parts in times), strict=True))
    return min(1.0, max(0.0, 1 - (took - longer) / shorter))
