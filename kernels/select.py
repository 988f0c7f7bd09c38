"""The bodies of kvc.score, kvc.prune and kvc.keep: what is stored of a prompt."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir import body
from kvcompile.kernels.rank import entering
from kvcompile.prompt import Prompt
from kvcompile.rule import Rule


def _rows(valid: Tensor, probe: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, columns of its tokens, those of them that are to be scored)."""
    scored = valid.shape[1] - probe
    for row, keep in enumerate(valid):
        columns = keep.nonzero().flatten()
        yield row, columns, columns[columns < scored]


@body("score")
def score(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor, hints: Tensor,
          weight: Tensor | None, angles: Tensor | None, *, rule: str, scale: float,
          softcap: float = 0.0, style: str = "half", ids: Tensor | None = None
          ) -> tuple[Tensor, Tensor]:
    """How much each token matters: fp32 [B, H, S], -inf for padding; what the budget measures,
    [B, H].

    `hints` is int64 [2]: columns at the end that only look at the others, and tokens of the
    question before them. A row's scores are what the row gets alone.
    """
    parsed = Rule.parse(rule)
    probe, question = hints[:2].tolist()
    scores = torch.full(k.shape[:3], -torch.inf, device=k.device)
    measures = torch.zeros(k.shape[:2], device=k.device)
    for row, columns, own in _rows(valid, probe):
        if not len(own):
            continue
        x = Prompt(_taken(q[row], columns), _taken(k[row], columns), _taken(v[row], columns),
                   positions[row, columns], scale, softcap, len(own), min(question, len(own)),
                   weight, _angles(angles, row, columns), style,
                   None if ids is None else ids[row, columns], parsed.layer, parsed.layers)
        scores[row][:, own] = parsed.scorer.prompt(x).float()
        measures[row] = torch.as_tensor(parsed.budgeter.measure(x), device=k.device)
    return scores, measures


@body("prune")
def prune(q: Tensor, k: Tensor, positions: Tensor, valid: Tensor, hints: Tensor, *, rule: str
          ) -> Tensor:
    """K [B, H, S, Dk] with zeros in the channels that a row's head drops, but for its newest tokens
    (and columns that only look). `hints` as kvc.score's."""
    parsed, out = Rule.parse(rule), k.clone()
    for row, _, own in _rows(valid, int(hints[0])):
        if not len(own):
            continue
        x = Prompt(q[row][:, own], k[row][:, own], k[row][:, own], positions[row, own], 1.0,
                   tokens=len(own), layer=parsed.layer, layers=parsed.layers)
        older = own[: max(0, len(own) - parsed.pruner.recent)]
        out[row][:, older] = k[row][:, older] * parsed.pruner.prompt(x)[:, None]
    return out


def _taken(x: Tensor, columns: Tensor) -> Tensor:
    """x [H, S, D] at these columns; no copy of all of them."""
    return x if len(columns) == x.shape[1] else x[:, columns]


def _angles(angles: Tensor | None, row: int, columns: Tensor) -> Tensor | None:
    if angles is None:
        return None
    angles = angles.flatten(0, -3) if angles.dim() > 3 else angles
    return angles[row % angles.shape[0], columns].float()


