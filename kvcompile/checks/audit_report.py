"""What an audit of a model found (kvcompile/checks/audit.py)."""

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from torch import Tensor

from kvcompile.show import as_text


@dataclass(frozen=True)
class LayerAudit:
    """The worst of a layer's steps: error and bound of the output's largest deviation relative to
    the bound, the exact softmax mass of dropped tokens, and the layer's share of the cache."""

    layer: int
    kernel: str
    error: float
    bound: float
    mass: float
    bytes: int


@dataclass(frozen=True)
class LogitsAudit:
    """Logits of the decoded tokens against the exact model's: the largest difference, the mean
    KL divergence in nats, and the share of steps with the same most likely token."""

    error: float
    kl: float
    same: float

    @staticmethod
    def of(exact: Tensor, found: Tensor) -> "LogitsAudit":
        """exact and found are [N, V]."""
        p, q = (x.double().log_softmax(-1) for x in (exact, found))
        return LogitsAudit(float((exact.double() - found.double()).abs().max()),
                           float((p.exp() * (p - q)).sum(-1).mean()),
                           float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@dataclass(frozen=True)
class Audit:
    """What `audit` found, layer by layer; `str()` is a table. `unchecked` says what was not."""

    recipe: str
    tokens: int
    steps: int
    layers: tuple[LayerAudit, ...]
    logits: LogitsAudit
    unchecked: str = ""

    def __str__(self) -> str:
        table = Table("layer", "kernel", "|o' - o|", "bound", "dropped mass", "bytes",
                      box=box.SIMPLE, pad_edge=False)
        for x in self.layers:
            table.add_row(str(x.layer), x.kernel, f"{x.error:.2e}", f"{x.bound:.2e}",
                          f"{x.mass:.1e}", f"{x.bytes:,}")
        off = self.logits
        told = (f"logits (measured, not bounded): off by {off.error:.2g} at most, KL {off.kl:.2g} "
                f"nats, the same token in {off.same:.0%} of steps")
        return "\n".join([f"recipe {self.recipe}: {self.steps} steps after {self.tokens} tokens",
                          "", as_text(table), told, *([self.unchecked] if self.unchecked else [])])

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        return asdict(self)
