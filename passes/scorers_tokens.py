"""Scorers that know classes of tokens by their ids, such as separators."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.prompt import Prompt


def belongs(ids: Tensor, known: tuple[int, ...]) -> Tensor:
    """bool, as `ids`: which of them are `known`."""
    return torch.isin(ids, torch.tensor(known, dtype=ids.dtype, device=ids.device))


@dataclass(frozen=True)
class Listed:
    """The position of a token whose id is one of `ids`, -1 of any other: of those the newest."""

    ids: tuple[int, ...]
    name: ClassVar[str] = "listed"
    needs: ClassVar[tuple[str, ...]] = ("ids",)

    def prompt(self, x: Prompt) -> Tensor:
        assert x.ids is not None
        at = x.positions[: x.tokens]
        return self._scores(x.ids[: x.tokens], at).expand(x.heads, -1)

    def arrive(self, keys: Tensor, positions: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is not None
        return self._scores(ids, positions)[:, None].expand(keys.shape[:3])

    def _scores(self, ids: Tensor, positions: Tensor) -> Tensor:
        return torch.where(belongs(ids, self.ids), positions.float(), -1.0)


MARK = 1e30  # the score of punctuation: above every weight, and finite


@dataclass(frozen=True)
class Policies:
    """FastGen: the weight that a token has received, infinite for the classes that its head's
    policy keeps, -1 for tokens of the prompt that it does not.

    The policies are special tokens; these and punctuation; these and, of the others, as many as the
    share `frequent` of all tokens, those that received most weight; these and the newest share
    `local`, which each query takes from its own place; everything. A head has the first under which
    the prompt's queries still see the share `recover` of their weight, mean over them and over the
    query heads of a kv head. While decoding shares are of the tokens so far, counted by positions.
    """

    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()
    frequent: float = 0.3
    local: float = 0.3
    recover: float = 0.95
    name: ClassVar[str] = "policies"
    looks: ClassVar[int] = 0
    needs: ClassVar[tuple[str, ...]] = ("ids",)

    def prompt(self, x: Prompt) -> Tensor:
        return self.policy(x)[1]

    def policy(self, x: Prompt) -> tuple[Tensor, Tensor]:
        """The number [H] of each head's policy, and scores [H, T]."""
        if self not in x.known:
            x.known[self] = self._policy(x)
        return x.known[self]

    def _policy(self, x: Prompt) -> tuple[Tensor, Tensor]:
        assert x.ids is not None
        ids, tokens, row = x.ids[: x.tokens], x.tokens, 0
        newest, at = int(self.local * tokens), torch.arange(x.tokens, device=x.k.device)
        total, near = (torch.zeros(x.heads, tokens, device=x.k.device) for _ in range(2))
        for w in x.weights(0, tokens):
            mine, rows = w[..., :tokens].mean(1), torch.arange(row, row + w.shape[2])[:, None]
            total += mine.sum(1)
            near += (mine * (at > rows.to(at.device) - newest)).sum(1)
            row += w.shape[2]
        special = belongs(ids, self.special).expand(x.heads, -1)
        marks = special | belongs(ids, self.punctuation)
        best = total.where(~marks, -1.0).topk(int(self.frequent * tokens), -1).indices
        heavy = marks.scatter(-1, best, True)
        kept = torch.stack([special, marks, heavy, heavy | (at >= tokens - newest),
                            torch.ones_like(heavy)])
        seen = torch.stack([*(total * kept[:3]).sum(-1), torch.where(heavy, total, near).sum(-1)])
        enough = torch.cat([seen >= self.recover * tokens, kept[4, :, :1].T])     # [policies, H]
        number = enough.int().argmax(0)
        stay = kept[number, torch.arange(x.heads)]
        return number, torch.where(stay, total, -1.0).masked_fill(marks & stay, torch.inf)

    def arrive(self, keys: Tensor, positions: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is not None
        score = torch.where(belongs(ids, self.punctuation), MARK, 0.0)
        score = score.masked_fill(belongs(ids, self.special), torch.inf)
        return score[:, None].expand(keys.shape[:3])

    def observe(self, score: Tensor, mass: Tensor, new: Tensor) -> Tensor:
        return score + mass

    def stay(self, score: Tensor, position: Tensor, newest: Tensor, policy: Tensor) -> Tensor:
        """bool [N, slots]: what heads of the policies [N] keep of tokens with such scores; `newest`
        [N] is the position of the last one."""
        policy, newest = policy[:, None], newest[:, None]
        free = (score < MARK) | (policy == 0) & score.isfinite()
        order = position.argsort(dim=-1, descending=True, stable=True)   # of equals the newer stays
        weight = score.where(free, -torch.inf).gather(1, order)
        order = order.gather(1, weight.argsort(dim=-1, descending=True, stable=True))
        many, near = ((share * (newest + 1).double()).long()
                      for share in (self.frequent, self.local))
        rank = torch.arange(score.shape[1], device=score.device).expand_as(order)
        best = torch.zeros_like(free).scatter(1, order, rank < many)
        return ~free | (policy >= 2) & best | (policy == 3) & (position > newest - near) | (
            policy == 4)


SCORERS = (Listed, Policies)
