"""Factors of a projection: W = B A, or as near as a rank allows, one pair for a group of heads.

Of W [n, in] and the second moment C = E[y y^T] of its outputs y = W x on a text, the product B A of
rank r that is nearest on that text, E |B A x - W x|^2 least, keeps the r leading eigenvectors U of
C: B A = U U^T W. That is the truncated SVD of W whitened by the inputs' covariance S S^T, as
W S = U s V^T and U s_r V_r^T S^-1 = U_r U_r^T W (Palu, arXiv:2407.21118; SVD-LLM,
arXiv:2403.07378). With no text C = W W^T, and it is the truncated SVD of W. As in Palu's program
either factor has the root of s, B = U s_r^(1/2): latents then differ less in size from channel to
channel, which quantization per token prefers, a little.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.kernels.hadamard import turn


class Factors(NamedTuple):
    """down [r, in] and up [n, r] of one group; `kept` is their share of E |y|^2."""

    down: Tensor
    up: Tensor
    kept: float


def spectrum(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], largest first and none negative, and eigenvectors [n, n] as columns."""
    values, vectors = torch.linalg.eigh(moment.double())
    return values.flip(0).clamp(min=0), vectors.flip(1)


def factor(weight: Tensor, moment: Tensor, rank: int, rotate: bool = False, even: bool = True
           ) -> Factors:
    """The factors of weight [n, in] of this rank, in fp64; `moment` is C [n, n].

    `even`: both have the root of the singular values; if not, B is orthonormal.
    `rotate`: the latent is turned by a Hadamard matrix, which spreads outliers before quantization
    and costs nothing (Palu, section 3.4).
    """
    w = weight.double()
    values, vectors = spectrum(moment)
    up = vectors[:, :rank]
    root = values[:rank] ** 0.25 if even else torch.ones_like(values[:rank])
    root = torch.where(root > 1e-4 * root.amax(), root, 1.0)  # of s, the root of C's eigenvalues
    up, down = up * root, (up / root).t() @ w
    kept = float(values[:rank].sum() / values.sum().clamp(min=torch.finfo(torch.float64).tiny))
    if rotate:
        up, down = turn(up), turn(down.t()).t()
    return Factors(down, up, kept)


def rank_of(wanted: float | int, energy: float | None, values: Tensor, multiple: int) -> int:
    """A rank out of n eigenvalues: `wanted` itself, or that fraction of n; or the least that keeps
    `energy` of their sum. Whole multiples of `multiple`, at least one, at most n."""
    n = len(values)
    if energy is not None:
        total = values.cumsum(0)
        least = int((total < energy * total[-1]).sum()) + 1
        rank = -(-least // multiple) * multiple
    elif isinstance(wanted, int):
        return min(wanted, n)
    else:
        rank = round(wanted * n / multiple) * multiple
    return min(max(rank, multiple), n)
