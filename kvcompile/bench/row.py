"""A row of the benchmark: what was measured, beside which peer, and the target."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple


class Target(NamedTuple):
    """What the ratio (where there is no peer: our figure) must be; 1 +- value: as near to 1."""

    sign: Literal[">=", "<=", "1 +-"]
    value: float

    def met(self, value: float) -> bool:
        if self.sign == "1 +-":
            return abs(value - 1) <= self.value
        return value >= self.value if self.sign == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"


@dataclass(frozen=True)
class Row:
    """Samples of ours and of a peer in the same `unit`.

    `ratio` is how many times less ours takes than the peer (theirs / ours); with `inverse` it is
    ours / theirs, as for a share of something or a multiple of a floor. Without samples of ours the
    row was left out, and `note` says why.
    """

    group: str
    what: str
    unit: str
    ours: Sequence[float] = ()
    peer: str = ""
    theirs: Sequence[float] = ()
    inverse: bool = False
    target: Target | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if not self.ours or not self.theirs:
            return None
        ours, theirs = median(self.ours), median(self.theirs)
        return ours / theirs if self.inverse else theirs / ours

    @property
    def met(self) -> bool | None:
        """None where there is no target, or nothing was measured."""
        value = self.ratio if self.peer else median(self.ours) if self.ours else None
        return None if self.target is None or value is None else self.target.met(value)

    def as_dict(self) -> dict[str, Any]:
        """The row with its raw samples in plain types."""
        return {"group": self.group, "what": self.what, "unit": self.unit,
                "ours": summary(self.ours), "peer": self.peer or None,
                "theirs": summary(self.theirs), "ratio": self.ratio,
                "ratio_is": "ours/theirs" if self.inverse else "theirs/ours",
                "target": None if self.target is None else str(self.target), "met": self.met,
                "note": self.note or None}


def summary(samples: Sequence[float]) -> dict[str, Any] | None:
    """Median, quartiles and the samples themselves; None if there are none."""
    if not samples:
        return None
    low, _, high = quantiles(samples, n=4) if len(samples) > 1 else (samples[0],) * 3
    return {"median": median(samples), "quartiles": [low, high], "samples": list(samples)}
