"""The bodies of kvc.rest and kvc.beside, and what eviction adds: one slot for all that was dropped.

RazorAttention's compensation token (arXiv:2407.15891, equations 4 and 5): the mean K and V of the
tokens that a head has dropped enter the softmax with the weight of so many tokens.
"""

import torch
from torch import Tensor

from kvcompile.format import PAGE
from kvcompile.ir import body
from kvcompile.kernels.pages import OWN, Tier
from kvcompile.store import SIDES, Store


@body("rest")
def rest(k: Tensor, v: Tensor, columns: Tensor, valid: Tensor, hints: Tensor
         ) -> tuple[Tensor, Tensor, Tensor]:
    """Means [B, H, Dk] and [B, H, Dv] in fp32 of the valid tokens of a prompt k, v [B, H, S, D]
    that are not among `columns` [B, H, S'] (-1: none), and their number, int32 [B, H].

    `hints` as kvc.score's: columns at the end that are only read are no tokens of the prompt.
    """
    tokens = k.shape[2] - int(hints[0])
    held = torch.zeros(*k.shape[:2], tokens + 1, dtype=torch.bool, device=k.device)
    held.scatter_(2, torch.where(columns < 0, tokens, columns).long(), True)
    gone = valid[:, None, :tokens] & ~held[..., :tokens]
    count = gone.sum(-1, dtype=torch.int32)
    means = ((x[:, :, :tokens].float() * gone[..., None]).sum(2) / count.clamp(min=1)[..., None]
             for x in (k, v))
    return next(means), next(means), count


@body("beside", inline=True)
def beside(q: Tensor, o: Tensor, lse: Tensor, k: Tensor, v: Tensor, count: Tensor, *, scale: float,
           softcap: float = 0.0, slot: int = 0, at: Tensor | None = None) -> Tensor:
    """Attention o [B, Hq, S, Dv] with the log-sum-exp lse [B, Hq, S] over other tokens, and over
    one more of weight `count`.

    k, v [L, B, H, D] and count [L, B, H] are a group's; `slot` is the layer's, or `at` [2] where
    one graph serves several.
    """
    pick = (lambda x: x[slot]) if at is None else (
        lambda x: x.index_select(0, at[:1].long())[0])
    k, v, count = pick(k), pick(v), pick(count)
    queries = q.float().unflatten(1, (k.shape[1], -1))                    # [B, H, G, S, Dk]
    logit = (queries * k[:, :, None, None]).sum(-1) * scale
    if softcap:
        logit = softcap * torch.tanh(logit / softcap)
    logit = (logit + count.float().log()[:, :, None, None]).flatten(1, 2)
    total = torch.logaddexp(lse, logit)
    there = lse > -torch.inf                                              # padding sees nothing
    old, new = (torch.where(there, (x - total).exp(), 0.0).transpose(1, 2)[..., None]
                for x in (lse, logit))                                    # [B, S, Hq, 1]
    group = q.shape[1] // k.shape[1]
    value = v[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)[:, None]
    return (o.transpose(1, 2) * old + value * new).to(o.dtype).transpose(1, 2)


def fold(store: Store, named: dict[str, Tensor], gone: Tensor, dims: tuple[int, int],
         dtype: torch.dtype) -> None:
    """Tokens that are about to leave the body, bool [N, slots], go into the slot of their head.

    `named` are the store's planes, a row for each of the N heads.
    """
    each = gone.unflatten(1, (-1, PAGE))
    head, page = each.any(-1).nonzero(as_tuple=True)
    if not len(head):
        return
    count, new = named["rest_count"], gone.sum(1, dtype=torch.int32)
    rows = {n: p[None] if n.endswith(OWN) else p for n, p in named.items()}
    for side, dim in zip(SIDES, dims, strict=True):
        tier = Tier(store, side, "body", rows, dim, dtype)
        total = torch.zeros(len(count), dim, device=gone.device)
        for heads, fmt in tier.alike(0, slice(0, len(count))):
            own = (head >= heads.start) & (head < heads.stop)
            if bool(own.any()):
                at = head[own], page[own]
                x = tier.decode(fmt, tier.table[0][at][:, None]).float()
                total.index_add_(0, at[0], (x * each[at][..., None]).sum(1))
        mean = named[f"rest_{side}"]
        mean += (total - new[:, None] * mean) / (count + new).clamp(min=1)[:, None]
    count += new
