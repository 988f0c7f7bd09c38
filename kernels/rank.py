"""The body of kvc.rank: which tokens of a block are its first ones, by score.

Nothing leaves a layer with tiers, and tokens enter its body in blocks of 128: a format that stores
the first ones of a block better than the others is given the salient ones there. So how many tokens
are in which tier depends on their number alone, and readers and writers know of no scores.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from kvcompile.format import PAGE
from kvcompile.ir import body
from kvcompile.kernels import pages
from kvcompile.kernels.evict import Heads, heads_of, write
from kvcompile.rule import Rule
from kvcompile.store import SLOTS, Span, Store


def front(score: Tensor, salient: int) -> Tensor:
    """The order [..., T] in which tokens of these scores, whole blocks, are stored: of every block
    first `salient` of those with the highest scores of all T, then others, each as they came. Of
    equals the earlier one is salient."""
    blocks = score.shape[-1] // PAGE
    ranked = score.argsort(dim=-1, descending=True, stable=True)
    both = ranked.split([blocks * salient, blocks * (PAGE - salient)], -1)
    return torch.cat([x.sort(-1).values.unflatten(-1, (blocks, -1)) for x in both], -1).flatten(-2)


def entering(score: Tensor, salient: int) -> Tensor:
    """`front` of the blocks that T tokens fill; behind them the others, as they came."""
    full = score.shape[-1] // PAGE * PAGE
    waiting = torch.arange(full, score.shape[-1], device=score.device)
    if not full:
        return waiting.expand(score.shape)
    return torch.cat([front(score[..., :full], salient), waiting.expand(*score.shape[:-1], -1)], -1)


@body("rank")
def rank(planes: list[Tensor], mass: list[Tensor], k: list[Tensor], v: list[Tensor],
         positions: Tensor, valid: Tensor, *, store: str, rules: list[str], slots: list[int],
         group: int = 1) -> tuple[Tensor, Tensor]:
    """Note the scores of a call's tokens and of those that wait in the recent tier, and put those
    that will leave it in order; K [L, B, H, S, Dk] and V that kvc.append is then to store.

    `mass` is what kvc.attend says that tokens got, for each of the L layers; `group` the query
    heads of a kv head. What waits changes places in the recent tier, exactly as it is.
    """
    parsed, new = Store.parse(store), [torch.stack(x) for x in (k, v)]
    runs = groupby(range(len(slots)), lambda i: str(Rule.parse(rules[i]).score))
    for own in ([*run] for _, run in runs):
        layers, rule = slice(own[0], own[-1] + 1), Rule.parse(rules[own[0]])
        got = torch.stack(mass[layers]) / group
        for row, keep in enumerate(valid):
            columns = keep.nonzero().flatten()
            if len(columns):
                ids = positions.expand(len(valid), -1)[row, columns]
                _row(parsed, rule, planes, slots[layers], row, columns, ids, got[:, row],
                     [x[layers, row] for x in new])
    return new[0], new[1]


def _row(store: Store, rule: Rule, planes: list[Tensor], slots: Sequence[int], row: int,
         columns: Tensor, ids: Tensor, mass: Tensor, new: Sequence[Tensor]) -> None:
    """One row of some layers: mass [L, H, places]; new K and V [L, H, S, D], views."""
    dims, dtype, many = (new[0].shape[-1], new[1].shape[-1]), new[0].dtype, new[0].shape[:2]
    named = pages.named(store.planes(dims, dtype), planes, slots)
    n, more = int(named["count"][row, 0]), len(columns)    # of all heads: none drops a token
    first = n // PAGE * PAGE
    waiting, end = n - first, n + more

    table = named[f"{SLOTS}.all.table"][row, :, first // PAGE : -(-end // PAGE)].long()
    pools = [named[f"{SLOTS}.all.{name}"] for name in ("position", "score")]
    at, score = (pool[table].flatten(1)[:, : end - first].unflatten(0, many) for pool in pools)
    at[..., waiting:] = ids.int()
    score = noted(rule, score, mass[..., first:end], waiting, end - first)
    order = entering(score, rule.salient)
    for pool, x in zip(pools, (at, score), strict=True):
        whole = pool[table].flatten(1)
        whole[:, : end - first] = x.gather(-1, order).flatten(0, 1)
        pool[table] = whole.unflatten(1, (-1, PAGE))
    if end - first < PAGE:
        return

    for side, dim, x in zip(store.sides, dims, new, strict=False):
        recent = pages.tiers(store, side, named, dim, dtype)["recent"]
        heads = slice(0, many.numel())
        old = recent.read(row, heads, Span(first, n)).unflatten(0, many)
        both = torch.cat([old, x[:, :, columns]], 2)
        both = both.gather(2, order[..., None].expand_as(both))
        if waiting:
            recent.write(row, heads, first, both[:, :, :waiting].flatten(0, 1))
        x[:, :, columns] = both[:, :, waiting:]


def one_token(planes: list[Tensor], mass: list[Tensor], k: list[Tensor], v: list[Tensor],
              positions: Tensor, valid: Tensor, *, store: str, rules: list[str], slots: list[int],
              group: int = 1) -> tuple[Tensor, Tensor]:
    """As `rank` of one token a row, and no value is looked at on the host: what waits is put in
    order, and the result thrown away where its block is not full. A CUDA graph can hold it."""
    parsed, new = Store.parse(store), [torch.stack(x) for x in (k, v)]
    dims, dtype = (new[0].shape[-1], new[1].shape[-1]), new[0].dtype
    runs = groupby(range(len(slots)), lambda i: str(Rule.parse(rules[i]).score))
    for own in ([*run] for _, run in runs):
        layers = slice(own[0], own[-1] + 1)
        heads = heads_of(parsed, dims, dtype, planes, slice(slots[own[0]], slots[own[-1]] + 1),
                         waits=False)
        many = new[0][layers].shape[:3]
        ids, live = (x[:, 0].expand(many[1])[None, :, None].expand(many).flatten()
                     for x in (positions, valid))
        _block(heads, Rule.parse(rules[own[0]]), ids, live,
               torch.stack(mass[layers]).flatten(0, 2) / group, [x[layers] for x in new])
    return new[0], new[1]


def _block(heads: Heads, rule: Rule, ids: Tensor, live: Tensor, mass: Tensor,
           new: Sequence[Tensor]) -> None:
    """The block that waits in each of N heads: `ids` and `live` [N] are of their new tokens, `mass`
    [N, places] what all tokens got; new K and V [L, B, H, 1, D], views."""
    store, number = heads.store, heads.count.long()
    at, place = number % PAGE, torch.arange(PAGE, device=ids.device)
    fresh, held = place == at[:, None], live[:, None] & (place <= at[:, None])    # [N, PAGE]
    full = live & (at == PAGE - 1)

    page = _page(heads, f"{SLOTS}.all", number)
    pools = [heads.named[f"{SLOTS}.all.{name}"] for name in ("position", "score")]
    known, score = (pool[page] for pool in pools)
    got = mass.gather(1, ((number - at)[:, None] + place).clamp(max=mass.shape[1] - 1))
    score = noted(rule, score, torch.where(held, got, 0.0), at[:, None], at[:, None] + 1)
    order = torch.where(full[:, None], front(torch.where(held, score, 0.0), rule.salient), place)
    known = torch.where(fresh, ids[:, None].int(), known)
    for pool, x in zip(pools, (known, score), strict=True):
        write(pool, (page,), x.gather(1, order).to(pool.dtype), held)

    back = (full[:, None] & (place < at[:, None]))[..., None]
    for side, x in zip(store.sides, new, strict=False):
        page = _page(heads, f"{side}.recent", number, store.ring(side, "recent"))
        [pool] = (heads.named[f"{side}.recent.{name}"] for name in
                  store.format(side, "recent").planes(x.shape[-1], x.dtype, side))
        own = x.reshape(-1, 1, x.shape[-1])
        both = torch.where(fresh[..., None], own, pool[page])
        both = both.gather(1, order[..., None].expand_as(both))
        write(pool, (page,), both, back)
        x.copy_(torch.where(full[:, None, None], both[:, -1:], own).view_as(x))


def _page(heads: Heads, tier: str, number: Tensor, ring: int | None = None) -> Tensor:
    """The pages [N] of a tier that hold the tokens `number`, int64; some page where there is none.
    """
    table = heads.table(tier)
    index = number // PAGE % (ring // PAGE) if ring else number // PAGE
    return table.gather(1, index.clamp(max=table.shape[1] - 1)[:, None])[:, 0].long()


def noted(rule: Rule, score: Tensor, mass: Tensor, waiting: int | Tensor, tokens: int | Tensor
          ) -> Tensor:
    """Scores [..., T] after a call that gave tokens `mass`; the first `waiting` of `tokens` are
    older. What lies behind the tokens is no score."""
    numbers = torch.arange(score.shape[-1], device=score.device)
    fresh = (numbers >= waiting) & (numbers < tokens)
    if not hasattr(rule.scorer, "averaged"):
        return torch.as_tensor(rule.scorer.observe(score, mass, fresh))
    seen = tokens - numbers                      # queries that have seen a token, itself included
    queries = seen.clamp(max=tokens - waiting)             # those of this call
    return torch.as_tensor(rule.scorer.averaged(torch.where(fresh, 0.0, score), mass, seen,
                                                queries))

