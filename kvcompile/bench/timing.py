"""Timing: candidates in turn, so that all of them see the same weather."""

import time
from collections.abc import Callable, Mapping

Call = Callable[[], object]


def seconds(call: Call) -> float:
    """What one call takes, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(calls: Mapping[str, Call], rounds: int, *, between: Call | None = None,
            burst: int = 1, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every call: `rounds` rounds of `burst` calls of each, after `warm` untimed ones.

    Every round starts with another candidate. `between` is called before each candidate's turn,
    untimed: a probe of the memory bandwidth, which also leaves the caches to nobody.
    """
    for call in calls.values():
        for _ in range(warm):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        at = turn % max(len(names), 1)
        for name in names[at:] + names[:at]:
            if between is not None:
                between()
            times[name] += [seconds(calls[name]) for _ in range(burst)]
    return times

