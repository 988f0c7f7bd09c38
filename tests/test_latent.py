"""mha2mla and slim: what lets K and V be absorbed that a rotation or a second weight kept apart."""

from functools import cache

import pytest
import torch
from support import optimized, prompt, slow_but
from test_project import logits

import kvcompile
from kvcompile.calibration.samples import Samples
from kvcompile.errors import RecipeError
from kvcompile.ir import attention_nodes
from kvcompile.models.tiny import tiny
from kvcompile.passes.partial import chosen
from kvcompile.passes.slim import rebuilt
from kvcompile.plan import plan
from kvcompile.rewrite import Refused, copy_graph

EPS = torch.finfo(torch.float32).eps
HEADS, DIM = 4, 16


@cache
def base(arch="llama", **options):
    return kvcompile.capture(tiny(arch, num_hidden_layers=2, **options))


def rotations(config, tokens):
    """[tokens, DIM, DIM]: the rotary embedding as matrices."""
    half = DIM // 2
    theta = 10000.0 ** (-torch.arange(half) / half)
    out = torch.zeros(tokens, DIM, DIM)
    for n in range(half):
        angle = torch.arange(tokens) * theta[n]
        out[:, n, n] = out[:, n + half, n + half] = angle.cos()
        out[:, n, n + half], out[:, n + half, n] = -angle.sin(), angle.sin()
    return out


