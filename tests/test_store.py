"""Laws of storage, for every method: what is where, what is seen, and how many bytes it takes."""

import pytest
import torch
from support import MORE, RECIPES

from kvcompile.ir import APPEND, ATTEND, STORABLE
from kvcompile.plan import plan
from kvcompile.planes import Group
from kvcompile.site import Site
from kvcompile.store import Store

STORES = [Store.of(plan(r, 1)[0].values) for r in (*RECIPES, MORE[0], MORE[2],
          "kivi(bits=4, group=64)",
          "kivi(bits=2, residual=0)", "int8(residual=32)", "fp8(format=e5m2)",
          "streamingllm(sinks=3, window=20)+kivi(bits=4)",
          "streamingllm(sinks=4, window=200)+kivi(bits=4, residual=32)",
          "streamingllm(sinks=0, window=1)")]
STORES += [pytest.param(Store.of(plan(r, 4)[0].values), marks=pytest.mark.slow)
           for r in MORE[3:7]]
HEADS, Q_HEADS, DIM = 2, 4, 32


def layer(store: Store, batch: int, dtype=torch.float32) -> Group:
    site = Site(0, Q_HEADS, HEADS, (DIM, DIM), dtype, 0, store)
    return Group([site], batch, torch.device("cpu"))


def qkv(batch: int, tokens: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, Q_HEADS, tokens, DIM, generator=g)
    k, v = (torch.randn(batch, HEADS, tokens, DIM, generator=g) for _ in range(2))
    return q, k, v, torch.arange(tokens).expand(batch, -1), torch.ones(batch, tokens).bool()


def step(lay: Group, q, k, v, pos, valid, counts, window=0):
    """attend, then append, as the extend graph does; returns o."""
    lay.reserve([n + int(m) for n, m in zip(counts, valid.sum(1), strict=True)])
    options = dict(store=str(lay.site.store))
    o, *_ = ATTEND(q, k, v, lay.planes, pos, valid, None, scale=DIM**-0.5, window=window, **options)
    APPEND(lay.planes, [k], [v], pos, valid, slots=[0], **options)
    return o


@pytest.mark.parametrize("store", STORES, ids=str)
def test_layers_of_a_group_are_as_alone(store):
    """Each slot of a group's planes holds and gives, bit for bit, what a group of one does."""
    calls, layers = (90, 1, 45, 1, 1), 3
    site, cpu = layer(store, 1).site, torch.device("cpu")
    every, own = Group([site] * layers, 2, cpu), [Group([site], 2, cpu) for _ in range(layers)]
    counts = [0, 0]
    for call, tokens in enumerate(calls):
        given = [qkv(2, tokens, seed=10 * call + i) for i in range(layers)]
        pos, valid = given[0][3], given[0][4].clone()
        valid[1, 0] = call > 0  # row 1 starts with padding
        q, k, v = ([x[i] for x in given] for i in range(3))
        alone = [step(g, q[i], k[i], v[i], pos, valid, counts) for i, g in enumerate(own)]
        counts = [n + int(m) for n, m in zip(counts, valid.sum(1), strict=True)]
        every.reserve(counts)
        options = dict(store=str(store))
        for i in range(layers):
            o, *_ = ATTEND(q[i], k[i], v[i], every.planes, pos, valid, None, scale=DIM**-0.5,
                          slot=i, **options)
            assert torch.equal(o, alone[i])
        APPEND(every.planes, k[:2], v[:2], pos, valid, slots=[0, 1], **options)
        APPEND(every.planes, k[2:], v[2:], pos, valid, slots=[2], **options)
        every.select([0, 1])
    assert sum(p.nbytes for p in every.planes) == sum(p.nbytes for g in own for p in g.planes)


@pytest.mark.parametrize("store", STORES, ids=str)
def test_ragged_counts_are_appended_run_by_run(store):
    """Heads and layers that hold different numbers of tokens: each goes on from its own."""
    site, cpu = layer(store, 1).site, torch.device("cpu")
    ragged, even = Group([site] * 2, 1, cpu), [Group([site] * 2, 1, cpu) for _ in range(2)]
    _, k, v, pos, valid = qkv(1, 130)
    _, k1, v1, pos1, valid1 = qkv(1, 1, seed=1)
    options = dict(store=str(store), slots=[0, 1])
    for group in (ragged, *even):
        group.reserve([131])
    for group, n in zip(even, (130, 77), strict=True):
        APPEND(group.planes, [k[:, :, :n]] * 2, [v[:, :, :n]] * 2, pos[:, :n], valid[:, :n],
               **options)
    planes = [ragged.specs, ragged.planes, *(group.planes for group in even)]
    for spec, mine, *both in zip(*planes, strict=True):
        mine.copy_(both[0])
        if spec.name == "count":
            mine[1, :, 1] = 77               # slot 1 has fewer tokens of its head 1
        elif spec.shape:
            last = mine.shape[0] * 3 // 4    # where the pages of that head begin
            mine[last:] = both[1][last:]
    for group in (ragged, *even):
        APPEND(group.planes, [k1, k1], [v1, v1], pos1, valid1, **options)
    assert ragged.planes[0].tolist() == [[[131, 131]], [[131, 78]]]
    for spec, mine, *both in zip(*planes, strict=True):
        if spec.shape:
            last = mine.shape[0] * 3 // 4
            assert torch.equal(mine[:last], both[0][:last])
            assert torch.equal(mine[last:], both[1][last:])


def test_what_cannot_be_stored_is_told_by_layer():
    _, k, v, _, _ = qkv(2, 3)
    nan, large = k.clone(), v.clone()
    nan[1, 1, 2, 3], large[0, 0, 0, 0] = torch.nan, -101
    limits = [100.0] * 4
    got = STORABLE([k, nan, k, k], [v, v, large, v], limits, [100.0, 100.0, 100.0, 101.0])
    assert got.tolist() == [True, False, False, True]
    assert STORABLE([k.bfloat16()], [large.bfloat16()], [100.0], [100.9]).tolist() == [False]
    assert STORABLE([k], [large], [100.0], [101.0]).tolist() == [True]
