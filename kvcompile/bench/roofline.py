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
CACHED = 512  # tokens of a layer that caches hold: what the kernel computes at best


def rows(settings: Settings) -> Iterator[Row]:
    """Measured / predicted: the streaming bandwidth, and the rate that each kernel reaches on
    tokens that stay in cache, are measured in the same run; all else follows from the format."""
    q_heads, kv_heads, dim = HEADS
    for name in NAMES:
        recipe = RECIPES[name][0]
        site = Site(0, q_heads, kv_heads, (dim, dim), DTYPE, 0,
                    Store.of(plan(recipe, 1)[0].values))
        nbytes, flops = read_bytes(site), attention_flops(site)
        small = Attend(recipe, HEADS, CACHED, 0)
        took = median(in_turn({"ours": small}, 9, burst=5)["ours"]) / small.layers
        rate = float(flops.subs(N, CACHED)) / took
        for tokens in (settings.tokens,) if settings.tokens else CONTEXTS:
            ours, probed = Attend(recipe, HEADS, tokens, settings.mib), len(
                settings.bandwidth.samples)
            times = in_turn({"ours": ours}, 5 if settings.quick else 9, between=settings.bandwidth)
            streaming = 1e9 * median(settings.bandwidth.since(probed))
            expected = 1e3 * max(float(nbytes.subs(N, tokens)) / streaming,
                                 float(flops.subs(N, tokens)) / rate)
            measured = [1e3 * t / ours.layers for t in times["ours"]]
            yield Row("roofline", f"attend {name}, 9/3 heads of 64, {tokens:,} tokens",
                      "ms a layer", measured, "predicted", [expected], inverse=True,
                      target=Target("<=", 1.3),
                      note=f"{median(measured) / expected - 1:+.0%} of the prediction")
