"""Laws of storage: what a method makes of a layer stores the same tokens however they come."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from hypothesis import assume, reject
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.calibration.samples import calibrated
from kvcompile.errors import RecipeError
from kvcompile.ir import APPEND, ATTEND, ATTENTION
from kvcompile.method import Method
from kvcompile.plan import plan
from kvcompile.planes import Group
from kvcompile.program import Program, capture
from kvcompile.recipe import Recipe, Term
from kvcompile.registry import module
from kvcompile.rewrite import run_passes
from kvcompile.site import Site, sites
from kvcompile.store import SIDES, Store
from kvcompile.testing.law import law
from kvcompile.testing.strategies import DIMS, EDGES, features, fits, plain_features, terms

LAYERS, Q_HEADS, HEADS, DIM = 4, 4, 2, 32
EPS = torch.finfo(torch.float32).eps


@cache
def base() -> Program:
    """A captured decoder of four layers with peaked attention."""
    decoder = module("models", "decoder").Decoder
    return capture(decoder.tiny(layers=LAYERS, heads=Q_HEADS, kv_heads=HEADS, head_dim=DIM))


@cache
def text() -> Tensor:
    """Token ids [2, 64] for methods that are calibrated."""
    return torch.randint(0, 128, (2, 64), generator=torch.Generator().manual_seed(0))


@cache
def sites_of(recipe: str) -> tuple[Site, ...]:
    """What the passes make of the layers of `base`."""
    found = calibrated(Recipe.parse(recipe), base(), text())
    gm, rest = base().begun()
    run_passes(rest, gm, plan(found, LAYERS))
    return sites(gm.graph)


def drawn_term(method: Method, data: Any, layers: int = 0) -> Term:
    """A term of the method that fits the base; text may be too short for what it wants to see."""
    term: Term = data.draw(terms(method, layers))
    try:
        sites_of(str(term))
    except RecipeError:
        reject()
    return term


def drawn(method: Method, data: Any, members: bool = True) -> Store:
    """The store of a layer under the method with some parameters; of layers stored together too,
    with `members`."""
    return drawn_site(method, data, members).store


def drawn_site(method: Method, data: Any, members: bool = True) -> Site:
    """The same layer."""
    recipe = str(drawn_term(method, data))
    found = {(s.store, s.made): s for s in sites_of(recipe)
             if s.owner is None and (members or s.store.members == 1)}
    assume(found)
    return data.draw(st.sampled_from(list(found.values())))


class Shape(NamedTuple):
    """Query heads, kv heads and channels of a head."""

    q_heads: int
    heads: int
    dim: int

    @staticmethod
    def drawn(store: Store, data: Any) -> Shape:
        """GQA ratios and head sizes that the store's formats take."""
        fit = [d for d in DIMS if all(fits(store.side(s).format, d * store.members, s)
                                      for s in SIDES)]
        q_heads, heads = data.draw(st.sampled_from(((4, 2), (2, 2), (3, 1), (10, 2))))
        return Shape(q_heads, heads, data.draw(st.sampled_from(fit)))


class Layer:
    """One layer that stores by `store`, in a group of its own. Where V is a part of K it is K."""

    def __init__(self, store: Store, batch: int, shape: Shape) -> None:
        dims = (shape.dim, shape.dim)
        site = Site(0, shape.q_heads, shape.heads, dims, torch.float32, 0, store)
        self.store, self.dim, self.heads = store, shape.dim, shape.heads
        self.group = Group([site], batch, torch.device("cpu"))
        self.counts = [0] * batch

    def append(self, k: Tensor, v: Tensor, valid: Tensor) -> None:
        self.counts = [n + int(m) for n, m in zip(self.counts, valid.sum(1), strict=True)]
        self.group.reserve(self.counts)
        v = k if self.store.v_in_k else v
        both = [[x.roll(i, -1) for i in range(self.store.members)] for x in (k, v)]
        APPEND(self.group.planes, *both, _positions(valid), valid, store=str(self.store),
               slots=[0])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        counts = [n + int(m) for n, m in zip(self.counts, valid.sum(1), strict=True)]
        self.group.reserve(counts)
        v = k if self.store.v_in_k else v
        o: Tensor = ATTEND(q, k, v, self.group.planes, _positions(valid), valid, None,
                           scale=self.dim**-0.5, store=str(self.store))[0]
        return o

    def read(self, side: Any, row: int = 0) -> Tensor:
        """[H, kept, D]: what a row holds, oldest first."""
        pages, side = module("kernels", "pages"), "k" if self.store.v_in_k else side
        named = pages.named(self.group.specs, self.group.planes, [0])
        tiers = pages.tiers(self.store, side, named, self.dim, torch.float32)
        found: Tensor = pages.stored(self.store, side, tiers, row, slice(0, self.heads),
                                     self.counts[row])
        return found


def _positions(valid: Tensor) -> Tensor:
    return torch.arange(valid.shape[1]).expand(valid.shape)


def qkv(data: Any, batch: int, tokens: int, shape: Shape, some: Any = None
        ) -> tuple[Tensor, Tensor, Tensor]:
    some = data.draw(plain_features() if some is None else some)
    k = some.tensor(batch, shape.heads, tokens, shape.dim)
    v = some._replace(seed=some.seed + 1).tensor(batch, shape.heads, tokens, shape.dim)
    q = some._replace(seed=some.seed + 2).tensor(batch, shape.q_heads, tokens, shape.dim)
    return q, k, v


