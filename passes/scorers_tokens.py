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


@dataclass(frozen=True)
class Policies:
    """FastGen: 1 for the tokens that a head's policy keeps, 0 for the others.

    The policies are special tokens; these and punctuation; these and the share `frequent` of the
    prompt that receives most weight; these and the newest share `local`, which each query takes
    from its own place; everything. A head has the first under which the prompt's queries still see
    the share `recover` of their weight, mean over them and over the query heads of a kv head.
    """

    special: tuple[int, ...]
    punctuation: tuple[int, ...]
    frequent: float = 0.3
    local: float = 0.3
    recover: float = 0.95
    name: ClassVar[str] = "policies"
    needs: ClassVar[tuple[str, ...]] = ("ids",)

    def prompt(self, x: Prompt) -> Tensor:
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
        best = total.topk(int(self.frequent * tokens), -1).indices
        heavy = marks.scatter(-1, best, True)
        kept = torch.stack([special, marks, heavy, heavy | (at >= tokens - newest),
                            torch.ones_like(heavy)])
        seen = torch.stack([*(total * kept[:3]).sum(-1), torch.where(heavy, total, near).sum(-1)])
        enough = torch.cat([seen >= self.recover * tokens, kept[4, :, :1].T])     # [policies, H]
        return kept[enough.int().argmax(0), torch.arange(x.heads)].float()


SCORERS = (Listed, Policies)
