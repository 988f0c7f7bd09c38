"""Discovery: what lies in `passes/`, `kernels/` and in other packages' entry points.

The core knows no pass, format, method or model by name; this is the one place that imports them.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points
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
