"""The error theorem on random caches in fp64, and what docs/laws.md proves beside it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.laws import (
    Contract,
    How,
    View,
    bound,
    fault,
    heads,
    masses,
    oracle,
    projected,
    rotated,
    spread,
)

SLIGHT = 1e-12  # fp64 rounding of both sides, on numbers of size 1


class Random:
    """Tensors of one seeded generator, with outliers and sizes from 2^-12 to 2^6."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.g, dtype=torch.float64)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=self.g))

    def choice(self, *values):
        return values[int(torch.randint(len(values), (1,), generator=self.g))]

    def sign(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 2, like.shape, generator=self.g) * 2.0 - 1.0


def cache(r: Random):
    """q, K, V and how to attend: GQA ratios, few or many tokens, outlier channels, caps, sinks."""
    kept, group, tokens, dim = r.choice(1, 2), r.choice(1, 3), r.choice(1, 2, 7, 60), r.choice(2, 8)
    q, k, v = r.normal(kept * group, dim), r.normal(kept, tokens, dim), r.normal(kept, tokens, dim)
    k[..., 0] *= 2.0 ** r.uniform(-4, 5)
    v *= 2.0 ** r.uniform(-12, 6)
    sinks = r.normal(kept * group) * 2 if r.choice(0, 1) else None
    return q, k, v, How(2.0 ** r.uniform(-6, 2), r.choice(0.0, 0.0, 3.0), sinks)


def perturbed(r: Random, k: torch.Tensor, v: torch.Tensor) -> tuple[View, Contract]:
    """A contract of random errors and drops, and a view that goes to its very edge."""
    some = [2.0 ** r.uniform(-20, 2) * r.normal(*x.shape).abs() for x in (k, v)]
    dropped = r.normal(*k.shape[:2]) > r.uniform(0, 3)
    dropped[:, -1] = False                                # a query sees its own token
    shown = [x + e * r.sign(x) * r.choice(1.0, 1.0, 0.5) for x, e in zip((k, v), some, strict=True)]
    where = torch.arange(k.shape[1]).expand(k.shape[:2]).masked_fill(dropped, -1)
    if r.choice(0, 1):                                    # slots in another order
        order = torch.randperm(k.shape[1], generator=r.g)
        shown, where = [x[:, order] for x in shown], order.argsort()[where.clamp_min(0)]
        where = where.masked_fill(dropped, -1)
    return View.of(*shown, where), Contract(*some, dropped)


@pytest.mark.share(5)
@given(seed=st.integers(0, 2**32))
def test_theorem(seed):
    """|o' - o| <= (m + tanh(d / 2)) spread + eps_v for views at the edge of their contract."""
    r = Random(seed)
    q, k, v, how = cache(r)
    view, contract = perturbed(r, k, v)
    assert not fault(view, wider(contract), k, v)
    error = (oracle(q, view, how) - oracle(q, View.exact(k, v), how)).abs()
    found = bound(q, k, v, contract, how)
    assert (error <= found.total + SLIGHT * v.abs().max()).all()
    plain = (2 * found.mass + 2 * torch.tanh(found.d / 2))[:, None] * v.abs().max()
    assert (found.total <= plain + contract.v.max()).all()       # the form with the largest |V|


def wider(contract: Contract) -> Contract:
    """By the rounding with which a test's own perturbed numbers were formed."""
    return Contract(contract.k + 1e-13 * (1 + contract.k), contract.v + 1e-11 * (1 + contract.v),
                    contract.dropped)


@pytest.mark.parametrize("d", [0.01, 0.5, 3.0])
def test_the_theorem_is_tight(d):
    """Two tokens of opposite values, their logits moved apart by d at the worst point."""
    q, v = torch.ones(1, 1), torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    k = torch.tensor([[[-d / 2], [d / 2]]], dtype=torch.float64)
    eps = torch.full_like(k, d)
    view = View.exact(k + d * v, v)
    contract = Contract(eps, torch.zeros_like(v), torch.zeros(1, 2, dtype=torch.bool))
    how = How(1.0)
    error = float((oracle(q, view, how) - oracle(q, View.exact(k, v), how)).abs())
    assert error == pytest.approx(float(bound(q, k, v, contract, how).total), rel=1e-9)


@pytest.mark.share(5)
@given(seed=st.integers(0, 2**32))
def test_dropping_alone_costs_its_mass(seed):
    """With nothing but drops the error is at most m spread(V), and 0 where nothing is dropped."""
    r = Random(seed)
    q, k, v, how = cache(r)
    dropped = r.normal(*k.shape[:2]) > 0
    dropped[:, -1] = False
    where = torch.arange(k.shape[1]).expand(k.shape[:2]).masked_fill(dropped, -1)
    view = View.of(k, v, where)
    mass = (masses(q, View.exact(k, v), how) * heads(dropped, q)).sum(-1)
    error = (oracle(q, view, how) - oracle(q, View.exact(k, v), how)).abs()
    assert (error <= mass[:, None] * spread(q, v, how) + SLIGHT * v.abs().max()).all()


