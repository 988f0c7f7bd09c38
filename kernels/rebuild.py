"""Keys from what is stored of them: K = rope(stored basis^T + offset, positions), at every read.

For keys that are cached before their rotation, and for low-rank ones (Palu, arXiv:2407.21118): the
rotation stands between the factors, so that no query can absorb the second one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcompile.kernels.rotary import rope


class Made(NamedTuple):
    """What kernels are told of how keys are made of what is stored."""

    dim: int                    # channels of a key
    keys: int = 1               # of a stored head
    basis: bool = False
    offset: bool = False
    rotary: int = 0             # channels that are turned
    style: str = ""
    angles: torch.dtype = torch.float32
    parts: torch.dtype = torch.float32    # of basis and offset


def made(dim: int, heads: int, basis: Any, offset: Any, cos: Any, style: str) -> Made | None:
    """That of keys of `dim` channels, from operands that have `shape` and `dtype`; None: keys are
    stored as they are read."""
    parts = offset if basis is None else basis
    if parts is None and cos is None:
        return None
    return Made(int(dim), 1 if basis is None else int(basis.shape[0]) // heads, basis is not None,
                offset is not None, 0 if cos is None else int(cos.shape[-1]), style,
                *(torch.float32 if x is None else x.dtype for x in (cos, parts)))


class Rebuild(NamedTuple):
    """basis [H, D, r], offset [H, D]; cos and sin [B or 1, 1, N, R] of N tokens, by number."""

    basis: Tensor | None
    offset: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    style: str

    @property
    def idle(self) -> bool:
        """Whether keys are stored as they are read."""
        return self.basis is None and self.cos is None

    def row(self, row: int) -> "Rebuild":
        """The same for one row: cos and sin [N, R]."""
        return self._tables(lambda x: x[row if x.shape[0] > 1 else 0, 0])

    def at(self, tokens: Tensor | slice) -> "Rebuild":
        """The same, of one row, for some of its tokens."""
        return self._tables(lambda x: x[tokens])

    def batch(self) -> "Rebuild":
        """The same, of one row, as a batch of one."""
        return self._tables(lambda x: x[None, None])

    def _tables(self, change: Callable[[Tensor], Tensor]) -> "Rebuild":
        if self.cos is None or self.sin is None:
            return self
        return self._replace(cos=change(self.cos), sin=change(self.sin))

    def heads(self, heads: slice, of: int) -> "Rebuild":
        """The same for some of the `of` stored heads."""
        if self.basis is None:
            return self
        each = self.basis.shape[0] // of
        own = slice(heads.start * each, heads.stop * each)
        return self._replace(basis=self.basis[own],
                             offset=None if self.offset is None else self.offset[own])

    def keys(self, x: Tensor) -> Tensor:
        """x [..., G, N, r], as stored -> K [..., H, N, D]; neighbours share a stored head. Angles
        may be fp32 in a 16-bit model."""
        dtype = x.dtype
        if self.basis is not None:
            basis = self.basis.unflatten(0, (x.shape[-3], -1)).transpose(-1, -2)
            x = torch.matmul(x.unsqueeze(-3), basis).flatten(-4, -3)
        if self.offset is not None:
            x = x + self.offset[:, None]
        if self.cos is None or self.sin is None:
            return x
        return rope(x, self.cos, self.sin, style=self.style).to(dtype)

