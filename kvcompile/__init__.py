"""A compiler for the KV cache of causal language models."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "passes").is_dir():  # a checkout: passes/, kernels/ and models/ lie beside us
    __path__.append(str(_here.parent))

from kvcompile.cache import KVCache  # noqa: E402
from kvcompile.calibration.artefacts import Calibration  # noqa: E402
from kvcompile.calibration.calibrate import calibrate, load, save  # noqa: E402
from kvcompile.errors import (  # noqa: E402
    CacheFullError,
    KVCompileError,
    RecipeError,
    UnsupportedModelError,
)
from kvcompile.explain import Report, explain  # noqa: E402
from kvcompile.method import methods  # noqa: E402
from kvcompile.optimize import optimize  # noqa: E402
from kvcompile.prefill import prefill  # noqa: E402
from kvcompile.program import Program, capture  # noqa: E402
from kvcompile.recipe import Recipe  # noqa: E402
from kvcompile.registry import module as _module  # noqa: E402

for _name in ("eager", "evict", "hosted", "linear", "rank", "rest", "select"):  # the ops' bodies
    _module("kernels", _name)

__version__ = "0.1.0"
__all__ = ["CacheFullError", "Calibration", "KVCache", "KVCompileError", "Program", "Recipe",
           "RecipeError", "Report", "UnsupportedModelError", "calibrate", "capture", "explain",
           "load", "methods", "optimize", "prefill", "save"]
