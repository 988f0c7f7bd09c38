"""One layer's heads in another's basis: which head becomes which, and the rotations of K and V.

V of a head may be turned by any orthogonal matrix, K by what commutes with its rotary embedding: a
rotation of each rotary pair (any orthogonal matrix where there is none). Both are found so that the
turned vectors are nearest to the other layer's, in the least squares' sense, on the same tokens.
"""

from typing import NamedTuple

import networkx
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


class Rotary(NamedTuple):
    """Channels that are rotated, and how they pair: style "half" or "interleaved"."""

    channels: int
    style: str

    def pairs(self) -> Tensor:
        """[channels / 2, 2]: the channels of each pair."""
        every = torch.arange(self.channels)
        return every.view(2, -1).t() if self.style == "half" else every.view(-1, 2)


class Alignment(NamedTuple):
    """New head h is old head heads[h], its K and V turned by k[h] and v[h] [D, D]: x' = T x.

    `k` is None where K stays, `cosine` are mean cosines of (K, V) with the other layer, before and
    after.
    """

    heads: tuple[int, ...]
    k: Tensor | None
    v: Tensor
    cosine: tuple[tuple[float, float], tuple[float, float]]


def align(k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], rotary: Rotary | None,
          fixed: bool = False) -> Alignment:
    """How K and V [H, N, D] of a layer, the first of each, become nearest to another layer's.

    fixed   K and the order of heads stay: something between the weights and attention needs them
    """
    (a, b), (c, d) = ([x.double() for x in both] for both in (k, v))
    count = len(a)
    turns = {(h, g): (turn(a[g], b[h], rotary), orthogonal(c[g], d[h]))
             for h in range(count) for g in (range(count) if not fixed else [h])}
    worth = {(h, g): _cosine(a[g] @ t.mT, b[h]) + _cosine(c[g] @ u.mT, d[h])
             for (h, g), (t, u) in turns.items()}
    heads = tuple(range(count)) if fixed else _matched(worth, count)
    keys, values = (torch.stack([turns[h, g][i] for h, g in enumerate(heads)]) for i in (0, 1))
    before = (_cosine(a, b), _cosine(c, d))
    after = (before[0] if fixed else _cosine(a[list(heads)] @ keys.mT, b),
             _cosine(c[list(heads)] @ values.mT, d))
    return Alignment(heads, None if fixed else keys, values, (before, after))


def orthogonal(x: Tensor, y: Tensor) -> Tensor:
    """The orthogonal T [D, D] for which T x is nearest to y, x and y [N, D] (Procrustes)."""
    u, _, vh = torch.linalg.svd(y.mT @ x)
    return u @ vh


def turn(x: Tensor, y: Tensor, rotary: Rotary | None) -> Tensor:
    """The T [D, D] for which T x is nearest to y among those that commute with the rotary embedding
    of x and y [N, D]; channels that are not rotated stay."""
    if rotary is None:
        return orthogonal(x, y)
    out = torch.eye(x.shape[-1], dtype=x.dtype)
    for i, j in rotary.pairs().tolist():
        real = (x[:, i] * y[:, i] + x[:, j] * y[:, j]).sum()
        imaginary = (x[:, i] * y[:, j] - x[:, j] * y[:, i]).sum()
        angle = torch.atan2(imaginary, real)
        out[i, i] = out[j, j] = angle.cos()
        out[j, i], out[i, j] = angle.sin(), -angle.sin()
    return out


def _matched(worth: dict[tuple[int, int], float], count: int) -> tuple[int, ...]:
    """heads[h] = g, each g once, with the largest sum of worth[h, g]."""
    graph = networkx.Graph()
    for (h, g), value in worth.items():
        graph.add_edge(("new", h), ("old", g), weight=value + 4)  # none below 0
    pairs = networkx.max_weight_matching(graph, maxcardinality=True)
    chosen = dict(sorted(pair, key=lambda end: str(end[0])) for pair in pairs)
    return tuple(chosen["new", h][1] for h in range(count))


def _cosine(x: Tensor, y: Tensor) -> float:
    return float(cosine_similarity(x, y, dim=-1).mean())
