"""A compiler for the KV cache of causal language models."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "passes").is_dir():  # a checkout: passes/, kernels/ and models/ lie beside us
    __path__.append(str(_here.parent))
