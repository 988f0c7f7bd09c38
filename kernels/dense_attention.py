"""Attention of one row's queries over dense K and V: the arithmetic that every kernel must match.

    o = softmax(softcap(scale q K^T) [, sinks]) V,   lse = log of the softmax's denominator

q [Hq, S, Dk], K [H, T, Dk], V [H, T, Dv]; query head i reads kv head i // (Hq / H). The queries
are the last S of the T tokens: query i sees tokens up to T - S + i, and with a window the last
`window` of those only.
"""

import torch
from torch import Tensor
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
        weights = torch.exp(logits - lse[..., None])
        outs.append(torch.einsum("hgst,htd->hgsd", weights, v[:, low:end].float()))
        lses.append(lse)
    o = torch.cat(outs, 2).reshape(hq, s, v.shape[-1]).to(q.dtype)
    return o, torch.cat(lses, 2).reshape(hq, s)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float,
           sinks: Tensor | None) -> Tensor:
    """o [B, Hq, S, Dv] for S queries that are all the tokens there are; torch's SDPA if it can."""
    plain = not softcap and sinks is None and (not window or window >= k.shape[2])
    if plain and q.shape[-1] == v.shape[-1]:
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return sdpa(q, k, v, is_causal=True, scale=scale)
    rows = [attend_row(*x, scale, window, softcap, sinks)[0] for x in zip(q, k, v, strict=True)]
    return torch.stack(rows)


def last(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float,
         sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """`attend_row`, by torch's fused CPU kernel for one plain query of a decode step."""
    (hq, s, d), h = q.shape, k.shape[0]
    fused = (s == 1 and not softcap and not window and v.shape[-1] == d and q.device.type == "cpu")
    if not fused:
        return attend_row(q, k, v, scale, window, softcap, sinks)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.view(1, h, hq // h, d), k[None], v[None], 0.0, False, scale=scale)
    o, lse = o.reshape(hq, 1, d), lse.reshape(hq, 1).float()
    if sinks is not None:
        sink = sinks.float()[:, None]
        o = (o * torch.sigmoid(lse - sink)[..., None]).to(q.dtype)
        lse = torch.logaddexp(lse, sink)
    return o, lse
