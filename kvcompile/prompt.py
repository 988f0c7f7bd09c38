"""What a scorer sees of one layer and one row: the prompt's q, K and V, padding taken out; and,
while decoding, of one head: what it holds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcompile.errors import KVCompileError

CHUNK = 256  # queries whose weights are formed at a time


@dataclass(frozen=True)
class Prompt:
    """q [Hq, N, Dk], k [H, N, Dk], v [H, N, Dv], positions [N] of one row.

    tokens    how many of the N tokens are to be scored: those after them only look (KVzip)
    question  how many of the scored tokens, at the end, are the question (0: not said)
    weight    of the linear that follows attention, [hidden, Hq * Dv], where a scorer asks for it
    angles    rotary angles at the positions, [N, R] or [N, R / 2] in fp32, likewise; `style` as
              in kvc.rope
    ids       token ids [N], likewise
    layer     number of the layer among the `layers` that the rule is for
    seed      of what is drawn at random; the same for a row in any batch
    known     what a scorer found and the budget asks of it again
    """

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    scale: float
    softcap: float = 0.0
    tokens: int = 0
    question: int = 0
    weight: Tensor | None = None
    angles: Tensor | None = None
    style: str = "half"
    ids: Tensor | None = None
    layer: int = 0
    layers: int = 1
    known: dict[Any, Any] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        return self.k.shape[0]

    @cached_property
    def queries(self) -> Tensor:
        """q folded by kv head: [H, G, N, Dk] in fp32."""
        return self.q.float().unflatten(0, (self.heads, -1))

    @cached_property
    def keys(self) -> Tensor:
        """K of the scored tokens, [H, T, Dk] in fp32."""
        return self.k[:, : self.tokens].float()

    @cached_property
    def values(self) -> Tensor:
        """V of the scored tokens, [H, T, Dv] in fp32."""
        return self.v[:, : self.tokens].float()

    def weights(self, start: int, stop: int | None = None) -> Iterator[Tensor]:
        """Causal softmax weights of the queries [start, stop), some rows at a time.

        Each is [H, G, rows, N] in fp32, 0 where a token is not seen. No N x N matrix is formed.
        """
        return self.of(torch.arange(start, self.k.shape[1] if stop is None else stop))

    def of(self, queries: Tensor) -> Iterator[Tensor]:
        """As `weights`, of queries with these numbers, ascending (on the CPU)."""
        n, keys = self.k.shape[1], self.k.float()
        for some in queries.split(CHUNK):
            first, last, at = int(some[0]), int(some[-1]) + 1, some.to(keys.device)
            rows = self.q[:, at].float() * self.scale
            logits = rows.reshape(self.heads, -1, rows.shape[-1]) @ keys[:, :last].transpose(1, 2)
            logits = logits.unflatten(1, (-1, len(some)))
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            later = torch.arange(first, last, device=at.device) > at[:, None]
            logits[..., first:].masked_fill_(later, -torch.inf)
            weights = logits.softmax(-1)
            yield pad(weights, (0, n - last)) if last < n else weights

    def unrotated(self, t: Tensor) -> Tensor:
        """t [..., T, D], q or K of the scored tokens, before its rotation."""
        if self.angles is None:
            return t
        cos, sin = self.rotation(-self.positions[: self.tokens])
        flat = t.reshape(1, -1, *t.shape[-2:])
        return torch.ops.kvc.rope(flat, cos, sin, style=self.style).view(t.shape)

    def looked(self, window: int) -> Tensor:
        """[H, G, window, T - window] in fp32: weights that the last queries give what is before."""
        first = self.tokens - window
        each = [w[..., :first] for w in self.weights(first, self.tokens)]
        return each[0] if len(each) == 1 else torch.cat(each, 2)

    @cached_property
    def rates(self) -> Tensor:
        """Rotary angle per position for each pair of channels, fp64 [R / 2]."""
        if self.angles is None:
            raise KVCompileError("the rotary angles of this model were not found")
        at = int(self.positions.argmax())
        angles = self.angles[at].double() / max(int(self.positions[at]), 1)
        first, second = (angles[::2], angles[1::2]) if self.style == "interleaved" else (
            angles.chunk(2) if len(angles) > 1 else (angles, -angles))
        return first if torch.equal(first, second) else angles  # each angle may stand twice

    def rotation(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin in fp32 [len(at), R] that turn a vector by `at` positions."""
        angles = at.double()[:, None] * self.rates
        if self.style == "interleaved":
            angles = angles.repeat_interleave(2, -1)
        else:
            angles = torch.cat([angles, angles], -1)
        return angles.cos().float(), angles.sin().float()


@dataclass(frozen=True)
class Held:
    """What a head holds of its tokens while decoding, in order: `positions` [T], and `read`, which
    decodes "k" or "v"."""

    positions: Tensor
    read: Callable[[str], Tensor]

    @cached_property
    def keys(self) -> Tensor:
        """[T, Dk] in fp32."""
        return self.read("k").float()

    @cached_property
    def values(self) -> Tensor:
        """[T, Dv] in fp32."""
        return self.read("v").float()
