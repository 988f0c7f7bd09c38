"""Budgets of layers, or of heads, by what their attention is like."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.passes.budgets import UNBOUNDED, Sized, size
from kvcompile.prompt import Prompt
from kvcompile.recipe import Term
from kvcompile.rule import named


@dataclass(frozen=True)
class Lazy(Sized):
    """SimLayerKV: a layer is lazy if its last `queries` give more than `above` to the first `sinks`
    and the newest `recent` tokens; it keeps just these, other layers everything."""

    sinks: int = 4
    recent: int = 1024
    above: float = 0.9
    queries: int = 1
    name: ClassVar[str] = "lazy"

    def measure(self, x: Prompt) -> float:
        mass = [w[..., : self.sinks].sum(-1) + w[..., max(self.sinks, x.tokens - self.recent):
                                                 x.tokens].sum(-1)
                for w in x.weights(x.tokens - min(self.queries, x.tokens), x.tokens)]
        return float(torch.cat(mass, -1).mean() > self.above)

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        return [[min(s.shape[1], self.sinks + self.recent) if m else s.shape[1]] * len(s)
                for s, m in zip(scores, measures, strict=True)]

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        return tokens, heads * tokens

    def limit(self, counts: Sequence[int], tokens: int, measures: Sequence[float]
              ) -> list[int]:
        least = self.sinks + self.recent
        return [least if n <= least < tokens else UNBOUNDED for n in counts]


@dataclass(frozen=True)
class Cake(Sized):
    """CAKE: layers share their budgets as P_l = H^(1 / t1) V^(1 / t2).

    Of the last `window` queries' weights a on the tokens before them H is the sum of -a log a, V
    the sum over tokens of their variance over the queries; both are means over the heads.
    """

    window: int = 32
    t1: float = 1.0
    t2: float = 1.0
    name: ClassVar[str] = "cake"
    across: ClassVar[bool] = True

    def measure(self, x: Prompt) -> float:
        window = min(self.window, x.tokens)
        if window == x.tokens:
            return 1.0
        w = x.looked(window)
        entropy = -(w * (w + 1e-10).log()).sum((2, 3)).mean()
        varied = w.var(2, correction=int(window > 1)).sum(-1).mean()
        return float(entropy.clamp(min=0) ** (1 / self.t1) * varied ** (1 / self.t2))

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        tokens = scores[0].shape[1]
        return [[n] * len(s) for n, s in zip(
            shares(measures, size(self.tokens, self.ratio, tokens), self.window, tokens), scores,
            strict=True)]

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        return tokens, heads * size(self.tokens, self.ratio, tokens)


@dataclass(frozen=True)
class Dense(Sized):
    """D2O: layers share their budgets by how evenly they attend: exp(-variance of the weight that
    tokens receive, relative to the layers' mean)."""

    name: ClassVar[str] = "dense"
    across: ClassVar[bool] = True

    def measure(self, x: Prompt) -> float:
        total = torch.zeros(x.k.shape[1], device=x.k.device)
        for w in x.weights(0, x.tokens):
            total += w.sum(2).mean((0, 1))
        return float(total[: x.tokens].var(correction=0))

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        tokens, mean = scores[0].shape[1], sum(measures) / len(measures) or 1.0
        evenness = torch.exp(-torch.tensor(measures) / mean).tolist()
        return [[n] * len(s) for n, s in zip(
            shares(evenness, size(self.tokens, self.ratio, tokens), 1, tokens), scores,
            strict=True)]

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        return tokens, heads * size(self.tokens, self.ratio, tokens)


@dataclass(frozen=True)
class ByPolicy(Sized):
    """FastGen: what the policy of a head keeps, which `of`, the scorer, finds in the prompt and
    knows while decoding. A head's limit tells its number: so much it is below UNBOUNDED."""

    of: Term = Term("policies")
    name: ClassVar[str] = "policies"

    def measure(self, x: Prompt) -> Tensor:
        return named("scorer", self.of).policy(x)[0]

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        return [(s >= 0).sum(1).tolist() for s in scores]

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        return tokens, heads * tokens

    def limit(self, counts: Sequence[int], tokens: int, measures: Sequence[float]
              ) -> list[int]:
        return [UNBOUNDED - int(m) for m in measures]

    def below(self, score: Tensor, position: Tensor, newest: Tensor, limit: Tensor
              ) -> tuple[Tensor, Tensor]:
        stay = named("scorer", self.of).stay(score, position, newest, UNBOUNDED - limit)
        score = torch.where(stay, torch.inf, score)
        return score, score.isfinite().sum(1)


def shares(weights: Sequence[float], mean: int, least: int, most: int) -> list[int]:
    """`mean` * len(weights) tokens in proportion, `least` to each first, `most` at most.

    What some cannot take, and then what rounding leaves, is given to the others evenly, one more to
    the first of them.
    """
    least, total = min(least, mean), sum(weights)
    room, spare = most - least, (mean - least) * len(weights)
    given = [int(spare * (w / total if total else 1 / len(weights))) for w in weights]
    out = [min(n, room) for n in given]
    left = sum(given) - sum(out)
    while left > 0 or (left := spare - sum(out)) > 0:
        free = [i for i, n in enumerate(out) if n < room]
        if not free:
            break
        each, more = divmod(left, len(free))
        for n, i in enumerate(free):
            out[i] = min(room, out[i] + each + (n < more))
        left = 0
    return [least + n for n in out]


BUDGETS = (Lazy, Cake, Dense, ByPolicy)
