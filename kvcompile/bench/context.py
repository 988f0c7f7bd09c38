"""Cost against context: what the attend kernel takes per compressed byte as the cache grows."""

from collections.abc import Iterator

from kvcompile.bench.attend import HEADS, Attend
from kvcompile.bench.row import Row, Target
from kvcompile.bench.settings import Settings
from kvcompile.bench.timing import in_turn

RECIPE, LENGTHS = "kivi(bits=4)", (8192, 32768, 131072)
LINEAR = 1.1  # times the cost of a byte in the shortest cache


def rows(settings: Settings) -> Iterator[Row]:
    """Picoseconds per stored byte at every length; the peer is the shortest."""
    shape, heads = next(iter(HEADS.items()))
    lengths = [settings.tokens * 4**i for i in range(3)] if settings.tokens else [*LENGTHS]
    if settings.quick:
        lengths = lengths[::2]
    calls = {f"{n:,}": Attend(RECIPE, heads, n, settings.mib) for n in lengths}
    times = in_turn(calls, 3 if settings.quick else 9, between=settings.bandwidth)
    each = {n: [1e12 * t / (call.layers * call.nbytes) for t in times[n]]
            for n, call in calls.items()}
    shortest, *others = each
    for n in others:
        yield Row("context", f"attend {RECIPE}, {shape}, {n} tokens", "ps a byte", each[n],
                  f"{shortest} tokens", each[shortest], inverse=True, target=Target("<=", LINEAR))
