"""project: factors of K's and V's projections; their latents are what is cached."""

from functools import cache
from pathlib import Path

import pytest
import torch
from support import greedy, optimized, prompt

import kvcompile
from kvcompile.calibration.factor import factor, rank_of, spectrum
from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.ir import attention_nodes
from kvcompile.measure.perplexity import forced_decode
from kvcompile.models.tiny import tiny
from kvcompile.passes.project import progressive
from kvcompile.rewrite import Refused

GOLDEN = Path(__file__).parent / "golden"
EPS = torch.finfo(torch.float32).eps


def logits(program, ids, name=None):
    gm = (program.after(name) if name else program).graph_module
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    with torch.no_grad():
        return gm(ids, positions, torch.ones_like(ids, dtype=torch.bool), positions[0])


def lowered(arch, recipe, **options):
    return optimized(arch).kvcompile.program.lower(recipe, **options)


def test_factors_are_the_truncated_svd_of_the_whitened_weight():
    """W S = U s V^T with S S^T the inputs' covariance; then W' = U_r s_r V_r^T S^-1."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(24, 40, generator=g, dtype=torch.float64)
    x = torch.randn(500, 40, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, 40)
    cov = x.t() @ x / len(x)
    s = torch.linalg.cholesky(cov)
    u, values, v = torch.linalg.svd(w @ s)
    for rank in (1, 7, 24):
        made = factor(w, w @ cov @ w.t(), rank)
        want = (u[:, :rank] * values[:rank]) @ v[:rank] @ torch.linalg.inv(s)
        assert torch.allclose(made.up @ made.down, want, atol=1e-9)
        assert made.kept == pytest.approx(float((values[:rank]**2).sum() / (values**2).sum()))
    plain_svd = factor(w, w @ w.t(), 5)
    u, values, v = torch.linalg.svd(w)
    assert torch.allclose(plain_svd.up @ plain_svd.down, (u[:, :5] * values[:5]) @ v[:5])
    turned = factor(w, w @ w.t(), 8, rotate=True)
    straight = factor(w, w @ w.t(), 8)
    assert torch.allclose(turned.up @ turned.down, straight.up @ straight.down)
    assert not torch.allclose(turned.down, straight.down)


def test_ranks_by_number_fraction_and_energy():
    values = spectrum(torch.diag(torch.tensor([8.0, 1, 4, 2])))[0]
    assert values.tolist() == [8, 4, 2, 1]
    assert rank_of(3, None, values, 16) == 3 and rank_of(9, None, values, 1) == 4
    assert [rank_of(r, None, values, 1) for r in (0.25, 0.5, 1.0)] == [1, 2, 4]
    assert [rank_of(0.5, e, values, 1) for e in (0.5, 0.8, 0.81, 1.0)] == [1, 2, 3, 4]
    assert rank_of(0.5, 0.5, values, 2) == 2 and rank_of(0.01, None, values, 2) == 2


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "phi3", "gemma2"])
def test_full_rank_is_exact(arch):
    program, ids = lowered(arch, "palu(ratio=1.0, whiten=false)"), prompt(40, batch=2)
    want, got = logits(program, ids, "canonicalize"), logits(program, ids)
    assert program.outcomes["project"] and not torch.equal(want, got)
    assert (got - want).abs().max() <= 512 * EPS * want.abs().max()


def test_error_falls_with_the_rank():
    ids = prompt(60)
    program = lowered("llama", "palu(whiten=false)")
    want, errors = logits(program, ids, "canonicalize"), []
    for ratio in (0.125, 0.25, 0.5, 0.75, 1.0):
        made = lowered("llama", f"palu(ratio={ratio}, whiten=false, multiple=1)")
        errors.append(float((logits(made, ids) - want).norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


@cache
def narrow():
    """A model whose K and V have rank 16 of 32: Palu at that rank is exact, latents and all."""
    model = tiny("qwen2", num_hidden_layers=2)
    for layer in model.model.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            u, s, v = torch.linalg.svd(linear.weight.data, full_matrices=False)
            linear.weight.data = (u[:, :16] * s[:16]) @ v[:16]
    return kvcompile.optimize(model, "full", compile=False)


@pytest.mark.parametrize("recipe", ["palu(whiten=false)", "palu(whiten=false, hadamard=true)"])
def test_keys_and_values_of_low_rank_are_rebuilt_exactly(recipe):
    """Biases (qwen2), groups of query heads, prompts, decoding and padding."""
    model = kvcompile.optimize(narrow(), recipe, compile=False)
    for site in model.kvcompile.engine.sites:
        assert (site.heads, site.dims, site.rebuilt) == (1, (16, 16), True)
    ids, mask = prompt(40, batch=2), torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    options = dict(max_new_tokens=12, do_sample=False, attention_mask=mask,
                   return_dict_in_generate=True, output_logits=True)
    want, got = narrow().generate(ids, **options), model.generate(ids, **options)
    assert torch.equal(want.sequences, got.sequences)
    for a, b in zip(want.logits, got.logits, strict=True):
        assert (a - b).abs().max() <= 1024 * EPS * a.abs().max()


def test_k_and_v_may_share_one_latent():
    """K and V of one rank 16 each lie in 32 numbers of a token, once; nothing is left out."""
    model = kvcompile.optimize(narrow(), "jointkv(ratio=0.5, whiten=false)", compile=False)
    for site in model.kvcompile.engine.sites:
        assert (site.heads, site.dims, site.store.v_in_k) == (1, (32, 32), True)
    ids = prompt(40)
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True,
                   output_logits=True)
    want, got = narrow().generate(ids, **options), model.generate(ids, **options)
    assert torch.equal(want.sequences, got.sequences)
    for a, b in zip(want.logits, got.logits, strict=True):
        assert (a - b).abs().max() <= 1024 * EPS * a.abs().max()
    assert kvcompile.explain(model).kv_bytes(200) == model(
        prompt(200), use_cache=True).past_key_values.nbytes


def test_progressive_ranks_follow_the_condition_numbers():
    """LoRC by hand: kappa 4 * 1, 8 * 1, 2 * 1 from the first to the last layer."""
    weights = [[torch.diag(torch.tensor([k, 1.0])), torch.eye(2)] for k in (4.0, 8.0, 2.0)]
    assert progressive(weights) == pytest.approx([0, 2 / 5, 1])  # logs of 64, 16 and 2
    program = lowered("llama", "lorc(most=1.0, least=0.25, multiple=1)")
    ranks = [int(o.what.split("rank ")[1].split()[0]) for o in program.outcomes["project"][::2]]
    assert ranks[0] == 32 and ranks[-1] == 8 and ranks == sorted(ranks, reverse=True)


def test_positions_need_not_be_numbers():
    """Rotation at read is by each token's own position id, whatever it is."""
    model = kvcompile.optimize(narrow(), "palu(whiten=false)", compile=False)
    ids = prompt(30)
    positions = (torch.arange(30) * 3 + 5)[None]
    def run(m):
        with torch.no_grad():
            out = m(ids[:, :20], position_ids=positions[:, :20], use_cache=True)
            return m(ids[:, 20:], position_ids=positions[:, 20:], use_cache=True,
                     past_key_values=out.past_key_values).logits
    want, got = run(narrow()), run(model)
    assert (want - got).abs().max() <= 1024 * EPS * want.abs().max()


