"""Scorers around weights of attention: what a token's value does to the output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompile.prompt import Held, Prompt
from kvcompile.recipe import Term
from kvcompile.rule import Around


@dataclass(frozen=True)
class Weighed(Around):
    """Scores s of `of`, weights of attention, times what a token's value v does.

    by norm: s |v|_1 (VATP). by output: how far the output moves if the token leaves, a / (1 - a) |o
    - v|, with a = s over the sum of s and o the sum of a v (CAOTE). Tokens that `of` protects stay,
    and are in no sum. While decoding `of` observes, and what a head holds is weighed when some of
    it has to leave.
    """

    of: Term
    by: str = "norm"
    name: ClassVar[str] = "weighed"

    def prompt(self, x: Prompt) -> Tensor:
        return self._weighed(self.base.prompt(x), x.values)

    @property
    def observe(self) -> Callable[..., Tensor]:
        """That of `of`; none where it has none, and so with `looks`."""
        observe: Callable[..., Tensor] = self.base.observe
        return observe

    @property
    def looks(self) -> Any:
        return self.base.looks

    def final(self, score: Tensor, held: Held) -> Tensor:
        return self._weighed(score, held.values)

    def _weighed(self, score: Tensor, values: Tensor) -> Tensor:
        """[..., T] of scores [..., T] and values [..., T, Dv]."""
        stays = score.isposinf()
        s = score.masked_fill(stays, 0.0)
        if self.by == "norm":
            return (s * values.abs().sum(-1)).masked_fill(stays, torch.inf)
        tiny = torch.finfo(s.dtype).tiny
        a = s / s.sum(-1, keepdim=True).clamp(min=tiny)
        o = (a[..., None] * values).sum(-2, keepdim=True)
        moved = a / (1 - a).clamp(min=tiny) * (o - values).norm(dim=-1)
        return moved.masked_fill(stays, torch.inf)


SCORERS = (Weighed,)
