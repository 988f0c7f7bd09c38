"""The roofline's prediction of kvc.attend on this machine, beside what it takes."""

from collections.abc import Iterator
from statistics import median

from kvcompile.bench.attend import DTYPE, RECIPES, Attend
from kvcompile.bench.row import Row, Target
from kvcompile.bench.settings import Settings
from kvcompile.bench.timing import in_turn
from kvcompile.measure.roofline import N, attention_flops, read_bytes
from kvcompile.plan import plan
from kvcompile.site import Site
from kvcompile.store import Store

HEADS = (9, 3, 64)
NAMES = ("bf16", "int8", "int4, groups of 32")
CONTEXTS = (4096, 32768)
CACHED = (512, 2048)  # tokens of a layer that caches hold: what the kernel computes at best


def rows(settings: Settings) -> Iterator[Row]:
    """Measured / predicted: the streaming bandwidth, and what each kernel takes to start and for
    each token that stays in cache, are measured in the same run; all else follows from the format.
    """
    q_heads, kv_heads, dim = HEADS
    for name in NAMES:
        recipe = RECIPES[name][0]
        site = Site(0, q_heads, kv_heads, (dim, dim), DTYPE, 0,
                    Store.of(plan(recipe, 1)[0].values))
        nbytes, flops = read_bytes(site), attention_flops(site)
        small = {str(n): Attend(recipe, HEADS, n, 0) for n in CACHED}
        took = [median(t) / small[n].layers for n, t in in_turn(small, 9, burst=5).items()]
        done = [float(flops.subs(N, n)) for n in CACHED]
        rate = (done[1] - done[0]) / max(took[1] - took[0], 1e-9)
        start = max(0.0, took[0] - done[0] / rate)
        for tokens in (settings.tokens,) if settings.tokens else CONTEXTS:
            ours, probed = Attend(recipe, HEADS, tokens, settings.mib), len(
                settings.bandwidth.samples)
            times = in_turn({"ours": ours}, 5 if settings.quick else 9, between=settings.bandwidth)
            streaming = 1e9 * median(settings.bandwidth.since(probed))
            expected = 1e3 * (start + max(float(nbytes.subs(N, tokens)) / streaming,
                                          float(flops.subs(N, tokens)) / rate))
            measured = [1e3 * t / ours.layers for t in times["ours"]]
            yield Row("roofline", f"attend {name}, 9/3 heads of 64, {tokens:,} tokens",
                      "ms a layer", measured, "predicted", [expected], inverse=True,
                      target=Target("1 +-", 0.3),
                      note=f"{median(measured) / expected - 1:+.0%} of the prediction")