@law("method", cost=10)
def every_token_is_in_one_tier(method: Method, data: Any) -> None:
    """Tiers hold the kept tokens, each once, in order; none outgrows its ring."""
    store = drawn(method, data)
    assert Store.parse(str(store)) == store
    for n in {*EDGES, data.draw(st.integers(0, 2000))}:
        for side in SIDES:
            spans = store.spans(side, n)
            kept = [*range(*spans["sinks"])] + [store.sinks + i for tier in ("body", "recent")
                                                for i in range(*spans[tier])]
            assert kept == store.numbers(n) and len(kept) == store.stored(n)
            for tier, (start, end) in spans.items():
                ring = store.ring(side, tier)
                assert end - start <= (end if ring is None else ring), (tier, n)
                lies_in = "k" if store.v_in_k else side
                assert end == start or tier in store.tiers(lies_in)


@law("method", cost=7)
def pieces_store_the_same_bits(method: Method, data: Any) -> None:
    """append(T tokens) == append in any pieces; the planes take the bytes that are predicted."""
    store = drawn(method, data)
    shape = Shape.drawn(store, data)
    cuts = data.draw(st.lists(st.sampled_from(EDGES), min_size=1, max_size=4))
    _, k, v = qkv(data, 1, sum(cuts), shape, features())
    one, many, done = Layer(store, 1, shape), Layer(store, 1, shape), 0
    one.append(k, v, torch.ones(1, sum(cuts), dtype=torch.bool))
    for n in cuts:
        at = slice(done, done := done + n)
        many.append(k[:, :, at], v[:, :, at], torch.ones(1, n, dtype=torch.bool))
    for side in SIDES:
        assert torch.equal(one.read(side), many.read(side))
    want = store.nbytes((shape.dim, shape.dim), torch.float32, shape.heads, [sum(cuts)])
    assert sum(p.nbytes for p in one.group.planes) == want


@law("method", cost=7)
def a_batch_is_its_rows(method: Method, data: Any) -> None:
    """Padding anywhere, rows without a token: a row of a batch is what it is alone, bit by bit."""
    store, tokens = drawn(method, data), data.draw(st.sampled_from(EDGES[6:]))
    shape = Shape.drawn(store, data)
    q, k, v = qkv(data, 3, tokens, shape, features())
    valid = torch.ones(3, tokens, dtype=torch.bool)
    valid[1, : data.draw(st.integers(1, tokens))] = False
    valid[2, data.draw(st.integers(0, tokens - 1)):] = False
    after, every = [x[:, :, -1:] for x in (q, k, v)], torch.ones(3, 1, dtype=torch.bool)
    batch = Layer(store, 3, shape)
    batch.append(k, v, valid)
    got = batch.attend(after[0], after[1], after[2], every)
    for row, keep in enumerate(valid):
        alone = Layer(store, 1, shape)
        if keep.any():
            alone.append(k[row : row + 1, :, keep], v[row : row + 1, :, keep], keep[None, keep])
        q1, k1, v1 = (x[row : row + 1] for x in after)
        assert torch.equal(got[row], alone.attend(q1, k1, v1, every[:1])[0])
        assert all(torch.equal(batch.read(s, row), alone.read(s)) for s in SIDES)


@law("method", cost=10)
def decoding_is_the_stateless_form(method: Method, data: Any) -> None:
    """Steps on a filled cache give what kvc.attention with the store says, query by query."""
    store, tokens = drawn(method, data, members=False), data.draw(st.sampled_from(EDGES[8:]))
    shape = Shape.drawn(store, data)
    q, k, v = qkv(data, 1, tokens, shape)
    valid, start = torch.ones(1, tokens, dtype=torch.bool), max(0, tokens - 5)
    v = k if store.v_in_k else v
    want = ATTENTION(q, k, v, _positions(valid), valid, None, scale=shape.dim**-0.5,
                     store=str(store))
    layer, one = Layer(store, 1, shape), torch.ones(1, 1, dtype=torch.bool)
    if start:
        layer.append(k[:, :, :start], v[:, :, :start], valid[:, :start])
    for i in range(start, tokens):
        at = slice(i, i + 1)
        o = layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], one)
        layer.append(k[:, :, at], v[:, :, at], one)
        # two orders of summation over at most `tokens` weights, on logits as large as |q||k|
        most = float(q[:, :, i].norm(dim=-1).max() * k.norm(dim=-1).max()) * shape.dim**-0.5
        error = (tokens + 2 * shape.dim * most) * EPS * float(v.abs().max())
        assert (o - want[:, :, at]).abs().max() <= error


@law("method", cost=10)
def bounded_stores_stop_growing(method: Method, data: Any) -> None:
    """With a window bytes are bounded, and without one they are not."""
    store = drawn(method, data)
    assume(store.window < 1500)
    dim = Shape.drawn(store, data).dim
    sizes = {store.nbytes((dim, dim), torch.float32, HEADS, [n]) for n in (4000, 6000, 9000)}
    assert (len(sizes) == 1) == bool(store.window)
