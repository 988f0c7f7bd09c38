"""How long a decode step must take: bytes, operations and launches, over what a device can do.

    t(n) = both(weights / bandwidth, their flops / peak) + both(KV(n) / bandwidth, its flops / peak)
           + launches * launch
    both(r, c) = max(r, c) + (1 - overlap) min(r, c)

with n tokens in every row's cache, as sympy expressions of n (Williams, Waterman, Patterson, 2009).
Where reading and computing overlap wholly, as data sheets are taken to promise, it is a bound:
kernels that reach neither the bandwidth nor the peak take longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sympy as sp
import torch
from rich import box
from rich.table import Table
from torch.fx import Graph, Node

from kvcompile.errors import KVCompileError, nearest
from kvcompile.format import bits_per_element
from kvcompile.program import Program
from kvcompile.show import as_text
from kvcompile.site import Site, groups
from kvcompile.store import SIDES, Store

N = sp.Symbol("n", nonnegative=True)  # tokens in the cache of a row
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
GEMMS = ("linear", "mm", "addmm", "bmm", "matmul")


@dataclass(frozen=True)
class Device:
    """Bytes and 16-bit matrix operations a second, dense, seconds between launches, and which part
    of the shorter of reading and computing the longer one hides."""

    name: str
    bandwidth: float
    flops: float
    launch: float
    source: str
    overlap: float = 1.0

    def seconds(self, nbytes: Any, flops: Any) -> sp.Expr:
        """Of reading so many bytes and computing."""
        read, compute = sp.sympify(nbytes) / self.bandwidth, sp.sympify(flops) / self.flops
        longer = sp.Max(read, compute)
        return longer if self.overlap == 1 else longer + (1 - self.overlap) * sp.Min(read, compute)


# a launch inside a CUDA (HIP) graph is taken as 2 microseconds; it is no data sheet's figure
DEVICES = {
    "a100": Device("A100 SXM 80 GB", 2039e9, 312e12, 2e-6,
                   "NVIDIA A100 data sheet: 2,039 GB/s, 312 TFLOP/s BF16"),
    "h100": Device("H100 SXM 80 GB", 3350e9, 989.4e12, 2e-6,
                   "NVIDIA H100 data sheet: 3.35 TB/s, 989.4 TFLOP/s BF16 without sparsity"),
    "mi300x": Device("MI300X 192 GB", 5300e9, 1307.4e12, 2e-6,
                     "AMD MI300X data sheet: 5.3 TB/s, 1,307.4 TFLOP/s BF16"),
}


def device(name: str) -> Device:
    """One of DEVICES; KVCompileError for others."""
    if name not in DEVICES:
        raise KVCompileError(f"unknown device {name!r}{nearest(name, DEVICES)}; known: "
                             f"{', '.join(DEVICES)}")
    return DEVICES[name]


def tier_tokens(store: Store, side: str) -> dict[str, sp.Expr]:
    """tier -> tokens it holds after n, the recent one between two flushes on average."""
    how = store.side(side)
    kept = sp.Min(N, store.sinks + store.window) if store.window else N
    sinks = sp.Min(N, store.sinks)
    waiting = how.lag + sp.Rational(how.block - 1, 2) if how.delayed else sp.Integer(0)
    recent = sp.Min(kept - sinks, waiting)
    return {"sinks": sinks, "recent": recent, "body": kept - sinks - recent}


def read_bytes(site: Site) -> sp.Expr:
    """What one layer reads of a row's cache in a step."""
    total, members = sp.Integer(0), site.store.members
    for side, dim in zip(SIDES, site.dims, strict=True):
        if side not in site.store.sides:  # it is part of the other
            continue
        for tier, tokens in tier_tokens(site.store, side).items():
            fmt = site.store.format(side, tier)
            bits = bits_per_element(fmt, dim * members, site.dtype, side)
            total += site.heads * tokens * dim * sp.nsimplify(bits) / 8
    return total


def attention_flops(site: Site) -> sp.Expr:
    """Multiplications and additions of one query token with a row's cache."""
    kept = sum(tier_tokens(site.store, "k").values())
    return 2 * site.q_heads * sum(site.dims) * kept


def attention_seconds(site: Site, on: Device) -> sp.Expr:
    """Of one layer's kvc.attend for one query token of a row, by one launch."""
    return on.launch + on.seconds(read_bytes(site), attention_flops(site))


