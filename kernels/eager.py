"""The plain PyTorch bodies of the kvc ops. They are the specification of every fused kernel.

Rows are handled one by one with their padding taken out, so that a batch gives each row exactly
what the row gives alone.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvcompile.checks.rounding import Arithmetic
from kvcompile.errors import KVCompileError
from kvcompile.format import Side
from kvcompile.ir import body
from kvcompile.kernels import pages
from kvcompile.kernels.dense_attention import attend_row, causal, decode, tokens_first
from kvcompile.kernels.dense_attention import low as low_of
from kvcompile.kernels.dense_attention import mass as weight_of
from kvcompile.kernels.rebuild import Rebuild
from kvcompile.store import SIDES, Store


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    """How the bodies compute: what is decoded and torch's softmax weights have the model's type."""
    if dtype is torch.float32:
        return Arithmetic()
    eps = torch.finfo(dtype).eps
    return Arithmetic(stored=eps / 2, weights=eps, out=eps)


def _runs(counts: Tensor, single: bool = False) -> Iterator[tuple[slice, int]]:
    """Runs of neighbouring heads with the same count, or `single` heads: (heads, count)."""
    values, start = counts.tolist(), 0
    for end in range(1, len(values) + 1):
        if single or end == len(values) or values[end] != values[start]:
            yield slice(start, end), values[start]
            start = end


def _tiers(store: Store, planes: list[Tensor], dims: tuple[int, int], dtype: torch.dtype,
           slots: Sequence[int], together: bool = False
           ) -> tuple[Tensor, dict[Side, dict[str, pages.Tier]]]:
    """Count [B, slots * heads] and tiers of some layers; `together`: all rows as one."""
    named = pages.named(store.planes(dims, dtype), planes, slots)
    if together:
        named = {n: p.flatten(0, 1)[None] if n.endswith(pages.OWN) else p
                 for n, p in named.items()}
    tiers = {s: pages.tiers(store, s, named, dim, dtype)
             for s, dim in zip(SIDES, dims, strict=True)}
    return named["count"], tiers


@body("attention")
def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor,
              sinks: Tensor | None, *, scale: float, window: int = 0, softcap: float = 0.0,
              store: str = "store", layer: int = 0, members: Sequence[int] = (),
              basis: Tensor | None = None, offset: Tensor | None = None, cos: Tensor | None = None,
              sin: Tensor | None = None, style: str = "", rule: str = "",
              far: Tensor | None = None) -> Tensor:
    """Causal attention among this call's tokens; padding's output is 0.

    With a lossy `store` query i sees what appending tokens 0 .. i-1 one by one would have stored,
    and itself exactly: what decoding token by token computes. Layers that are stored together have
    no such form: what one of them sees depends on what later ones made of earlier tokens. Nor has
    a `rule`. With `basis` or `cos` the keys are rebuilt from k (`kernels/rebuild.py`); cos and sin
    have a row for each column of the call. The body has the keys `far`, if there are such.
    """
    if rule:
        raise KVCompileError(f"layer {layer} keeps tokens by their scores, which a forward without "
                             "a cache cannot show")
    parsed, batch, plain = Store.parse(store), q.shape[0], far is None
    rebuild = Rebuild(basis, offset, cos, sin, style)
    if parsed.members > 1:
        raise KVCompileError(f"layers {', '.join(map(str, members))} are stored together: only "
                             "decoding through a cache shows what they see")

    def rows(q: Tensor, k: Tensor, v: Tensor, far: Tensor, own: Rebuild, which: Sequence[int]
             ) -> Tensor:
        if plain and parsed.plain and parsed.window in (0, window - 1):
            return causal(q, own.keys(k), v, scale, window, softcap, sinks)
        each = [_one_by_one(parsed, *x, scale, window, softcap, sinks, own.row(row))
                for row, x in zip(which, zip(q, k, v, far, strict=True), strict=True)]
        return tokens_first(torch.stack(each))

    far = k if far is None else far
    if bool(valid.all()):
        return rows(q, k, v, far, rebuild, range(batch))
    out = q.new_zeros(batch, q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    for b, keep in enumerate(valid):
        if bool(keep.any()):
            own = rebuild.row(b).at(keep).batch()
            q_, k_, v_, far_ = (x[b : b + 1, :, keep] for x in (q, k, v, far))
            out[b][:, keep] = rows(q_, k_, v_, far_, own, [0])[0]
    return out


def _one_by_one(store: Store, q: Tensor, k: Tensor, v: Tensor, far: Tensor, scale: float,
                window: int, softcap: float, sinks: Tensor | None, rebuild: Rebuild) -> Tensor:
    """One row: every query against the store as it was when the query's token arrived."""
    n, given = k.shape[1], dict(zip(SIDES, (k, v), strict=True))
    coded = {}
    for side in store.sides:
        x, fmt = far if side == "k" else v, store.side(side).format
        end = store.spans(side, n)["body"].end
        body_ = x[:, store.sinks : store.sinks + end]
        coded[side] = x.clone()
        coded[side][:, store.sinks : store.sinks + end] = fmt.decode(
            fmt.encode(body_, side), x.shape[-1], x.dtype, side)
    out = []
    for i in range(n):
        low = max(0, i - window + 1) if window else 0
        both = zip((*store.numbers(i), i), (*store.turned_by(i), i), strict=True)
        kept, by = torch.tensor([own for own in both if own[0] >= low], device=q.device).T
        seen = []
        for side in store.sides:
            start, end = (store.sinks + at for at in store.spans(side, i)["body"])
            in_body = (kept >= start) & (kept < end)
            seen.append(torch.where(in_body[:, None], coded[side][:, kept], given[side][:, kept]))
        values = seen[0][..., : v.shape[-1]] if store.v_in_k else seen[1]
        keys = rebuild.at(by).keys(seen[0])
        out.append(attend_row(q[:, i : i + 1], keys, values, scale, 0, softcap, sinks)[0])
    return torch.cat(out, 1)


