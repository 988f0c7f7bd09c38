"""From a loaded model to its first decoded token, with cold and with warm compiler caches."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import kvcompile
from kvcompile.bench.row import Row
from kvcompile.bench.settings import Settings
from kvcompile.errors import KVCompileError

RECIPE = "kivi(bits=4)"
LIMITS = {"cold": 45, "warm": 10}


def rows(settings: Settings) -> Iterator[Row]:
    """optimize() until the first decoded token, with an empty Inductor cache and then again."""
    repeats = 1 if settings.quick else 2
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in LIMITS}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for name in LIMITS:
                taken[name].append(_started(settings, folder))
    for name, limit in LIMITS.items():
        parts = ", ".join(f"{part} {min(one[part] for one in taken[name]):.1f} s"
                          for part in taken[name][0])
        yield Row("start", f"optimize {RECIPE} to the first decoded token, {name} Inductor cache",
                  "s", [sum(one.values()) for one in taken[name]],
                  target=settings.target("<=", limit), note=parts)


def _started(settings: Settings, folder: str) -> dict[str, float]:
    """What a fresh process says, with its compiler caches in `folder`."""
    root = str(Path(kvcompile.__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "kvcompile.bench.first_token", settings.model, RECIPE,
         str(settings.threads)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise KVCompileError(f"a process of its own failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