@dataclass(frozen=True)
class Step:
    """A program's decode step for `batch` rows."""

    program: Program
    batch: int = 1

    @cached_property
    def weights(self) -> list[torch.Tensor]:
        """The matrices that a step multiplies by; a table that is only looked up is none."""
        graph, owner = self.program.graph_module.graph, self.program.graph_module
        found: dict[int, torch.Tensor] = {}
        for node in graph.nodes:
            if node.op != "get_attr" or all("embedding" in str(user.target) for user in node.users):
                continue
            value: Any = owner
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.is_floating_point():
                found[id(value)] = value
        return list(found.values())

    @property
    def weight_bytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.weights)

    @property
    def weight_flops(self) -> int:
        return 2 * self.batch * sum(w.numel() for w in self.weights)

    @cached_property
    def kv_bytes(self) -> sp.Expr:
        """Of n, all layers and rows; layers that read another's cache read it again."""
        return self.batch * sum(read_bytes(site) for site in self.program.sites)

    @cached_property
    def kv_flops(self) -> sp.Expr:
        return self.batch * sum(attention_flops(site) for site in self.program.sites)

    @cached_property
    def launches(self) -> int:
        """Matrix products; one fused kernel before each input of theirs; kvc.attend's two kernels
        a layer; stacking K and V, kvc.append's two kernels and the count of a group."""
        products = _products(self.program.graph_module.graph)
        inputs = {node.args[0] for node in products}
        return (len(products) + len(inputs) + 2 * len(self.program.sites)
                + 5 * len(groups(self.program.sites)))

    def seconds(self, on: Device) -> sp.Expr:
        """Of n."""
        return (on.seconds(self.weight_bytes, self.weight_flops)
                + on.seconds(self.kv_bytes, self.kv_flops) + self.launches * on.launch)


def _products(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "call_function"
            and getattr(n.target, "__name__", "").split(".")[0] in GEMMS]


@dataclass(frozen=True)
class Roofline:
    """Predicted steps at some contexts: `str()` is a table."""

    step: Step
    on: Device
    contexts: Sequence[int] = CONTEXTS

    @cached_property
    def rows(self) -> list[dict[str, float]]:
        """For each context: KV bytes and flops of a step, and milliseconds."""
        step, seconds = self.step, self.step.seconds(self.on)
        return [{"tokens": n, "kv_bytes": float(step.kv_bytes.subs(N, n)),
                 "kv_flops": float(step.kv_flops.subs(N, n)),
                 "ms": 1e3 * float(seconds.subs(N, n))} for n in self.contexts]

    def __str__(self) -> str:
        table = Table("tokens", "KV read", "attention", "ms a token", box=box.SIMPLE,
                      pad_edge=False)
        for row in self.rows:
            table.add_row(f"{row['tokens']:,.0f}", f"{row['kv_bytes'] / 1e6:,.1f} MB",
                          f"{row['kv_flops'] / 1e9:,.2f} GFLOP", f"{row['ms']:.3f}")
        step = self.step
        head = (f"Roofline of a decode step on {self.on.name} ({self.on.source}):\n"
                f"weights {step.weight_bytes / 1e6:,.1f} MB, {step.weight_flops / 1e9:,.2f} GFLOP; "
                f"{step.launches} launches")
        return f"{head}\n\n{as_text(table)}"

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types; `formula` is seconds of n."""
        return {"device": self.on.name, "source": self.on.source,
                "weight_bytes": self.step.weight_bytes, "weight_flops": self.step.weight_flops,
                "launches": self.step.launches, "rows": self.rows,
                "formula": str(self.step.seconds(self.on))}

    def plot(self, file: Path, beside: "Roofline | None" = None) -> None:
        """Milliseconds against context, and those of another recipe."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise KVCompileError("a plot needs matplotlib: pip install matplotlib") from None
        figure = Figure(figsize=(7, 4.5))
        axes = figure.subplots()
        for one in (self, *([beside] if beside else [])):
            axes.plot([row["tokens"] for row in one.rows], [row["ms"] for row in one.rows],
                      marker="o", label=str(one.step.program.recipe))
        axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="ms a token",
                 title=f"{self.step.program.name} on {self.on.name}, predicted")
        axes.legend()
        figure.savefig(file)
