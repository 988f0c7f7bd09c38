"""`kvcompile kernels`: a recipe's GPU kernels, compiled without a GPU, and what they take."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvcompile.backend import gpu, offline
from kvcompile.errors import KVCompileError
from kvcompile.ir import APPEND, ATTEND
from kvcompile.kernels import evict
from kvcompile.method import methods
from kvcompile.plan import runs
from kvcompile.program import Program
from kvcompile.registry import module
from kvcompile.show import as_text
from kvcompile.site import Site

EVICTS = "kvc.evict waits for the device, so that no CUDA graph holds the step"
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
            why = gpu.unsupported(op, site.layout, site.heads, site.q_heads, site.dims, site.dtype,
                                  site.made)
            if why and (op is ATTEND or site.owner is None):
                name = op._schema.name.replace("::", ".")
                found.setdefault(f"{name} runs its plain body: {why}", []).append(site.layer)
        if site.rule and site.store.slots and site.leads and not site.salient and (
                why := evict.waiting(site.store, [site.rule], 1)):
            found.setdefault(f"{EVICTS}: {why}", []).append(site.layer)
    return [f"{runs(layers)} on a GPU: {why}" for why, layers in found.items()]


def every(program: Program) -> Iterator[tuple[str, Site]]:
    """(recipe, site) of every named method with its defaults, alone and with the program's recipe;
    what must see text or a file first, or does not go together, is left out."""
    for name in methods():
        for recipe in (name, f"{name}+{program.recipe}"):
            try:
                sites = program.lower(recipe).sites
            except KVCompileError:
                continue
            yield from ((recipe, site) for site in sites)


def kernels(program: Program, targets: Sequence[str], all_methods: bool = False,
            geometry: tuple[int, int, int] | None = None) -> Kernels:
    """Compile the kernels of a program's decode step; layers that are stored alike share them.

    `all_methods`: those of `every` recipe. `geometry`: query heads, kv heads and their dimension in
    place of the model's.
    """
    shapes = module("kernels", "triton_attend")
    alike: dict[tuple, list[str]] = {}
    own = ((str(site.layer), site) for site in program.sites)
    for label, site in every(program) if all_methods else own:
        if geometry:
            made = site.made and site.made._replace(dim=geometry[2])
            site = replace(site, q_heads=geometry[0], heads=geometry[1], dims=(geometry[2],) * 2,
                           made=made)
        shape = shapes.shape_of(site.layout, site.heads, site.q_heads, site.dims, site.dtype,
                                site.dims[0] ** -0.5, site.window, made=site.made)
        labels = alike.setdefault((site.layout, shape), [])
        labels += [] if label in labels else [label]
    rows, missing = [], []
    sources: dict[str, str] = {}
    for (store, shape), labels in alike.items():
        where = _short(labels) if all_methods else runs([*map(int, labels)])
        which = where if all_methods else where.split(" ", 1)[1]
        for target in targets:
            found, reasons = offline.kernels(store, shape, target)
            reasons = [f"{where}: no kernel for kvc.{reason}" for reason in reasons]
            missing += [reason for reason in reasons if reason not in missing]
            sources |= {one.name: one.text for one in found}
            rows += [(which, offline.compiled(one, target)) for one in found]
    recipe = f"every method, alone and with {program.recipe}" if all_methods else program.recipe
    return Kernels(program.name, str(recipe), rows, missing, sources)


def _short(names: list[str]) -> str:
    """The first of many names, and how many there are beside it."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
