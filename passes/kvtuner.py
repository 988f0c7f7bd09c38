"""KVTuner: bits of K and V layer by layer, chosen by what they do to attention's output."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvcompile.calibration.samples import Samples
from kvcompile.calibration.stored_attention import attend, relative
from kvcompile.method import Axes, Method, Param
from kvcompile.passes.methods import groups, kivi_axes, residual
from kvcompile.store import Store

PAIRS = tuple((k, v) for k in (2, 4, 8) for v in (2, 4, 8))  # (bits of K, bits of V)


def _axes(p: Mapping[str, Any]) -> Axes | Sequence[Axes]:
    if p["k"] is None or p["v"] is None:
        return kivi_axes((8, 4), p["group"], p["residual"])  # an example
    return [kivi_axes((k, v), p["group"], p["residual"])
            for k, v in zip(p["k"], p["v"], strict=True)]


def _calibrate(p: Mapping[str, Any], samples: Samples) -> Axes:
    """Section 5: e = |o' - o| / |o| of each layer and pair, a quarter of the text as queries."""
    context = samples.ids.shape[1] * 3 // 4 // p["group"] * p["group"]
    errors = []
    for sample in samples.attention:
        exact = attend(sample, Store.parse("store"), context)
        stores = (Store.of(kivi_axes(pair, p["group"], 0), sample.window) for pair in PAIRS)
        errors.append([relative(attend(sample, store, context), exact) ** 2 for store in stores])
    chosen = choose(errors, [k + v for k, v in PAIRS], int(p["bits"] * 2 * len(errors)))
    k, v = zip(*(PAIRS[i] for i in chosen), strict=True)
    return {"k": k, "v": v}


def choose(errors: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    """One option per layer, so that the errors' sum is least and the costs' sum within `budget`.

    Exact, by dynamic programming over the cost so far.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # cost -> (errors, options)
    for options in errors:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (total, taken) in best.items():
            for i, error in enumerate(options):
                cost, sum_ = spent + costs[i], total + error
                if cost <= budget and sum_ < longer.get(cost, (float("inf"), ()))[0]:
                    longer[cost] = sum_, (*taken, i)
        best = longer
    return list(min(best.values())[1])


METHODS = (Method(
    name="kvtuner",
    title="KVTuner",
    paper="arXiv:2502.04420",
    family="quantization",
    params=(
        Param("bits", 4.0, minimum=2, maximum=8, help="average bits of a stored number"),
        groups("tokens of a channel (K) or channels of a token (V)"),
        residual(default=128, multiple_of="group"),
        Param("k", None, calibrated=True, help="bits of K: 2, 4 or 8 for each layer"),
        Param("v", None, calibrated=True, help="bits of V: 2, 4 or 8 for each layer"),
    ),
    axes=_axes,
    calibrate=_calibrate,
    note="KIVI's storage; pairs of bits minimize the sum of squared relative errors of attention's "
    "output on the calibration text, exactly, where the paper prunes and groups layers and then "
    "searches by the accuracy of the whole model",
),)
