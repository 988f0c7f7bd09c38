"""`kvcompile kernels`: a recipe's GPU kernels, compiled without a GPU, and what they take."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvcompile.backend import gpu, offline
from kvcompile.ir import APPEND, ATTEND
from kvcompile.plan import runs
from kvcompile.program import Program
from kvcompile.registry import module
from kvcompile.show import as_text

EVICTS = ("kvc.evict waits for the device to learn which heads are full, so that no CUDA graph "
          "holds the step")
COLUMNS = ("registers", "spills", "local", "shared", "code_load", "mma")


@dataclass(frozen=True)
class Kernels:
    """The kernels of some layers for some targets: `str()` is a table."""

    name: str
    recipe: str
    rows: list[tuple[str, offline.Compiled]]   # (layers, kernel)
    missing: list[str]                         # `layers: why there is none`
    sources: dict[str, str]

    def __str__(self) -> str:
        table = Table("layers", "kernel", "target", *COLUMNS, box=box.SIMPLE, pad_edge=False)
        for layers, one in self.rows:
            figures = [one.failed] if one.failed else [str(getattr(one, c)) for c in COLUMNS]
            table.add_row(layers, one.kernel, one.target, *figures)
        note = ("registers of a thread; spills: loads and stores of spilled registers; bytes of "
                "local memory, of shared\nmemory, and of the widest load of packed codes; "
                "mma: matrix instructions")
        return "\n".join([f"{self.name}, recipe: {self.recipe}", "", as_text(table), note,
                          *self.missing])

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types, without assembly."""
        return {"model": self.name, "recipe": self.recipe, "missing": self.missing,
                "kernels": [{"layers": layers, **one.as_dict()} for layers, one in self.rows]}

    def write(self, folder: Path) -> None:
        """Each kernel's source and what its target's compiler made of it, as files."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernels.json").write_text(json.dumps(self.as_dict(), indent=2))
        for name, text in self.sources.items():
            (folder / f"{name}.py").write_text(text)
        for _, one in self.rows:
            for kind, content in (one.assembly or {}).items():
                file = folder / f"{one.kernel}.{one.target.replace(':', '-')}.{kind}"
                if isinstance(content, bytes):
                    file.write_bytes(content)
                elif kind in ("ttir", "ptx", "amdgcn"):
                    file.write_text(content)


def fallbacks(program: Program) -> list[str]:
    """`layers: what runs as a plain body on a GPU, and why`, where a kernel is missing."""
    found: dict[str, list[int]] = {}
    for site in program.sites:
        for op in (ATTEND, APPEND):
            why = gpu.unsupported(op, site.store, site.heads, site.q_heads, site.dims, site.dtype)
            if op is ATTEND and (site.rebuilt or site.rotated):
                why = gpu.REBUILT
            if why and (op is ATTEND or site.owner is None):
                name = op._schema.name.replace("::", ".")
                found.setdefault(f"{name} runs its plain body: {why}", []).append(site.layer)
        if site.rule and site.store.slots and site.leads:
            found.setdefault(EVICTS, []).append(site.layer)
    return [f"{runs(layers)} on a GPU: {why}" for why, layers in found.items()]


def kernels(program: Program, targets: Sequence[str]) -> Kernels:
    """Compile the kernels of a program's decode step; layers that are stored alike share them."""
    shapes = module("kernels", "triton_attend")
    alike: dict[tuple, list[int]] = {}
    for site in program.sites:
        shape = shapes.shape_of(site.store, site.heads, site.q_heads, site.dims, site.dtype,
                                site.dims[0] ** -0.5, site.window)
        rebuilt = site.rebuilt or site.rotated
        alike.setdefault((site.store, shape, rebuilt), []).append(site.layer)
    rows, missing, sources = [], [], {}
    for (store, shape, rebuilt), layers in alike.items():
        which = runs(layers).split(" ", 1)[1]
        found, reasons = offline.kernels(store, shape)
        if rebuilt:
            found, reasons = found[1:], [f"attend: {gpu.REBUILT}", *reasons]
        missing += [f"layers {which}: no kernel for kvc.{reason}" for reason in reasons]
        for one in found:
            sources[one.name] = one.text
            rows += [(which, offline.compiled(one, target)) for target in targets]
    return Kernels(program.name, str(program.recipe), rows, missing, sources)
