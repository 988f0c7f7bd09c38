"""Scorers that read keys, values and positions alone, or queries that are yet to come."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvcompile.kernels.rotary import rope
from kvcompile.passes.scorers_attention import pooled, running
from kvcompile.prompt import Held, Prompt


@dataclass(frozen=True)
class Recency:
    """The newest tokens; with a rule's sinks StreamingLLM's choice."""

    name: ClassVar[str] = "recency"
    cpp: ClassVar[str] = "(float)position"
    needs: ClassVar[tuple[str, ...]] = ()

    def prompt(self, x: Prompt) -> Tensor:
        return x.positions[: x.tokens].float().expand(x.heads, -1)

    def arrive(self, keys: Tensor, positions: Tensor, ids: Tensor | None) -> Tensor:
        """Scores [B, H, S] of new tokens: keys [B, H, S, Dk], positions and token ids [B, S]."""
        return positions[:, None].float().expand(keys.shape[:3])


@dataclass(frozen=True)
class KeyNorm:
    """-|k|: keys of small norm attract attention."""

    name: ClassVar[str] = "keynorm"
    needs: ClassVar[tuple[str, ...]] = ()

    def prompt(self, x: Prompt) -> Tensor:
        return -x.keys.norm(dim=-1)

    def arrive(self, keys: Tensor, positions: Tensor, ids: Tensor | None) -> Tensor:
        return -keys.float().norm(dim=-1)


@dataclass(frozen=True)
class Random:
    """Uniform noise: what every other scorer has to beat."""

    seed: int = 0
    name: ClassVar[str] = "random"
    needs: ClassVar[tuple[str, ...]] = ()

    def prompt(self, x: Prompt) -> Tensor:
        random = torch.Generator().manual_seed(self.seed * 1000003 + x.layer)
        return torch.rand(x.heads, x.tokens, generator=random).to(x.k.device)


@dataclass(frozen=True)
class KeyDiff:
    """-cos(k, mean of the unit keys): keys that differ from the others stay."""

    name: ClassVar[str] = "keydiff"
    needs: ClassVar[tuple[str, ...]] = ()

    def prompt(self, x: Prompt) -> Tensor:
        return self._unlike(x.keys)

    def arrive(self, keys: Tensor, positions: Tensor, ids: Tensor | None) -> Tensor:
        """What `final` puts another score in place of."""
        return torch.zeros(keys.shape[:3], device=keys.device)

    def final(self, score: Tensor, held: Held) -> Tensor:
        return self._unlike(held.keys)

    @staticmethod
    def _unlike(keys: Tensor) -> Tensor:
        """[..., T] of keys [..., T, Dk]."""
        anchor = normalize(keys, dim=-1).mean(-2, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)


@dataclass(frozen=True)
class Expected:
    """ExpectedAttention: softmax of E[exp(scale q k)] for queries at the next `future` positions.

    They are taken to be Gaussian, with the mean and covariance of the prompt's (the first `sinks`
    left out) before rotation, rotated by the mean over those positions. With `values` the scores
    are times |v|.
    """

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    values: bool = True
    eps: float = 0.0
    name: ClassVar[str] = "expected"
    needs: ClassVar[tuple[str, ...]] = ("angles",)

    def prompt(self, x: Prompt) -> Tensor:
        sinks, tokens = min(self.sinks, x.tokens - 1), x.tokens
        keys, values = x.keys[:, sinks:], x.values[:, sinks:]
        q = x.unrotated(x.queries[:, :, :tokens])[:, :, sinks:]     # [H, G, T, D]
        mean = q.mean(2, keepdim=True)
        far = q - mean
        cov = far.transpose(-1, -2) @ far / q.shape[2]             # [H, G, D, D]
        if x.angles is not None:
            turn = self._average(x, q.shape[-1])
            mean, cov = mean @ turn.T, turn @ cov @ turn.T
        logits = (mean @ keys[:, None].transpose(-1, -2))[:, :, 0] * x.scale
        if self.covariance:
            logits = logits + torch.einsum("htd,hgde,hte->hgt", keys, cov, keys) * x.scale**2 / 2
        scores = logits.softmax(-1).mean(1)
        if self.values:
            scores = (scores + self.eps) * values.norm(dim=-1)
        out = torch.full((x.heads, tokens), torch.inf, device=scores.device)
        out[:, sinks:] = scores
        return out

    def _average(self, x: Prompt, dim: int) -> Tensor:
        """[D, D]: the mean rotation over the next positions; q -> q @ that.T."""
        next_ = int(x.positions[x.tokens - 1]) + 1
        cos, sin = x.rotation(torch.arange(next_, next_ + self.future))
        unit = torch.eye(dim)
        turned = [rope(unit[None], c[None], s[None], style=x.style)[0]
                  for c, s in ((cos.mean(0), sin.mean(0)),)]
        return turned[0].T.to(x.k.device)


@dataclass(frozen=True)
class Lag:
    """LagKV: how unlike the next `length` tokens a token's channels are, ranked among its own part.

    K and V alike: normalized by the next part's range of each channel, the deviation over channels,
    softmax over the part. The first `sinks` and the last part (with the rest) stay. While decoding
    a part gets its ranks when the next one is complete; parts are those of positions.
    """

    length: int = 128
    sinks: int = 4
    name: ClassVar[str] = "lag"
    waits: ClassVar[str] = ("compares the parts of a whole prompt; with decode=true each is cut "
                            "when the next one has come, in a later piece too")
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def window(self) -> int:
        return self.length

    @property
    def rest(self) -> int:
        return self.length - 1

    def prompt(self, x: Prompt) -> Tensor:
        parts = max(0, x.tokens - self.sinks) // self.length
        out = torch.full((x.heads, x.tokens), torch.inf, device=x.k.device)
        if parts < 2:                    # too short to compare: the newest stay
            out[:, self.sinks:] = x.positions[self.sinks : x.tokens].float() + 1   # above all ranks
            return out
        end = self.sinks + parts * self.length
        ranks = self._ranks(*(t[:, self.sinks : end].unflatten(1, (parts, self.length))
                              for t in (x.keys, x.values)))
        out[:, self.sinks : end - self.length] = ranks.flatten(1)
        return out

    def arrive(self, keys: Tensor, positions: Tensor, ids: Tensor | None) -> Tensor:
        return torch.full(keys.shape[:3], torch.inf, device=keys.device)

    def settle(self, score: Tensor, held: Held) -> Tensor:
        """Ranks of the complete parts that have none yet and that a complete one follows."""
        new = ((score >= 1) & (held.positions >= self.sinks)).nonzero().flatten()
        if len(new) < 2 * self.length:
            return score
        parts = (held.positions[new] - self.sinks).long() // self.length
        first = int(parts[0])
        whole = parts.bincount()[first:] == self.length
        pairs = (whole[:-1] & whole[1:]).nonzero().flatten() + first
        out = score.clone()
        for part in pairs.tolist():
            own, after = (new[parts == p] for p in (part, part + 1))
            out[own] = self._ranks(*(torch.stack([t[own], t[after]])[None]
                                     for t in (held.keys, held.values)))[0, 0]
        return out

    def _ranks(self, k: Tensor, v: Tensor) -> Tensor:
        """[H, parts - 1, length]: 0, 1 / length, .. of K and V [H, parts, length, D], as each part
        but the last is unlike the next one."""
        both = (self._unlike(k) + self._unlike(v)) / 2
        return both.argsort(-1).argsort(-1) / self.length

    @staticmethod
    def _unlike(parts: Tensor) -> Tensor:
        after, own = parts[:, 1:], parts[:, :-1]
        low, high = after.amin(2, keepdim=True), after.amax(2, keepdim=True)
        return ((own - low) / (high - low)).std(-1).softmax(-1)


@dataclass(frozen=True)
class Filter:
    """Q-Filters: -<u, k> for a direction u of each kv head, found by calibration."""

    directions: tuple
    name: ClassVar[str] = "filter"
    needs: ClassVar[tuple[str, ...]] = ()

    def unfit(self, heads: int, dim: int) -> str:
        sizes = {len(u) for u in self.directions}
        return "" if len(self.directions) == heads and sizes == {dim} else (
            f"{len(self.directions)} directions of {' or '.join(map(str, sorted(sizes)))} channels "
            f"for a layer of {heads} kv heads of {dim}")

    def prompt(self, x: Prompt) -> Tensor:
        u = torch.tensor(self.directions, dtype=torch.float32, device=x.k.device)
        return -(x.keys * u[:, None]).sum(-1)


@dataclass(frozen=True)
class Redundant:
    """R-KV: mix * importance - (1 - mix) * redundancy.

    Importance is the mean weight from the last `window` queries, the softmax over the tokens before
    them of a kv head's largest logits, smoothed by a maximum; redundancy the softmax of the mean
    cosine to all other keys, where each key's newest near-duplicate (cosine above `alike`) is not
    counted against it; a key that has none spares the first token, as in the authors' code. The
    window itself stays.
    """

    mix: float = 0.1
    window: int = 8
    kernel: int = 7
    alike: float = 0.5
    name: ClassVar[str] = "redundant"
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def looks(self) -> int:
        return self.window

    def prompt(self, x: Prompt) -> Tensor:
        window = min(self.window, x.tokens)
        first = x.tokens - window
        logits = x.queries[:, :, first : x.tokens] @ x.keys[:, None, :first].mT * x.scale
        if x.softcap:
            logits = x.softcap * torch.tanh(logits / x.softcap)
        weight = pooled(logits.amax(1).softmax(-1).mean(1), self.kernel, "max")
        final = self.mix * weight - (1 - self.mix) * redundancy(x.keys, self.alike)[:, :first]
        out = torch.full((x.heads, x.tokens), torch.inf, device=x.k.device)
        out[:, :first] = final
        return out

    def observe(self, score: Tensor, mass: Tensor, new: Tensor) -> Tensor:
        return running(score, mass, new, self.window)

    def final(self, score: Tensor, held: Held) -> Tensor:
        weight = pooled(score, self.kernel, "max")
        return self.mix * weight - (1 - self.mix) * redundancy(held.keys[None], self.alike)[0]


def redundancy(keys: Tensor, alike: float) -> Tensor:
    """[H, T]: softmax over tokens of the mean cosine of keys [H, T, D] to the others."""
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    tokens, at = keys.shape[1], torch.arange(keys.shape[1], device=keys.device)
    total = torch.zeros(keys.shape[:2], device=keys.device)
    for start in range(0, tokens, 256):  # some rows of the cosines at a time
        rows = torch.arange(start, min(tokens, start + 256), device=keys.device)
        cos = unit[:, rows] @ unit.transpose(1, 2)
        cos.masked_fill_(rows[:, None] == at, 0.0)
        newest = torch.where(cos > alike, at, 0).amax(-1, keepdim=True)
        total += cos.scatter(-1, newest, 0.0).sum(1)
    return (total / tokens).softmax(-1)


SCORERS = (Recency, KeyNorm, Random, KeyDiff, Expected, Lag, Filter, Redundant)
