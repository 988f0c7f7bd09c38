"""A run of the benchmark as a table, as Markdown and as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from kvcompile.bench.row import Row, summary
from kvcompile.show import as_text

COLUMNS = ("what", "ours", "peer", "theirs", "ratio", "target", "met")


@dataclass(frozen=True)
class Result:
    """Rows, the machine, and the streaming bandwidth in GB/s as it was probed beside them."""

    rows: Sequence[Row]
    machine: dict[str, Any]
    bandwidth: Sequence[float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything, raw samples included, in plain types."""
        return {"machine": self.machine, "bandwidth_gb_s": summary(self.bandwidth),
                "seconds": self.seconds, "rows": [row.as_dict() for row in self.rows]}

    def __str__(self) -> str:
        grid = Table(*COLUMNS, box=box.SIMPLE, pad_edge=False)
        for name, column in zip(COLUMNS, grid.columns, strict=True):
            column.overflow = "fold"
            column.justify = "right" if name in ("ours", "theirs", "ratio", "target") else "left"
        for row in self.rows:
            grid.add_row(*cells(row))
        return "\n".join([as_text(grid, 130), "", self.about(), *self._notes()])

    def markdown(self) -> str:
        """The same for a page of the documentation."""
        lines = [self.about(), "", "| " + " | ".join(COLUMNS) + " |",
                 "|---|---:|---|---:|---:|---:|---|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self._notes())])

    def about(self) -> str:
        """One paragraph: machine, versions, and the bandwidth with its spread."""
        m, probed = self.machine, summary(self.bandwidth)
        stream = "" if probed is None else (
            f" Streaming bandwidth {probed['median']:.1f} GB/s (quartiles "
            f"{probed['quartiles'][0]:.1f} to {probed['quartiles'][1]:.1f}, "
            f"{len(probed['samples'])} probes).")
        return (f"{m['cpu']} ({m['vectors']}), {m['cores']} cores, {m['threads']} threads, torch "
                f"{m['torch']}, transformers {m['transformers']}.{stream} Load before: "
                f"{m['load_before']:.1f}. {self.seconds:.0f} s in all.")

    def _notes(self) -> list[str]:
        """What was left out and why, each reason once."""
        notes = (f"{row.what}{f', {row.peer}' if row.peer else ''}: {row.note}"
                 for row in self.rows if row.note)
        return list(dict.fromkeys(notes))


def cells(row: Row) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    met = {None: "", True: "yes", False: "NO"}[row.met]
    ratio = "-" if row.ratio is None else (
        f"{row.ratio:.0%}" if row.inverse and row.ratio < 1 else f"{row.ratio:.2f}x")
    return [row.what, _figure(row.ours, row.unit), row.peer or "-", _figure(row.theirs, row.unit),
            ratio, "" if row.target is None else str(row.target), met]


def _figure(samples: Sequence[float], unit: str) -> str:
    if not samples:
        return "-"
    value = median(samples)
    return f"{value:.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"
