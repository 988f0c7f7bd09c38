"""What kvcompile raises. Every message is one line and says what would be legal."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class KVCompileError(Exception):
    """Base of every error that kvcompile raises on purpose."""


class RecipeError(KVCompileError, ValueError):
    """A recipe cannot be read, names something unknown, or contradicts itself."""


class UnsupportedModelError(KVCompileError):
    """A model or graph that cannot be compiled without changing its answers."""


class CacheFullError(KVCompileError):
    """More tokens than the cache was allocated for."""


class LawError(KVCompileError):
    """A compressed cache or its kernel does not keep the laws (docs/laws.md)."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known word closest to `word`, else ``""``."""
    spelled = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), spelled, n=1)
    return f"; did you mean '{spelled[close[0]]}'?" if close else ""