@pytest.mark.parametrize("arch, recipe, heads, dims", [
    ("llama", "palu(ratio=0.5, whiten=false)", 1, (16, 16)),
    ("llama", "palu(ratio=0.5, heads=1, multiple=8, whiten=false)", 2, (8, 8)),
    ("gpt2", "palu(ratio=0.5, heads=2, whiten=false)", 2, (16, 16)),
    ("llama", "palu(ratio=0.5, whiten=false)+kivi(bits=4, group=16)", 1, (16, 16))])
def test_latents_are_stored_and_decoding_is_the_stateless_graph(arch, recipe, heads, dims):
    model = kvcompile.optimize(optimized(arch), recipe, compile=False)
    sites = model.kvcompile.engine.sites
    assert {(site.heads, site.dims) for site in sites} == {(heads, dims)}
    assert {site.rebuilt for site in sites} == {arch != "gpt2"}  # no rotation: absorbed into q
    ids, report = prompt(200), kvcompile.explain(model)
    with torch.no_grad():
        assert model(ids, use_cache=True).past_key_values.nbytes == report.kv_bytes(200)
    assert report.kv_bytes(4096) < 0.52 * report.baseline_kv_bytes(4096)
    text = prompt(24)
    own = logits(model.kvcompile.program, text)
    want = torch.nn.functional.cross_entropy(own[0, 1:-1], text[0, 2:], reduction="none")
    got = torch.tensor(forced_decode(model, text, context=1).nll)
    assert (got - want).abs().max() <= 1e-4


