"""ThinK: which channels of K a head drops, what is stored, and with what it composes."""

import pytest
import selection_references as refs
import torch
from support import greedy, optimized, plain, prompt

import kvcompile
import kvcompile.kernels.select  # noqa: F401  # the ops' bodies
from kvcompile import RecipeError
from kvcompile.ir import PRUNE
from kvcompile.kernels import cpp_attend, pages
from kvcompile.models.tiny import tiny
from kvcompile.passes.select import rule_of
from kvcompile.plan import plan


def reference(q, k, drop: float, window: int, recent: int):
    """K of a row, channel by channel: the least |q_i|^2 |k_i|^2 leave, per kv head."""
    out, group = k.clone(), q.shape[0] // k.shape[0]
    for head, keys in enumerate(k):
        scores = []
        for i in range(keys.shape[1]):
            mine = q[head * group : (head + 1) * group, -window:, i].double()
            scores.append(float((mine**2).mean(1).mean()) * float((keys[:, i].double()**2).mean()))
        gone = sorted(range(len(scores)), key=lambda i: scores[i])[: int(len(scores) * drop)]
        for i in gone:
            out[head, : max(0, k.shape[1] - recent), i] = 0
    return out


def rule(recipe: str) -> str:
    return str(rule_of(plan(recipe, 1)[0].values, 0, 1))


@pytest.mark.parametrize("drop, window, recent", [(0.4, 32, 32), (0.5, 8, 128), (0.6, 32, 0)])
def test_dropped_channels_equal_the_reference(drop, window, recent):
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, refs.Q_HEADS, 90, 20, generator=g)
    k = torch.randn(2, refs.HEADS, 90, 20, generator=g)
    at = torch.arange(90).expand(2, -1)
    valid = torch.ones(2, 90, dtype=torch.bool)
    valid[1, :31] = False
    text = rule(f"think(drop={drop}, window={window}, recent={recent})")
    got = PRUNE(q, k, at, valid, torch.tensor([0, 0]), rule=text)
    for row, first in enumerate((0, 31)):
        want = reference(q[row, :, first:], k[row, :, first:], drop, window, recent)
        assert torch.equal(got[row, :, first:], want)
    looking = PRUNE(q, k, at, valid, torch.tensor([20, 0]), rule=text)  # KVzip's second reading
    assert torch.equal(looking[0, :, :70], reference(q[0, :, :70], k[0, :, :70], drop, window,
                                                     recent))
    assert torch.equal(looking[:, :, 70:], k[:, :, 70:])


def stored(cache, layer: int) -> torch.Tensor:
    """K [H, N, Dk] as it is read."""
    group = next(g for g in cache.groups if cache.sites[layer] in g.sites)
    site = cache.sites[layer]
    named = pages.named(group.specs, group.planes, [group.sites.index(site)])
    tiers = pages.tiers(site.store, "k", named, site.dims[0], site.dtype)
    return pages.stored(site.store, "k", tiers, 0, slice(0, site.heads),
                        int(named["count"][0, 0]))


def test_channels_leave_storage():
    """Blocks of 128 lose half their channels, the others are exact, and so is what is left."""
    ids = prompt(300)
    whole = optimized("llama")(ids, use_cache=True).past_key_values
    model = optimized("llama", "think(recent=32)")
    cache = model(ids, use_cache=True).past_key_values
    for layer in range(len(cache.sites)):
        exact, got = stored(whole, layer), stored(cache, layer)
        stay = (got[:, :256] != 0).any(1)
        assert (stay.sum(1) == exact.shape[2] // 2).all()
        assert torch.equal(got[:, :256], exact[:, :256] * stay[:, None])
        older = torch.arange(256, 300) < 300 - 32
        assert torch.equal(got[:, 256:], exact[:, 256:] * (stay[:, None] | ~older[:, None]))
    assert cache.nbytes == kvcompile.explain(model).kv_bytes(300)
    long, less = (optimized("llama", r)(prompt(1300), use_cache=True).past_key_values.nbytes
                  for r in ("full", "think"))
    assert less < 0.85 * long


def test_nothing_dropped_is_the_identity():
    ids = prompt(200)
    assert torch.equal(greedy(optimized("llama", "think(drop=0)"), ids, 150),
                       greedy(optimized("llama"), ids, 150))


@pytest.mark.slow
def test_the_kernel_gathers_q():
    """32 of 64 channels: the compiled step against the plain body."""
    base = kvcompile.optimize(tiny("llama", num_hidden_layers=2, head_dim=64), "full",
                              compile=False)
    for recipe in ("think", "think(of=int(bits=4))", "think+snapkv(ratio=0.8)"):
        both = [greedy(kvcompile.optimize(base, recipe, compile=c), prompt(300), 120)
                for c in (True, False)]
        assert torch.equal(*both)
        site = kvcompile.capture(base.kvcompile.model, recipe).sites[0]
        shape = cpp_attend.Shape(site.heads, 2, site.dims, site.dtype, 1.0)
        assert cpp_attend.unsupported(site.store, shape) is None


def test_composition():
    """Channels of what another method keeps; formats of keys that contradict are refused."""
    model = optimized("llama", "snapkv(ratio=0.5)+think(of=int(bits=8))")
    cache = model(prompt(400), use_cache=True).past_key_values
    assert cache.stored_tokens(1).tolist() == [[200, 200]]
    with pytest.raises(RecipeError, match="'think' and 'kivi' both set format.k"):
        kvcompile.optimize(plain("llama"), "think+kivi", compile=False)
    with pytest.raises(RecipeError, match="kept keys are turned by finch"):
        kvcompile.optimize(plain("llama"), "think+finch", compile=False)
    with pytest.raises(RecipeError, match="drop must be at most 0.95"):
        kvcompile.optimize(plain("llama"), "think(drop=1)", compile=False)