@body("keep")
def keep(scores: list[Tensor], measures: list[Tensor], k: list[Tensor], v: list[Tensor],
         positions: Tensor, valid: Tensor, hints: Tensor, angles: Tensor | None, *,
         rules: list[str], style: str = "half"
         ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """K [B, H, S', D], V, columns [B, H, S'] (int32, -1 at the end of a head) and scores of the
    tokens that each head of some layers keeps, in order (of rules with `salient` ones, as
    `entering` says). Budgets that span layers see all of
    them. Further `hints`, where this is the first piece of a prompt: tokens of each row's whole
    prompt."""
    parsed, probe = [Rule.parse(r) for r in rules], int(hints[0])
    kept: list[list[list[Tensor]]] = []             # row, layer, head
    both = [[x.clone() if r.merge and not r.apart or r.positions != "original" else x for x, r in
             zip(xs, parsed, strict=True)] for xs in (k, v)]
    for row, columns, own in _rows(valid, probe):
        each = [s[row][:, own] for s in scores]
        budgets = [r.budgeter.told(int(hints[2 + row])) if len(hints) > 2 else r.budgeter
                   for r in parsed]
        chosen = select(parsed, [s.clone() for s in each], [float(m[row, 0]) for m in measures],
                        budgets)
        chosen = [[entering(own, rule.salient) for own in s] if rule.salient else heads
                  for rule, s, heads in zip(parsed, each, chosen, strict=True)]
        kept.append([[own[at] for at in heads] for heads in chosen])
        for i, rule in enumerate(parsed):
            keys, values = (x[i] for x in both)
            if rule.merge and not rule.apart:
                new = rule.merger.into(keys[row][:, own], values[row][:, own], each[i], chosen[i])
                for x, changed in zip((keys, values), new, strict=True):
                    x[row][:, own] = changed.to(x.dtype)
            if rule.positions != "original" and len(own):
                _turn(keys[row], kept[-1][i], positions[row], own, Prompt(
                    keys[row], keys[row], keys[row], positions[row, columns], 1.0,
                    angles=_angles(angles, row, columns), style=style))
    most = [max((len(at) for row in kept for at in row[i]), default=0) for i in range(len(k))]
    out = [torch.full((*x.shape[:2], n), -1, dtype=torch.int32, device=x.device)
           for x, n in zip(k, most, strict=True)]
    for row, layers in enumerate(kept):
        for i, heads in enumerate(layers):
            for head, at in enumerate(heads):
                out[i][row, head, : len(at)] = at.int()
    places = [at.clamp(min=0).long() for at in out]
    gathered = [[_gathered(x, at) for x, at in zip(xs, places, strict=True)]
                for xs in (*both, scores)]
    return gathered[0], gathered[1], out, gathered[2]


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    """x [B, H, S, ...] at the columns [B, H, S'] of each head."""
    rows, heads = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return x[rows[:, None, None], heads[:, None], at]


def select(rules: Sequence[Rule], scores: list[Tensor], measures: Sequence[float],
           budgets: Sequence[Any]) -> list[list[Tensor]]:
    """Numbers of the tokens that each head of each layer keeps, ascending; scores [H, T] are lost.

    Of equal scores the earlier token stays. What is protected always does, and a head is never
    emptied.
    """
    tokens = scores[0].shape[1]
    for rule, budget, s in zip(rules, budgets, scores, strict=True):
        s[:, : rule.sinks] = torch.inf
        recent = rule.protected(budget.most(tokens, len(s))[1] // len(s))
        s[:, tokens - min(tokens, recent):] = torch.inf
    counts = budgets[0].counts(scores, measures) if budgets[0].across else [
        b.counts([s], [m])[0] for b, s, m in zip(budgets, scores, measures, strict=True)]
    chosen = []
    for s, numbers in zip(scores, counts, strict=True):
        least = s.isposinf().sum(-1).clamp(min=1).tolist()
        chosen.append([largest(own, min(tokens, max(n, m)))
                       for own, n, m in zip(s, numbers, least, strict=True)])
    return chosen


def largest(x: Tensor, n: int) -> Tensor:
    """Numbers, ascending, of the n largest of x [T], NaN among them; of equals the earlier."""
    if n == len(x):
        return torch.arange(n, device=x.device)
    x = x.where(~x.isnan(), torch.inf)  # it stays, so that what stores it refuses it
    cut = x.topk(n, sorted=False).values.amin()
    more, equal = x > cut, x == cut
    return (more | equal & (equal.cumsum(0) <= n - more.sum())).nonzero().flatten()


def _turn(keys: Tensor, kept: list[Tensor], positions: Tensor, own: Tensor, x: Prompt) -> None:
    """Turn the kept keys [H, S, Dk], in place, to the positions that end with the prompt's last."""
    last = int(positions[own[-1]])
    for head, at in enumerate(kept):
        to = torch.arange(last - len(at) + 1, last + 1, device=at.device)
        cos, sin = x.rotation(to - positions[at])
        keys[head, at] = torch.ops.kvc.rope(keys[head, at][None, None].float(), cos, sin,
                                            style=x.style)[0, 0].to(keys.dtype)
