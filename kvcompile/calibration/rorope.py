"""RoRoPE: the rotation of all kv heads' keys, as nearly as one head can have it.

A rotary pair l turns by the same angle in every head, so that heads may be mixed by any orthogonal
U_l, the same for both channels of the pair. Its first vector is chosen to carry most of the pair's
squares on a text: that mixture keeps its rotation, the others lose it (TransMLA, arXiv:2502.07864,
section 4.2). With `fold` that many neighbouring pairs are mixed too, as if they had one frequency
(FreqFold), and as many mixtures keep their rotation.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Concentrated(NamedTuple):
    """Weights of keys and queries: k [H, D, n] and q [Hq, D, n] without rotation, k_turned [R, n]
    of one head and q_turned [Hq, R, n] with it; `carried` is the share of the rotary channels'
    squares that it has."""

    k: Tensor
    k_turned: Tensor
    q_turned: Tensor
    carried: float


def concentrate(q: Tensor, k: Tensor, second: Tensor, pairs: Tensor, fold: int) -> Concentrated:
    """What projections q [Hq, D, n] and k [H, D, n] become, in fp64; a bias is one more of the n.

    second [H D, H D] is E[k k^T] before the rotation of the channels pairs [P, 2]; `fold` divides
    P.
    """
    heads, dim = k.shape[:2]
    second = second.view(heads, dim, heads, dim)
    still, k_turned = k.clone(), k.new_zeros(pairs.numel(), k.shape[-1])
    q_turned, carried, every = q.new_zeros(len(q), pairs.numel(), q.shape[-1]), 0.0, 0.0
    own = torch.arange(len(q)) // (len(q) // heads)
    for block in pairs.split(fold):                      # [fold, 2]
        sides = [second[:, at][:, :, :, at] for at in block.t()]
        moment = sum(x.reshape(heads * fold, -1) for x in sides)
        values, vectors = torch.linalg.eigh(moment)
        mixed = vectors.flip(1)[:, :fold].view(heads, fold, fold)  # head, pair -> pair that turns
        carried, every = carried + float(values[-fold:].sum()), every + float(values.sum())
        for at in block.t():
            k_turned[at] = torch.einsum("hpm,hpn->mn", mixed, k[:, at])
            still[:, at] -= torch.einsum("hpm,mn->hpn", mixed, k_turned[at])
            q_turned[:, at] = torch.einsum("hpm,hpn->hmn", mixed[own], q[:, at])
    return Concentrated(still, k_turned, q_turned, carried / every)