@pytest.mark.share(5)
@given(seed=st.integers(0, 2**32))
def test_merging_equal_tokens_is_exact(seed):
    """Tokens with the same K and V in one slot that counts them: nothing changes."""
    r = Random(seed)
    q, k, v, how = cache(r)
    where = torch.randint(0, k.shape[1], k.shape[:2], generator=r.g)
    where, _ = where.sort(-1)
    at = where[..., None].expand_as(k)
    same_k, same_v = k.gather(1, at), v.gather(1, at)
    view = View.of(k, v, where)
    assert not fault(view, Contract.exact(k, v), same_k, same_v)
    error = (oracle(q, view, how) - oracle(q, View.exact(same_k, same_v), how)).abs()
    assert (error <= SLIGHT * v.abs().max()).all()
    uncounted = View(view.k, view.v, view.where, view.count.clamp_max(1))
    assert (view.count <= 1).all() or "counts" in fault(uncounted, Contract.exact(k, v), same_k,
                                                        same_v)


@pytest.mark.share(5)
@given(seed=st.integers(0, 2**32))
def test_contracts_compose(seed):
    """A view of a view keeps the sum of the contracts, and so the theorem."""
    r = Random(seed)
    q, k, v, how = cache(r)
    first, one = perturbed(r, k, v)
    second, two = perturbed(r, first.k, first.v)
    both, contract = first.then(second), one + two.through(first)
    assert not fault(both, wider(contract), k, v)
    assert (both.where < 0).equal(contract.dropped)
    if not (both.where >= 0).any(1).all():
        return                                          # nothing is left to attend to
    error = (oracle(q, both, how) - oracle(q, View.exact(k, v), how)).abs()
    assert (error <= bound(q, k, v, contract, how).total + SLIGHT * v.abs().max()).all()


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.share(5)
@given(seed=st.integers(0, 2**32))
def test_errors_before_a_rotation(style, seed):
    """Keys stored before RoPE: after it they are off by no more than `rotated` says."""
    from kvcompile.ir import ROPE

    r = Random(seed)
    x, eps, angles = r.normal(1, 1, 3, 8), r.normal(3, 8).abs(), r.normal(3, 4) * 9
    twice = torch.cat([angles] * 2, -1) if style == "half" else angles.repeat_interleave(2, -1)
    cos, sin = twice.cos()[None, None], twice.sin()[None, None]
    off = ROPE(x + eps * r.sign(eps), cos, sin, style=style) - ROPE(x, cos, sin, style=style)
    assert (off.abs()[0, 0] <= rotated(eps, style) * (1 + 1e-12) + 1e-14).all()


@pytest.mark.share(5)
@given(seed=st.integers(0, 2**32))
def test_low_rank_keys_before_rope(seed):
    """K = R W x, of which s = A x is stored with errors and read as R B s': what W and B A differ
    by on the data, and the stored error through |B|, both turned, are the contract."""
    from kvcompile.ir import ROPE

    r = Random(seed)
    dim, rank, hidden, tokens = r.choice(2, 8), r.choice(1, 2), 9, r.choice(1, 7, 60)
    w, a, b = r.normal(1, dim, hidden), r.normal(rank, hidden), r.normal(1, dim, rank)
    a, w = a * 0.3, w * 2.0 ** r.uniform(-3, 1)
    if r.choice(0, 1):
        w = b @ a                                      # nothing is left
    x, angles = r.normal(1, tokens, hidden), r.normal(tokens, dim // 2) * 9
    eps = 2.0 ** r.uniform(-20, 0) * r.normal(1, tokens, rank).abs()
    s = x @ a.mT
    cos, sin = (torch.cat([y(angles)] * 2, -1) for y in (torch.cos, torch.sin))

    def turn(keys):
        return ROPE(keys[None], cos, sin, style="half")[0]

    k, shown = turn(x @ w.mT), turn((s + eps * r.sign(eps)) @ b.mT)
    v, q = r.normal(1, tokens, 3), r.normal(r.choice(1, 3), dim)
    left = (x @ w.mT - s @ b.mT).abs()
    contract = wider(Contract(rotated(projected(eps, b) + left), torch.zeros_like(v),
                              torch.zeros(1, tokens, dtype=torch.bool)))
    view, how = View.exact(shown, v), How(2.0 ** r.uniform(-6, 2))
    assert not fault(view, contract, k, v)
    error = (oracle(q, view, how) - oracle(q, View.exact(k, v), how)).abs()
    assert (error <= bound(q, k, v, contract, how).total + SLIGHT * v.abs().max()).all()


def test_faults_are_told():
    k, v = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)
    exact = Contract.exact(k, v)
    lost = View.of(k, v, torch.tensor([[0, -1, 2]]))
    assert fault(lost, exact, k, v) == "token 1 of kv head 0 is not stored"
    off = v.clone()
    off[0, 2, 1] = 0.5
    assert fault(View.exact(k, off), exact, k, v) == (
        "V of token 2, kv head 0, channel 1 is off by 0.5, allowed 0")
    off[0, 2, 1] = torch.nan
    assert "V of token 2" in fault(View.exact(k, off), exact, k, v)
    assert not fault(View.exact(k, v), exact, k, v)
