"""`kvcompile bench`: what the compiler takes, beside its peers and its targets, in one run."""

import time
from collections.abc import Sequence

import torch

from kvcompile.bench import attend, context, prefill, roofline, start, step
from kvcompile.bench.machine import facts
from kvcompile.bench.report import Result
from kvcompile.bench.row import Row
from kvcompile.bench.settings import Settings
from kvcompile.errors import KVCompileError, nearest
from kvcompile.show import progress

GROUPS = {"attend": attend.rows, "context": context.rows, "step": step.rows,
          "prefill": prefill.rows, "start": start.rows, "roofline": roofline.rows}
ALONE = ("attend", "context", "roofline")  # groups that need no model
SLOW = ("start", "roofline")  # groups that a quick run leaves out unless they are named


def check(groups: Sequence[str]) -> None:
    """Raise KVCompileError for a group of rows that there is not."""
    for name in groups:
        if name not in GROUPS:
            raise KVCompileError(f"unknown rows {name!r}{nearest(name, GROUPS)}; known: "
                                 f"{', '.join(GROUPS)}")


def bench(settings: Settings, groups: Sequence[str] = ()) -> Result:
    """Measure `groups` of rows, all of them (of a quick run, all but the slow) unless named.

    A group that fails is a row with a note. Sets torch's number of threads for the time being.
    """
    check(groups)
    begin, before, threads = time.perf_counter(), facts(settings.threads), torch.get_num_threads()
    default = [name for name in GROUPS if not (settings.quick and name in SLOW)]
    names = [name for name in GROUPS if name in (groups or default)]
    rows: list[Row] = []
    torch.set_num_threads(settings.threads)
    try:
        if set(names) - set(ALONE):
            with progress(f"loading {settings.model}"):
                _ = settings.loaded
        for i, name in enumerate(names):
            with progress(f"measuring {name} ({i + 1} of {len(names)})"):
                try:
                    rows += GROUPS[name](settings)
                except KVCompileError as error:
                    rows.append(Row(name, name, "", note=str(error)))
    finally:
        torch.set_num_threads(threads)
    return Result(rows, before, settings.bandwidth.samples, time.perf_counter() - begin)
