"""The body of kvc.evict: per-slot scores, and dropping tokens of heads that hold too many.

Where every token is stored by itself, the last ones take the places of those that are dropped:
numbers then no longer follow arrival, and `position` tells them apart. Where tokens are encoded in
groups or wait before they are encoded, whole pages of the body leave and the later pages move up in
the page tables. Nothing is ever encoded again, and no memory is taken or freed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby

import torch
from torch import Tensor

from kvcompile.format import PAGE, StepPlane
from kvcompile.format import Side as SideName
from kvcompile.ir import body
from kvcompile.kernels import pages
from kvcompile.kernels.rest import fold
from kvcompile.prompt import Held
from kvcompile.rule import Rule
from kvcompile.store import SIDES, SLOTS, Store

LAST = torch.iinfo(torch.int32).max  # a position that no token has


@dataclass(frozen=True)
class Heads:
    """Planes of some layers, one row for each of their N (layer, row, head): views.

    If nothing `waits`, no value is looked at on the host: what has nothing to do is done all the
    same, and a CUDA graph can hold it.
    """

    store: Store
    named: dict[str, Tensor]
    waits: bool = True

    @property
    def count(self) -> Tensor:
        return self.named["count"]

    def table(self, tier: str) -> Tensor:
        return self.named[f"{tier}.table"]

    def slots(self, name: str) -> Tensor:
        """What is known of every slot: [N, slots], a copy."""
        return self.named[f"slots.all.{name}"][self.table("slots.all").long()].flatten(1)

    def put(self, name: str, index: tuple[Tensor, ...], values: Tensor,
            only: Tensor | None = None) -> None:
        """Write values of the slots (head, number), or `only` some of them."""
        head, number = index
        page = self.table("slots.all")[head, number // PAGE].long()
        write(self.named[f"slots.all.{name}"], (page, number % PAGE), values, only)


def write(pool: Tensor, index: tuple[Tensor, ...], values: Tensor, only: Tensor | None) -> None:
    """pool[index] = values, or `only` some of them: to the bits of the others 0 is added, wherever
    they lie, so that the host need not know which they are."""
    if only is None:
        pool[index] = values
        return
    bits = pool.view(torch.int32)
    more = values.contiguous().view(torch.int32) - bits[index]
    bits.index_put_(index, torch.where(only, more, 0), accumulate=True)


Mover = Callable[[Heads, tuple[int, int], torch.dtype, Tensor], None]


def heads_of(store: Store, dims: tuple[int, int], dtype: torch.dtype, planes: Sequence[Tensor],
             layers: slice, waits: bool = True) -> Heads:
    """The planes of neighbouring layers."""
    named = {spec.name: p if spec.shape else p[layers].flatten(0, 2)
             for spec, p in zip(store.planes(dims, dtype), planes, strict=True)}
    return Heads(store, named, waits)


@body("evict")
def evict(planes: list[Tensor], mass: list[Tensor], k: list[Tensor], v: list[Tensor],
          positions: Tensor, valid: Tensor, *, store: str, rules: list[str], slots: list[int],
          group: int = 1, ids: Tensor | None = None) -> None:
    """Note the call's tokens, which kvc.append has stored, and drop tokens of full heads.

    `mass` is, for each layer of which scores change, what kvc.attend says that tokens got; `group`
    the query heads of a kv head. A head that holds its limit + `every` tokens goes back to its
    limit, by score; of equals the older token goes. `k`, `v` and `ids` [B, S] are the call's.
    """
    run(planes, mass, k, v, positions, valid, store=store, rules=rules, slots=slots, group=group,
        ids=ids)


def run(planes: list[Tensor], mass: list[Tensor], k: list[Tensor], v: list[Tensor],
        positions: Tensor, valid: Tensor, *, store: str, rules: list[str], slots: list[int],
        group: int = 1, ids: Tensor | None = None, mover: Mover | None = None,
        waits: bool = True) -> None:
    """As kvc.evict; `mover` moves tokens in place of `move`. `waits`: as of `Heads`."""
    if waits and not bool(valid.any()):
        return
    parsed, dims, dtype = Store.parse(store), (k[0].shape[-1], v[0].shape[-1]), k[0].dtype
    rest = list(mass)
    for own in alike(rules):
        rule, layers = Rule.parse(rules[own[0]]), slice(slots[own[0]], slots[own[-1]] + 1)
        seen, rest = (rest[: len(own)], rest[len(own):]) if rule.observes else ([], rest)
        heads = heads_of(parsed, dims, dtype, planes, layers, waits)
        new = _note(heads, rule, seen, torch.stack([k[i] for i in own]), positions, valid, group,
                    ids)
        if new is not None:
            drop(heads, rule, new, dims, dtype, k[0].shape[1], mover or move)


def alike(rules: Sequence[str]) -> list[list[int]]:
    """Runs of neighbouring layers whose tokens are dropped alike."""
    keys = [(str(r.score), r.every, r.sinks, r.recent,
             hasattr(r.budgeter, "below") and str(r.budget)) for r in map(Rule.parse, rules)]
    return [[*run] for _, run in groupby(range(len(keys)), key=keys.__getitem__)]


def tables(store: Store, dims: tuple[int, int], dtype: torch.dtype
           ) -> dict[str, dict[str, StepPlane]]:
    """Page tables -> the planes whose pages they name, by the names that `Store.planes` gives."""
    found = {}
    for side, dim in zip(SIDES, dims, strict=True):
        for tier in store.tiers(side):
            planes = store.format(side, tier).planes(dim, dtype, side)
            found[f"{side}.{tier}.table"] = {f"{side}.{tier}.{n}": p for n, p in planes.items()}
    known = {spec.name: StepPlane(spec.dtype, ()) for spec in store.planes(dims, dtype)
             if spec.name.startswith(f"{SLOTS}.") and spec.shape}
    return {**found, f"{SLOTS}.all.table": known}


def _note(heads: Heads, rule: Rule, mass: list[Tensor], k: Tensor, positions: Tensor,
          valid: Tensor, group: int, ids: Tensor | None) -> Tensor | None:
    """Write the positions of new tokens and everybody's scores; the newest position of each head,
    or None if no head is full. k [L, B, H, S, D]."""
    layers, batch, kv, tokens, _ = k.shape
    row = torch.arange(batch, device=valid.device)[:, None].expand(-1, kv)
    row = row.expand(layers, -1, -1).flatten()                                # of each head
    more = valid.sum(1)[row]
    before = heads.count - more
    number = before[:, None] + valid.cumsum(1)[row] - 1                       # [N, S]
    at: tuple[Tensor, ...] = ()
    only = None
    if heads.waits:
        at = valid[row].nonzero(as_tuple=True)
        slot = (at[0], number[at].long())
    else:
        only = valid[row]
        every = torch.arange(len(row), device=valid.device)[:, None].expand_as(number)
        slot = (every, number.clamp_min(0).long())
    heads.put("position", slot, positions.expand(batch, -1)[row][at].int(), only)
    if hasattr(rule.scorer, "arrive"):
        at_, ids = (x if x is None else x.expand(batch, -1) for x in (positions, ids))
        each = torch.stack([rule.scorer.arrive(x, at_, ids) for x in k])
        heads.put("score", slot, each.flatten(0, 2)[at], only)
    if mass:
        score = heads.slots("score")
        got = torch.stack(mass).flatten(0, 2) / group
        got = torch.nn.functional.pad(got, (0, max(0, score.shape[1] - got.shape[1])))
        held = torch.arange(score.shape[1], device=score.device)
        fresh = (held >= before[:, None]) & (held < heads.count[:, None])
        got = torch.where(held < heads.count[:, None], got[:, : score.shape[1]], 0.0)
        score = torch.where((more > 0)[:, None],
                            rule.scorer.observe(score, got, fresh), score)
        table = heads.table("slots.all").long()
        used = (held < heads.count[:, None]).unflatten(1, (-1, PAGE))[..., 0]  # pages in use
        score = score.unflatten(1, (-1, PAGE))
        if heads.waits:
            heads.named["slots.all.score"][table[used]] = score[used]
        else:
            write(heads.named["slots.all.score"], (table,), score, used[..., None])
    over = heads.count.long() - heads.named["limit"]
    slack = rule.every if movable(heads.store) else PAGE
    if heads.waits and not hasattr(rule.budgeter, "below") and not bool((over >= slack).any()):
        return None
    newest = torch.where(valid, positions.expand(batch, -1), -1).amax(1)
    return newest[row]


def waiting(store: Store, rules: Sequence[str], tokens: int) -> str:
    """Why eviction has to look at values on the host; ``""`` if shapes alone decide."""
    if tokens != 1:
        return "a call of several tokens may hold padding"
    if store.rest:
        return "what leaves is read and added up"
    scorers = [Rule.parse(rule).scorer for rule in rules]
    return next((f"{x.name} reads keys or a list of ids" for x in scorers
                 if hasattr(x, "final") or hasattr(x, "settle") or "ids" in x.needs), "")


def movable(store: Store) -> bool:
    """Whether each token is stored by itself, so that it can be moved."""
    return all(store.tiers(s) == ("body",) and store.side(s).format.step == 1 for s in SIDES)


def drop(heads: Heads, rule: Rule, newest: Tensor, dims: tuple[int, int], dtype: torch.dtype,
         kv: int, mover: Mover) -> None:
    """Drop what heads hold beyond their limits; `newest` [N]: the position of their last token."""
    score, position = heads.slots("score"), heads.slots("position")
    held = torch.arange(score.shape[1], device=score.device) < heads.count[:, None]
    limit = heads.named["limit"].long()
    over = heads.count.long() - limit
    if hasattr(rule.scorer, "settle"):
        for head, at, own in _held(heads, heads.count > 0, position, dims, dtype):
            old = score[head, at]
            if (new := rule.scorer.settle(old, own)) is not old:
                score[head, at] = new
                heads.put("score", (torch.full_like(at, head), at), new)
    if hasattr(rule.scorer, "final"):
        slack = rule.every if movable(heads.store) else PAGE
        full = heads.count > 0 if hasattr(rule.budgeter, "below") else over >= slack
        for head, at, own in _held(heads, full, position, dims, dtype):
            score[head, at] = rule.scorer.final(score[head, at], own)
    if getattr(rule.scorer, "shared", False):
        score = score.unflatten(0, (-1, kv)).mean(1, keepdim=True).expand(-1, kv, -1).flatten(0, 1)
    recent = (limit * rule.recent).long() if isinstance(rule.recent, float) else rule.recent
    safe = position > (newest - recent)[:, None]
    first = torch.where(held, position, LAST).amin(1, keepdim=True)
    safe |= position < first + rule.sinks
    score = torch.where(held & ~safe, score, torch.inf)
    if hasattr(rule.budgeter, "below"):
        score, over = rule.budgeter.below(score, position, newest, limit)
        over = over.minimum(heads.count - 1)                          # no head is emptied
    if movable(heads.store):
        _tokens(heads, rule, score, position, over, dims, dtype, mover)
    else:
        _pages(heads, score, over, dims, dtype)


def _held(heads: Heads, which: Tensor, position: Tensor, dims: tuple[int, int],
          dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Held]]:
    """(head, numbers of its tokens in order, what it holds of them) of the heads `which` [N]."""
    named = {name: p[None] if name.endswith(pages.OWN) else p
             for name, p in heads.named.items()}

    def read(head: int, at: Tensor, side: SideName) -> Tensor:
        tiers = pages.tiers(heads.store, side, named, dims[SIDES.index(side)], dtype)
        return pages.stored(heads.store, side, tiers, 0, slice(head, head + 1), len(at))[0][at]

    for head in which.nonzero().flatten().tolist():
        at = position[head, : int(heads.count[head])].argsort(stable=True)
        yield head, at, Held(position[head, at], partial(read, head, at))


def _tokens(heads: Heads, rule: Rule, score: Tensor, position: Tensor, over: Tensor,
            dims: tuple[int, int], dtype: torch.dtype, mover: Mover) -> None:
    """The last tokens take the places of those that are dropped."""
    over = torch.where(over >= rule.every, over, 0).minimum(score.isfinite().sum(1))
    most = int(over.max()) if heads.waits else score.shape[1]
    at = torch.arange(score.shape[1], device=score.device)
    if most <= 0:
        return
    if most == 1:
        equal = score == score.amin(1, keepdim=True)
        oldest = torch.where(equal, position, LAST).argmin(1)
        gone = (at == oldest[:, None]) & (over > 0)[:, None]
    else:
        order = position.argsort(dim=-1, stable=True)
        order = order.gather(1, score.gather(1, order).argsort(dim=-1, stable=True))
        gone = torch.zeros_like(score, dtype=torch.bool).scatter(1, order, at < over[:, None])
    if heads.store.rest:
        fold(heads.store, heads.named, gone, dims, dtype)
    left = (heads.count - over)[:, None]
    hole, tail = gone & (at < left), ~gone & (at >= left) & (at < heads.count[:, None])
    ordered = torch.where(tail, at, LAST).sort(dim=-1).values       # the first hole: the first tail
    sources = ordered.gather(1, (hole.cumsum(1) - 1).clamp_min(0))
    mover(heads, dims, dtype, torch.where(hole, sources, -1).int())
    heads.count.sub_(over.int())


def move(heads: Heads, dims: tuple[int, int], dtype: torch.dtype, sources: Tensor) -> None:
    """Tokens that are stored by themselves change their places: `sources` [N, slots] is the number
    of the one that comes to each place, -1: none."""
    hole = (sources >= 0).nonzero(as_tuple=True)
    tail = (hole[0], sources[hole].long())
    for spec, pool in ((s, heads.named[s.name]) for s in heads.store.planes(dims, dtype)):
        tier = spec.name.rpartition(".")[0]
        if not spec.shape:
            continue
        to, source = ((heads.table(tier)[h, n // PAGE].long(), n % PAGE) for h, n in (hole, tail))
        side = tier.partition(".")[0]
        if side in SIDES:
            plane = heads.store.side(side).format.planes(dims[SIDES.index(side)], dtype, side)[
                spec.name.rpartition(".")[2]]
            view, lanes = plane.steps(pool), plane.lanes
            view[to[0], to[1] // lanes, to[1] % lanes] = view[
                source[0], source[1] // lanes, source[1] % lanes]
        else:
            pool[to] = pool[source]


def _pages(heads: Heads, score: Tensor, over: Tensor, dims: tuple[int, int], dtype: torch.dtype
           ) -> None:
    """Pages of the body leave; the later ones move up, and those that left wait behind them."""
    store, counts = heads.store, heads.count.long()
    most = score.shape[1]
    whole = torch.stack([_ends(store, s, "body", most, score.device)[counts] // PAGE
                         for s in SIDES]).amin(0)
    mean = score.unflatten(1, (-1, PAGE)).mean(-1)               # inf where one is protected
    at = torch.arange(mean.shape[1], device=score.device)
    mean = torch.where(at < whole[:, None], mean, torch.inf)
    leave = torch.where(over >= PAGE, over // PAGE, 0).minimum(mean.isfinite().sum(1))
    ranks = mean.argsort(dim=-1, stable=True).argsort(-1)
    gone = ranks < leave[:, None]
    if store.rest:
        fold(store, heads.named, gone.repeat_interleave(PAGE, 1), dims, dtype)
    for key in ("slots.all", *(f"{s}.{t}" for s in SIDES for t in store.tiers(s))):
        table, (side, tier) = heads.table(key), key.split(".")
        ring = store.ring(side, tier)
        places = torch.arange(table.shape[1], device=score.device)
        if ring is None:
            ends = counts if side == "slots" else _ends(store, side, tier, most,
                                                        score.device)[counts]
            used = (ends[:, None] + PAGE - 1) // PAGE
            own = torch.nn.functional.pad(gone, (0, max(0, table.shape[1] - gone.shape[1])))
            own = own[:, : table.shape[1]]
            order = torch.where(places >= used, 2, own.long()).argsort(dim=-1, stable=True)
        else:
            order = (places + leave[:, None]) % (ring // PAGE)
        table.copy_(table.gather(1, order.clamp(max=table.shape[1] - 1)))
    heads.count.sub_((leave * PAGE).int())


@lru_cache(64)
def _ends(store: Store, side: SideName, tier: str, most: int, device: torch.device) -> Tensor:
    """Where a tier ends in heads of 0, 1, .. `most` tokens."""
    return torch.tensor([store.spans(side, n)[tier].end for n in range(most + 1)], device=device)


def fill(store: Store, dims: tuple[int, int], dtype: torch.dtype, planes: Sequence[Tensor],
         slot: int, kept: Tensor, positions: Tensor, scores: Tensor) -> None:
    """What is known of a prompt's tokens: those of the columns `kept` [B, H, S] (-1: none), which a
    layer holds under the numbers 0, 1, ..; their position ids and scores [B, H, S]."""
    heads = heads_of(store, dims, dtype, planes, slice(slot, slot + 1))
    at = (kept.flatten(0, 1) >= 0).nonzero(as_tuple=True)
    heads.put("position", at, positions.flatten(0, 1)[at].int())
    heads.put("score", at, scores.flatten(0, 1)[at].float())


def slot_positions(store: Store, dims: tuple[int, int], dtype: torch.dtype,
                   planes: Sequence[Tensor], slot: int) -> list[Tensor]:
    """The position ids that each (row, head) of a layer holds, by number."""
    heads = heads_of(store, dims, dtype, planes, slice(slot, slot + 1))
    return [p[:n].long()
            for p, n in zip(heads.slots("position"), heads.count.tolist(), strict=True)]
