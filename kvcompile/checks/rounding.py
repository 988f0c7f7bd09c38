"""How far a kernel's attention may be from the oracle on the same view, by rounding alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.laws import How, View, heads, oracle, spread


class Arithmetic(NamedTuple):
    """How a kernel computes: the unit roundoff of its sums; relative errors of K' and V' as they
    are read (stored), of softmax weights and of the output; `q` and `p`: errors of the query's
    numbers and of the weights of 128 tokens, relative to the largest among them."""

    u: float = 2.0**-24
    stored: float = 0.0
    weights: float = 2.0**-21
    out: float = 0.0
    q: float = 0.0
    p: float = 0.0


def gamma(n: int, u: float) -> float:
    """The relative error of a sum of n products (Higham, Accuracy and Stability, section 3.1)."""
    return n * u / (1 - n * u)


def rounding(q: Tensor, view: View, how: How, kernel: Arithmetic, keys: Tensor | None = None
             ) -> Tensor:
    """[Hq, Dv]: how far a kernel's o may be from `oracle(q, view)`; `keys` [H, N, Dk]: how far the
    keys that it makes itself are from the view's.

    Lengths of vectors stand for sums of magnitudes: kernels may read rotated vectors, and codes,
    scales and offsets whose sizes add to at most 4 times the largest number's.
    """
    (_, n, dk), k, v = view.k.shape, heads(view.k, q), heads(view.v, q)
    length = how.scale * q.double().norm(dim=-1) * k.norm(dim=-1).amax(-1)
    logits = length * (8 * dk**0.5 * gamma(dk + 2, kernel.u) + kernel.stored + 2 * dk * kernel.q)
    logits = logits + 8 * kernel.u * how.softcap
    if keys is not None:
        logits = logits + how.scale * (q.double().abs()[:, None] * heads(keys, q)).sum(-1).amax(-1)
    weights = kernel.weights + 8 * gamma(n + 2, kernel.u) + 256 * kernel.p + kernel.stored
    error = torch.tanh(logits / 2)[:, None] * spread(q, view.v, how)
    error = error + weights * v.norm(dim=-1).amax(-1)[:, None]
    return error + kernel.out * (oracle(q, view, how).abs() + error)