@body("append")
def append(planes: list[Tensor], k: list[Tensor], v: list[Tensor], positions: Tensor,
           valid: Tensor, *, store: str, slots: list[int]) -> None:
    """Store this call's valid tokens of the layers `slots`; complete blocks are encoded.

    `valid` is [B, S], or [B, H, S] where each head stores tokens of its own. One token a row is
    stored in all layers and rows at once; more of them one by one, which takes less memory.
    """
    parsed, every = Store.parse(store), bool(valid.all())
    if valid.dim() == 3 and every:
        valid = valid[:, 0]
    new = valid.sum(-1, dtype=torch.int32)
    if parsed.members > 1:
        k, v = ([torch.cat(x[i : i + parsed.members], -1)
                 for i in range(0, len(x), parsed.members)] for x in (k, v))
    size = len(slots) if valid.shape[-1] == 1 and valid.dim() == 2 else 1
    for at in (slice(i, i + size) for i in range(0, len(slots), size)):
        _append(parsed, planes, k[at], v[at], valid, every, slots[at])
    planes[0][pages.at(slots)] += new[:, None] if new.dim() == 1 else new


def _append(store: Store, planes: list[Tensor], k: list[Tensor], v: list[Tensor], valid: Tensor,
            every: bool, slots: list[int]) -> None:
    """Store tokens of some layers at once, as those of more heads; single ones of all rows too."""
    together = every and valid.shape[-1] == 1
    dims = (k[0].shape[-1] // store.members, v[0].shape[-1] // store.members)
    count, tiers = _tiers(store, planes, dims, k[0].dtype, slots, together)
    both = [torch.stack(x, 1).flatten(1, 2) if len(x) > 1 else x[0] for x in (k, v)]
    if together:
        both, valid = [x.flatten(0, 1)[None] for x in both], valid[:1]
    for row, keep in enumerate(valid):
        own = keep.dim() == 2  # of each head
        for heads, n in _runs(count[row], own):
            mine = keep[heads.start] if own else keep
            for side, x in zip(store.sides, both, strict=False):
                written = {t: tiers[side][t] for t in store.written(side)}
                new = x[row, heads] if every else x[row, heads][:, mine]
                pages.add(store, side, written, row, heads, n, new)


@body("storable")
def storable(k: list[Tensor], v: list[Tensor], k_limits: list[float], v_limits: list[float]
             ) -> Tensor:
    """bool [layers]: neither k nor v holds NaN or a magnitude above the layer's limit."""
    fine = []
    for xs, limits in ((k, k_limits), (v, v_limits)):
        peaks = torch.stack([x.abs().amax() for x in xs])
        peaks = peaks.to(torch.promote_types(peaks.dtype, torch.float32))
        fine.append(peaks <= torch.tensor(limits, dtype=peaks.dtype, device=peaks.device))
    return fine[0] & fine[1]


@body("attend")
def attend(q: Tensor, k: Tensor, v: Tensor, planes: list[Tensor], positions: Tensor,
           valid: Tensor, sinks: Tensor | None, *, scale: float, window: int = 0,
           softcap: float = 0.0, store: str, slot: int = 0, layer: int = 0, mass: bool = False,
           looks: int = 0, low: bool = False, member: int = 0, basis: Tensor | None = None,
           offset: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
           style: str = "", at: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over what is stored and, causally, over this call's exact tokens.

    Of layers stored together it is the one of number `member` that attends. `at` [2] are slot and
    member where one graph serves several layers.

    Returns o [B, Hq, S, Dv], laid out token by token; the log-sum-exp of the logits [B, Hq, S] in
    fp32; and with `mass` [B, H, Store.places + S] in fp32, else [B, H, 0]: what the token of each
    number gets of the softmax weights, summed over the query heads of its kv head and over S, or of
    each row's queries the last `looks`, if that is not 0; this call's tokens have the numbers that
    they will be stored under. 0, -inf and 0 for padding. With `low`, where a row has several
    queries, instead of weights: how many of these queries give a token that they see less than its
    share (1 / as many as the query sees), by the mean over the query heads; times these.
    With `basis` or `cos` the keys are rebuilt from what is stored and from k
    (`kernels/rebuild.py`); cos and sin have a row for each token of the sequence by number, this
    call's too.
    """
    parsed, (batch, heads_, tokens, _) = Store.parse(store), k.shape
    dims = (k.shape[-1], v.shape[-1])
    slot, member = (slot, member) if at is None else at.tolist()
    count, tiers = _tiers(parsed, planes, dims, k.dtype, [slot])
    group, rebuild = q.shape[1] // heads_, Rebuild(basis, offset, cos, sin, style)
    o = q.new_zeros(batch, tokens, q.shape[1], v.shape[-1]).transpose(1, 2)  # as attention's
    lse = torch.full(q.shape[:-1], -torch.inf, device=q.device)
    sizes = [x.shape for x in planes]
    places = parsed.places(dims, k.dtype, sizes) + tokens if mass else 0
    weights = q.new_zeros(batch, heads_, places, dtype=torch.float32)
    for row, keep in enumerate(valid):
        every = bool(keep.all())
        for heads, n in _runs(count[row]):
            queries = slice(heads.start * group, heads.stop * group)
            new = [x[row, part] if every else x[row, part][:, keep]
                   for x, part in ((q, queries), (k, heads), (v, heads))]
            if new[0].shape[1] == 0:
                continue
            old = [pages.stored(parsed, side, tiers[side], row, heads, n)
                   .narrow(-1, member * dim, dim)
                   for side, dim in zip(parsed.sides, dims, strict=False)]
            if parsed.v_in_k:
                old.append(old[0][..., : v.shape[-1]])
            if not rebuild.idle:
                own, after = rebuild.heads(heads, heads_).row(row), n + new[0].shape[1]
                numbers = torch.tensor(parsed.turned_by(n), dtype=torch.long, device=q.device)
                old[0] = own.at(numbers).keys(old[0])
                new[1] = own.at(slice(n, after)).keys(new[1])
            own_sinks = None if sinks is None else sinks[queries]
            # a window that the store has already applied needs no mask for a single query
            if new[0].shape[1] == 1 and (not window or old[0].shape[1] < window):
                out = decode(new[0], old[0], old[1], new[1], new[2], scale, softcap, own_sinks)
            else:
                all_k, all_v = (torch.cat(x, 1) for x in zip(old, new[1:], strict=True))
                out = attend_row(new[0], all_k, all_v, scale, window, softcap, own_sinks)
            if every:
                o[row, queries], lse[row, queries] = out
            else:
                o[row, queries][:, keep], lse[row, queries][:, keep] = out
            if mass:
                all_k = torch.cat([old[0], new[1]], 1)
                asked = min(looks or tokens, new[0].shape[1])
                say = low_of if low and new[0].shape[1] > 1 else weight_of
                each = say(new[0][:, -asked:], all_k, out[1][:, -asked:], scale, window, softcap)
                weights[row, heads, : all_k.shape[1]] = each.unflatten(
                    0, (heads.stop - heads.start, -1)).sum(1)
    return o, lse, weights
