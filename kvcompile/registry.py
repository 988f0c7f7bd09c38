"""Discovery: what lies in `passes/`, `kernels/` and in other packages' entry points.

The core knows no pass, format, method or model by name; this is the one place that imports them.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def modules(folder: str) -> list[Any]:
    """The imported modules of `kvcompile.<folder>`, in order of their names."""
    package = importlib.import_module(f"kvcompile.{folder}")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"kvcompile.{folder}.{name}") for name in names]


def plugins(folder: str, attribute: str, group: str) -> list[Any]:
    """`attribute` of each module of the folder that has one, then what the entry points load."""
    found = [getattr(m, attribute) for m in modules(folder) if hasattr(m, attribute)]
    return found + [entry.load() for entry in entry_points(group=group)]


def module(folder: str, name: str) -> Any:
    """The module `kvcompile.<folder>.<name>`."""
    return importlib.import_module(f"kvcompile.{folder}.{name}")


SOURCES = (".py", ".h", ".hpp", ".cpp")


@cache
def digest() -> str:
    """A hash of every text that kernels may be printed from: the sources of this package and of the
    packages that extend it."""
    found = sha256()
    for file in sorted(set(_sources())):
        found.update(file.read_bytes())
    return found.hexdigest()


def _sources() -> Iterator[Path]:
    names = {entry.module.partition(".")[0] for group in entry_points().groups
             if group.startswith("kvcompile.") for entry in entry_points(group=group)}
    for name in ("kvcompile", "kvcompile.passes", "kvcompile.kernels", "kvcompile.models", *names):
        spec = find_spec(name)
        if spec is None:                 # loading the entry point says so
            continue
        if spec.origin and not spec.submodule_search_locations:
            yield Path(spec.origin)
            continue
        folders = [Path(spec.origin).parent] if spec.origin else spec.submodule_search_locations
        for folder in map(Path, folders or ()):
            yield from (file for file in folder.rglob("*") if file.suffix in SOURCES)
