"""Attention of one row's queries over dense K and V: the arithmetic that every kernel must match.

    o = softmax(softcap(scale q K^T) [, sinks]) V,   lse = log of the softmax's denominator

q [Hq, S, Dk], K [H, T, Dk], V [H, T, Dv]; query head i reads kv head i // (Hq / H). V may have
fewer heads than K, each for several of K's (latents of a group of heads). The queries
are the last S of the T tokens: query i sees tokens up to T - S + i, and with a window the last
`window` of those only.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

CHUNK = 256  # query rows at a time where logits are formed explicitly


def visible(queries: int, tokens: int, window: int, start: int, device: torch.device) -> Tensor:
    """[rows, tokens] bool for query rows start, start + 1, ...: causal, and inside the window."""
    q = torch.arange(start, queries, device=device)[:, None] + (tokens - queries)
    t = torch.arange(tokens, device=device)[None]
    return (t <= q) & (t > q - window) if window else t <= q


def attend_row(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float,
               sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(o [Hq, S, Dv] in q's dtype, lse [Hq, S] in fp32)."""
    (hq, s, _), (h, t, _) = q.shape, k.shape
    folded = q.reshape(h, hq // h, s, q.shape[-1])
    outs, lses = [], []
    for start in range(0, s, CHUNK):
        rows = folded[:, :, start : start + CHUNK].float()
        end = min(s, start + CHUNK) + t - s                     # later tokens are not seen
        low = max(0, start + t - s - window + 1) if window else 0
        logits = torch.einsum("hgsd,htd->hgst", rows, k[:, low:end].float()) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if s > 1 or window:
            seen = visible(s, t, window, start, q.device)[: rows.shape[2], low:end]
            logits = logits.masked_fill(~seen, -torch.inf)
        lse = logits.logsumexp(-1)
        if sinks is not None:                                   # a logit that has no value
            lse = torch.logaddexp(lse, sinks.float().view(h, hq // h, 1))
        weights = torch.exp(logits - lse[..., None]).view(v.shape[0], -1, *logits.shape[2:])
        outs.append(torch.einsum("hgst,htd->hgsd", weights, v[:, low:end].float()))
        lses.append(lse)
    o = torch.cat(outs, 2).reshape(hq, s, v.shape[-1]).to(q.dtype)
    return o, torch.cat(lses, 2).reshape(hq, s)


def mass(q: Tensor, k: Tensor, lse: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """[H, T]: what each token gets of the softmax weights, summed over its kv head's queries."""
    total = k.new_zeros(k.shape[:2], dtype=torch.float32)
    for w, _ in _weights(q, k, lse, scale, window, softcap):
        total += w.sum((1, 2))
    return total


def low(q: Tensor, k: Tensor, lse: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """[H, T]: how many queries give a token that they see less than its share, by the mean over the
    query heads; times these."""
    total = k.new_zeros(k.shape[:2], dtype=torch.float32)
    for w, seen in _weights(q, k, lse, scale, window, softcap):
        total += ((w.mean(1) < 1 / seen.sum(1, keepdim=True)) & seen).sum(1) * w.shape[1]
    return total


def _weights(q: Tensor, k: Tensor, lse: Tensor, scale: float, window: int, softcap: float
             ) -> Iterator[tuple[Tensor, Tensor]]:
    """Softmax weights [H, G, rows, T] of some queries at a time, and what they see [rows, T]."""
    (hq, s, _), (h, t, _) = q.shape, k.shape
    folded = q.reshape(h, hq // h, s, -1)
    for start in range(0, s, CHUNK):
        rows = folded[:, :, start : start + CHUNK].float()
        logits = torch.einsum("hgsd,htd->hgst", rows, k.float()) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        seen = visible(s, t, window, start, q.device)[: rows.shape[2]]
        own = lse.view(h, hq // h, s, 1)[:, :, start : start + CHUNK]
        yield torch.exp(logits - own).masked_fill(~seen, 0), seen


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float,
           sinks: Tensor | None) -> Tensor:
    """o [B, Hq, S, Dv] for S queries that are all the tokens there are; torch's SDPA if it can."""
    return tokens_first(_causal(q, k, v, scale, window, softcap, sinks))


def tokens_first(x: Tensor) -> Tensor:
    """x [B, H, S, D] laid out as [B, S, H, D], which is what kvc.attention promises."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float,
            sinks: Tensor | None) -> Tensor:
    plain = not softcap and sinks is None and (not window or window >= k.shape[2])
    values = v.shape[-1]
    if plain:
        q, k, v = (_wide(x, max(q.shape[-1], values)) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return sdpa(q, k, v, is_causal=True, scale=scale)[..., :values]
    rows = [attend_row(*x, scale, window, softcap, sinks)[0] for x in zip(q, k, v, strict=True)]
    return torch.stack(rows)


def _wide(x: Tensor, dim: int) -> Tensor:
    """x with channels of zeros up to `dim`: the fused kernel takes K and V of one width."""
    return x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1]))


def decode(q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, scale: float,
           softcap: float, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """One query [Hq, 1, Dk] over what is stored, k and v [H, T, D], and over its own token.

    The two are merged by their log-sum-exps, so that what is stored is read where it lies.
    """
    hq, h = q.shape[0], k.shape[0]
    own = (q.view(h, hq // h, -1).float() * k_new.float()).sum(-1).view(hq, 1) * scale
    if softcap:
        own = softcap * torch.tanh(own / softcap)
    value = v_new.expand(-1, hq // v_new.shape[0], -1).reshape(hq, 1, -1)
    if k.shape[1] == 0:
        o, lse = value, own
    else:
        o, lse = _one_query(q, k, v, scale, softcap)
        share = torch.sigmoid(own - lse)[..., None]
        o = torch.lerp(o.float(), value.float(), share)
        lse = torch.logaddexp(lse, own)
    if sinks is not None:
        sink = sinks.float()[:, None]
        o = o * torch.sigmoid(lse - sink)[..., None]
        lse = torch.logaddexp(lse, sink)
    return o.to(q.dtype), lse


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float
               ) -> tuple[Tensor, Tensor]:
    """`attend_row` without mask or sinks, by torch's fused CPU kernel where it applies."""
    hq, h = q.shape[0], k.shape[0]
    if softcap or v.shape[::2] != (h, q.shape[-1]) or q.device.type != "cpu":
        return attend_row(q, k, v, scale, 0, softcap, None)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.reshape(1, h, hq // h, -1), k[None], v[None], 0.0, False, scale=scale)
    return o.reshape(hq, 1, -1), lse.reshape(hq, 1).float()
