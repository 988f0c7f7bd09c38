"""Which kv heads of a layer form groups, and the basis that each group shares.

Heads are alike by the mean cosine of their K and V of a token, after the turn that a later merge
may use, or by linear CKA, which no turn changes (ReCalKV, arXiv:2505.24357, section 3.2).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvcompile.calibration.alignment import Rotary, turn

ROUNDS = 3  # in which a group's mean and the turns towards it are found in turn


class Grouping(NamedTuple):
    """New head h is old head heads[h], its K and V turned by k[h] and v[h] [D, D]; each run of a
    group's size is a group. `before` and `after` are the mean cosines of heads with their group's
    mean, of neighbours as they were and of groups as they are."""

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    before: float
    after: float


def group(k: Tensor, v: Tensor, size: int, by: str, turned: bool, rotary: Rotary | None
          ) -> Grouping:
    """Groups of `size` heads of K and V [texts, H, N, D]; by `place`, `cosine` or `cka`."""
    k, v = (x.transpose(0, 1).flatten(1, 2).double() for x in (k, v))
    count = len(k)
    heads = list(range(count))
    if by != "place":
        heads = _runs(sum((_cka(x) if by == "cka" else _cosines(x, turned, r)
                           for x, r in ((k, rotary), (v, None))), torch.zeros(())), size)
    before = (_centred(k, size) + _centred(v, size)) / 2
    k, v = k[heads], v[heads]
    of_k, of_v = (torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).repeat(count, 1, 1)
                  for x in (k, v))
    if turned:
        of_k, of_v = (torch.cat([_basis(x, r) for x in side.split(size)])
                      for side, r in ((k, rotary), (v, None)))
    after = (_centred(k @ of_k.mT, size) + _centred(v @ of_v.mT, size)) / 2
    return Grouping(tuple(heads), of_k, of_v, before, after)


def _basis(x: Tensor, rotary: Rotary | None) -> Tensor:
    """[n, D, D]: turns that bring x [n, N, D] nearest to their mean (generalized Procrustes)."""
    towards = x[0]
    for _ in range(ROUNDS):
        turns = torch.stack([turn(own, towards, rotary) for own in x])
        towards = (x @ turns.mT).mean(0)
    return turns


def _cosines(x: Tensor, turned: bool, rotary: Rotary | None) -> Tensor:
    """[H, H]: mean cosine of two heads of x [H, N, D], the second turned to the first."""
    out = torch.eye(len(x), dtype=x.dtype)
    for i in range(len(x)):
        for j in range(i):
            y = x[j] @ turn(x[j], x[i], rotary).mT if turned else x[j]
            out[i, j] = out[j, i] = cosine_similarity(x[i], y, dim=-1).mean()
    return out


def _cka(x: Tensor) -> Tensor:
    """[H, H]: |Xi^T Xj|^2 / (|Xi^T Xi| |Xj^T Xj|) of centred x [H, N, D] (arXiv:1905.00414)."""
    x = x - x.mean(1, keepdim=True)
    products = torch.einsum("ind,jne->ijde", x, x).flatten(2).norm(dim=-1)
    own = products.diagonal().clamp(min=torch.finfo(x.dtype).tiny)
    return products.square() / (own[:, None] * own)


def _centred(x: Tensor, size: int) -> float:
    """Mean cosine of heads [H, N, D] with the mean of their group."""
    groups = x.unflatten(0, (-1, size))
    return float(cosine_similarity(groups, groups.mean(1, keepdim=True), dim=-1).mean())


def _runs(alike: Tensor, size: int) -> list[int]:
    """Heads in groups of `size`, greedily: the most alike two that are left, then whichever is most
    alike to those, until a group is full. In order of the least number."""
    left, groups = list(range(len(alike))), list[list[int]]()
    while left:
        pairs = [(i, j) for n, i in enumerate(left) for j in left[n + 1 :]]
        most = max(pairs, key=lambda pair: float(alike[pair[0], pair[1]]))
        own = [*most]
        while len(own) < size:
            near = alike[:, own].sum(1).tolist()
            own.append(max((x for x in left if x not in own), key=near.__getitem__))
        groups.append(sorted(own))
        left = [x for x in left if x not in own]
    return [x for own in sorted(groups) for x in own]