@pytest.mark.parametrize("by", ["norm", "low"])
def test_some_pairs_stay_rotated_and_the_others_do_not(by):
    """The logits of the first layer's attention by rotation matrices, pair by pair, GQA."""
    ids, program = prompt(64), base(num_key_value_heads=2)
    model = tiny("llama", num_hidden_layers=2, num_key_value_heads=2)
    made = program.lower(f"mha2mla(rope=0.25, by={by}, ratio=1.0, whiten=false)", calibration=ids)
    seen = Samples(made.after("partial").graph_module, ids).attention[0]
    own = model.model.layers[0]
    with torch.no_grad():
        x = own.input_layernorm(model.model.embed_tokens(ids))[0]
        q = own.self_attn.q_proj(x).view(-1, HEADS, DIM).transpose(0, 1)
        k = own.self_attn.k_proj(x).view(-1, 2, DIM).transpose(0, 1).repeat_interleave(2, 0)
    half = DIM // 2
    weight = q.unflatten(-1, (2, half)).norm(dim=2).mean(1).view(2, 2, half).mean(1) * (
        k[::2].unflatten(-1, (2, half)).norm(dim=2).mean(1))
    for head in range(HEADS):
        pairs = [6, 7] if by == "low" else weight[head // 2].topk(2).indices.tolist()
        turn = rotations(model.config, 64)
        for n in set(range(half)) - set(pairs):
            turn[:, [n, n + half]] = torch.eye(DIM)[[n, n + half]]
        want = torch.einsum("sde,se->sd", turn, q[head]) @ torch.einsum(
            "sde,se->sd", turn, k[head]).T
        got = seen.q[0, head] @ seen.k[0, head // 2].T
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_which_pairs_stay():
    pairs = torch.arange(16).view(2, 8).t()
    assert chosen("high", 3, 1, pairs, None).tolist() == [[0, 1, 2]]
    assert chosen("low", 3, 1, pairs, None).tolist() == [[5, 6, 7]]
    assert chosen("uniform", 4, 2, pairs, None).tolist() == [[0, 2, 4, 6]] * 2


def test_with_all_pairs_and_all_ranks_nothing_is_lost():
    program, ids = base(), prompt(40, batch=2)
    made = program.lower("mha2mla(rope=1.0, ratio=1.0, whiten=false)")
    want, got = logits(program, ids), logits(made, ids)
    assert [type(o) for o in made.outcomes["partial"]] == [Refused] * 2
    assert not torch.equal(want, got)
    assert (got - want).abs().max() <= 512 * EPS * want.abs().max()


@pytest.mark.parametrize("arch", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_the_latent_is_absorbed_and_its_error_falls_with_its_rank(arch):
    """K and V are as before `project`, but for what the rank leaves out."""
    program, ids, errors = base(arch), prompt(64, batch=2), []
    for ratio in (0.25, 0.5, 0.75, 1.0):
        made = program.lower(f"mha2mla(ratio={ratio}, multiple=1)", calibration=ids)
        pairs = zip(*(Samples(made.after(n).graph_module, ids).attention[:1]
                      for n in ("partial", "project")), strict=True)
        errors += [sum(float((getattr(b, s) - getattr(a, s)).norm() / getattr(a, s).norm())
                       for s in "kv") for a, b in pairs]
        assert (logits(made, ids) - logits(made.after("project"), ids)).abs().max() <= (
            1024 * EPS * logits(made, ids).abs().max())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-4


@pytest.mark.parametrize("by", slow_but(["norm"], ["norm", "high"]))
def test_a_latent_and_rotary_channels_are_what_is_stored(by):
    """2 of 8 pairs of 2 heads, and half of what 2 heads' V and 12 of 16 channels of K have."""
    model = kvcompile.optimize(tiny("llama", num_hidden_layers=2), f"mha2mla(by={by}, multiple=1)",
                               compile=False, calibration=prompt(64, 2))
    for site in model.kvcompile.engine.sites:
        assert (site.heads, site.dims, site.store.v_in_k) == (1, (36, 28), True)
        assert not site.rebuilt
    report, ids = kvcompile.explain(model), prompt(200)
    with torch.no_grad():
        assert model(ids, use_cache=True).past_key_values.nbytes == report.kv_bytes(200)
    assert report.kv_bytes(256) <= (36 / 64 + 0.01) * report.baseline_kv_bytes(256)


@pytest.mark.slow
def test_pairs_are_only_dropped_where_there_are_some():
    (outcome, _) = base("gpt2").lower("mha2mla(whiten=false)").outcomes["partial"]
    assert isinstance(outcome, Refused) and outcome.reason == "keys are not rotated"
    program = base("qwen3").lower("mha2mla(whiten=false)")
    assert "a norm stands between" in program.outcomes["partial"][0].reason
    from kvcompile.passes.partial import PASS

    gm = copy_graph(base().after("canonicalize").graph_module)
    gm.meta.clear()
    with pytest.raises(RecipeError, match=r"^mha2mla: norms of queries and keys need a text"):
        PASS.run(gm, plan("mha2mla", len(attention_nodes(gm.graph))))


@pytest.mark.parametrize("arch", slow_but(["gpt2"], ["llama", "gpt2", "phi3"]))
def test_v_is_computed_from_k_and_not_stored(arch):
    """Biases, a fused projection, with and without rotation."""
    options = {} if arch == "gpt2" else {"num_key_value_heads": HEADS}
    source = tiny(arch, num_hidden_layers=2, **options)
    full = kvcompile.optimize(source, "full", compile=False)
    model = kvcompile.optimize(full, "slim", compile=False)
    for site in model.kvcompile.engine.sites:
        assert (site.heads, site.dims, site.store.v_in_k) == (1, (64, 64), True)
    ids = prompt(140)
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                   output_logits=True, attention_mask=torch.ones_like(ids))
    want, got = source.generate(ids, **options), model.generate(ids, **options)
    assert torch.equal(want.sequences, got.sequences)
    for a, b in zip(want.logits, got.logits, strict=True):
        assert 0 < (a - b).abs().max() <= 1e-3 * a.abs().max()  # conditions of some hundred
    report = kvcompile.explain(model)
    with torch.no_grad():
        assert model(prompt(256), use_cache=True).past_key_values.nbytes == report.kv_bytes(256)
    assert report.kv_bytes(256) <= 0.51 * report.baseline_kv_bytes(256)


def test_how_far_rounding_puts_v_off():
    """Measured on random inputs with K rounded to bfloat16."""
    g = torch.Generator().manual_seed(0)
    wk, wv = (torch.randn(32, 32, generator=g).bfloat16() for _ in range(2))
    made, told = rebuilt(wk, wv)
    x = torch.randn(32, 1000, generator=g).double()
    k, v = wk.double() @ x, wv.double() @ x
    off = (made @ k.bfloat16().double() - v).norm() / v.norm()
    assert off <= told <= 6 * off  # of a largest error the root of its mean square is a third
    assert torch.allclose(made @ k, v)


@pytest.mark.parametrize("change, reason", [
    (lambda m: None, "K has 32 channels of 64: W_k has no inverse"),
    (lambda m: m.model.layers[0].self_attn.k_proj.weight.data[:3].zero_(), "is nearly singular")])
def test_without_an_inverse_k_and_v_stay(change, reason):
    heads = 2 if "no inverse" in reason else HEADS
    model = tiny("llama", num_hidden_layers=1, num_key_value_heads=heads)
    change(model)
    program = kvcompile.capture(model, "slim")
    (outcome,) = program.outcomes["slim"]
    assert isinstance(outcome, Refused) and reason in outcome.reason and outcome.node
    assert program.sites[0].dims == (DIM, DIM) and not program.sites[0].store.v_in_k


def test_weights_that_are_factored_already_are_named():
    ids = torch.randint(0, 128, (2, 64), generator=torch.Generator().manual_seed(0))
    program = optimized("llama:2").kvcompile.program.lower("slim+mha2mla", calibration=ids)
    assert [o.reason for o in program.outcomes["slim"]] == 2 * ["k has been factored already"]