def test_the_text_whitens():
    """Closer to the model on the text that whitened than unwhitened factors are."""
    ids = prompt(64, batch=4)
    blind = lowered("llama", "palu(ratio=0.5, whiten=false)")
    seen = lowered("llama", "palu(ratio=0.5)", calibration=ids)
    want = logits(blind, ids, "canonicalize")
    errors = [float((logits(p, ids) - want).norm()) for p in (seen, blind)]
    assert errors[0] < errors[1]
    again = seen.lower("palu(ratio=0.5)")  # the text is remembered
    assert torch.equal(logits(again, ids), logits(seen, ids))


def test_energy_gives_layers_ranks_of_their_own():
    program = lowered("llama", "palu(energy=0.8, multiple=1, whiten=false)")
    assert len({site.dims for site in program.sites}) > 1
    for outcome in program.outcomes["project"]:
        kept = float(outcome.what.split(", ")[1].rstrip("% kept"))
        assert 80 <= kept < 90


@pytest.mark.parametrize("arch, reason", [
    ("qwen3", "a norm stands between the projection and attention"),
    ("deepseek_v2:1", "comes from several projections")])
def test_what_cannot_be_factored_says_why(arch, reason):
    outcomes = lowered(arch, "palu(whiten=false)").outcomes["project"]
    assert any(isinstance(o, Refused) and reason in o.reason and o.node for o in outcomes)


def test_the_model_is_untouched_and_changed_weights_are_noticed():
    base = tiny("llama", num_hidden_layers=1)
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = kvcompile.optimize(base, "palu(whiten=false)", compile=False)
    assert all(torch.equal(before[n], p) for n, p in base.named_parameters())
    model(prompt(5), use_cache=True)
    with torch.no_grad():
        base.model.layers[0].self_attn.k_proj.weight.mul_(2)
    with pytest.raises(KVCompileError, match="k_proj.weight changed after optimize"):
        model(prompt(5), use_cache=True)


def test_explain_names_what_rebuilds_keys():
    report = kvcompile.explain(optimized("llama"), "palu(whiten=false)")
    why = {row.why for row in report.rows}
    assert why == {"calls of several tokens rebuild keys in the plain body of kvc.attend"}
    assert {row.kernel for row in report.rows} == {"fused C++"}
    assert any("2 x rank" in row.what or "1 x rank 16 of 32" in row.what for row in report.rows)


def test_the_graph_before_and_after(request):
    model = tiny("llama", num_hidden_layers=1)
    program = kvcompile.optimize(model, "palu(whiten=false)", compile=False).kvcompile.program
    for name in ("project", "place"):
        lines = str(program.after(name)).splitlines()
        start = next(i for i, line in enumerate(lines) if "q_proj" in line)
        end = next(i for i, line in enumerate(lines) if "o_proj" in line)
        text, path = "\n".join(lines[start : end + 1]) + "\n", GOLDEN / f"palu-{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert text == path.read_text()


def test_a_text_is_needed_to_whiten():
    from kvcompile.passes.project import PASS
    from kvcompile.plan import plan
    from kvcompile.rewrite import copy_graph

    gm = copy_graph(optimized("llama").kvcompile.program.after("canonicalize").graph_module)
    gm.meta.clear()
    with pytest.raises(RecipeError, match="whitening needs a text"):
        PASS.run(gm, plan("palu", len(attention_nodes(gm.graph))))




def test_the_compiled_step_rebuilds_keys():
    """Two rows of different lengths, across a page."""
    model = kvcompile.optimize(narrow(), "palu(whiten=false)")
    ids, mask = prompt(125, batch=2), torch.ones(2, 125, dtype=torch.long)
    mask[1, :13] = 0
    want, got = (greedy(m, ids, 8, attention_mask=mask) for m in (narrow(), model))
    assert torch.equal(want, got)
