"""CSKV: older tokens are latents, newer ones exact; factors found on a text, or given in a file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import decodes_what_the_graph_says, greedy, optimized, plain, prompt, slow_but
from test_project import logits
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvcompile
from kvcompile.calibration.samples import Samples
from kvcompile.errors import RecipeError
from kvcompile.kernels.tail import Tail
from kvcompile.measure.perplexity import forced_decode
from kvcompile.models.tiny import tiny

EPS = torch.finfo(torch.float32).eps
GOLDEN = Path(__file__).parent / "golden"


def made_up(model, rank, whole=False, seed=0):
    """Factors as training might leave them, of every layer, by their names in the file: A outside
    of what W can see, and B A near W. `whole`: W in front of A, as the authors' programs have it.
    """
    g, tensors = torch.Generator().manual_seed(seed), {}
    for i, layer in enumerate(model.model.layers):
        for side in "kv":
            w = getattr(layer.self_attn, f"{side}_proj").weight.detach()
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            a = v[:rank] + 0.05 * torch.randn(rank, w.shape[1], generator=g)
            name = f"model.layers.{i}.self_attn.{side}_proj"
            tensors[f"{name}_a.weight"] = torch.cat([w, a] if whole else [a])
            tensors[f"{name}_b.weight"] = (u[:, :rank] * s[:rank]).contiguous()
    return tensors


def theirs(model, tensors, window, ids):
    """Logits of transformers' model in which query i sees B A x of tokens before i - `window`, and
    the others as they are."""
    def note(module, args, kwargs):
        module.given = kwargs["hidden_states"], kwargs["position_embeddings"]

    def attend(module, q, k, v, mask, scaling=None, **_):
        x, (cos, sin) = module.given
        name = f"model.layers.{module.layer_idx}.self_attn."
        low = {}
        for side in "kv":
            a, b = (tensors[f"{name}{side}_proj_{n}.weight"] for n in "ab")
            bias = getattr(module, f"{side}_proj").bias
            y = x @ a[-b.shape[1]:].T @ b.T + (0 if bias is None else bias)
            low[side] = y.unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
        old = apply_rotary_pos_emb(low["k"], low["k"], cos, sin)[0]
        i = torch.arange(q.shape[2])
        near = i[None] >= i[:, None] - window
        per = q.shape[1] // k.shape[1]
        scores = torch.where(near, *(q @ y.repeat_interleave(per, 1).mT * scaling
                                     for y in (k, old)))
        p = scores.masked_fill(i[None] > i[:, None], -torch.inf).softmax(-1)
        o = sum((p * part) @ y.repeat_interleave(per, 1)
                for part, y in ((near, v), (~near, low["v"])))
        return o.transpose(1, 2), None

    AttentionInterface.register("cskv", attend)
    model.set_attn_implementation("cskv")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("case", slow_but(
    [("llama", 16, 32, False)], [("llama", 16, 32, False), ("llama", 24, 1, True),
                                 ("qwen2", 16, 32, True)]))
def test_decoding_is_that_of_a_model_with_exact_newest_tokens(case, tmp_path):
    """Token by token through the cache, against whole sequences in transformers."""
    arch, rank, window, whole = case
    tensors, ids = made_up(plain(arch), rank, whole), prompt(90)
    save_file(tensors, tmp_path / "factors.safetensors")
    recipe = f'cskv(window={window}, factors="{tmp_path}/factors.safetensors")'
    model = kvcompile.optimize(optimized(arch), recipe, compile=False)
    got = torch.tensor(forced_decode(model, ids, context=1).nll)
    want, all_low = (torch.nn.functional.cross_entropy(
        theirs(tiny(arch), tensors, n, ids)[0, 1:-1], ids[0, 2:], reduction="none")
        for n in (window, 0))
    assert (got - want).abs().max() <= 1e-3
    assert (all_low - want).abs().max() > 0.01
    width = 2 * plain(arch).config.num_key_value_heads * 16
    for site in model.kvcompile.engine.sites:
        assert site.heads == 1 and {*site.dims} == {width // 2 + rank}
        assert site.store.k.format == Tail(drop=width // 2) and site.store.k.lag == window
    with torch.no_grad():
        nbytes = model(prompt(200), use_cache=True).past_key_values.nbytes
    assert nbytes == kvcompile.explain(model).kv_bytes(200)
    assert kvcompile.explain(model).rows[-1].after == 2 * (4 * rank + 1)


@pytest.mark.parametrize("recipe", ["cskv(ratio=1.0, by=svd)", "cskv(ratio=0.125, window=200)"])
def test_nothing_is_lost_at_full_rank_or_while_tokens_are_new(recipe):
    model, ids = kvcompile.optimize(optimized("llama"), recipe, compile=False,
                                    calibration=prompt(64, 2)), prompt(120)
    want = logits(optimized("llama").kvcompile.program, ids)[0]
    own = torch.nn.functional.cross_entropy(want[1:-1], ids[0, 2:], reduction="none")
    got = torch.tensor(forced_decode(model, ids, context=1).nll)
    assert (got - own).abs().max() <= 1e-4


def test_factors_are_the_svd_of_the_scaled_weight():
    """ASVD: W S = U s V^T with S = diag(E|x|^(1/2)); B A = U_r s_r V_r^T S^-1, exact beside it."""
    ids, model = prompt(64, batch=2), plain("llama:2")
    base = optimized("llama:2").kvcompile.program
    program = base.lower("cskv(ratio=0.25, multiple=1)", calibration=ids)
    hidden = {}
    layer = model.model.layers[0].self_attn
    hook = layer.register_forward_pre_hook(
        lambda m, args, kwargs: hidden.update(x=kwargs["hidden_states"]), with_kwargs=True)
    with torch.no_grad():
        model(ids)
    hook.remove()
    w = layer.v_proj.weight.detach().double()
    scale = hidden["x"].double().abs().flatten(0, 1).mean(0).sqrt()
    u, s, v = torch.linalg.svd(w * scale, full_matrices=False)
    want = (u[:, :8] * s[:8]) @ v[:8] / scale
    gm = program.after("project").graph_module
    down, up = (getattr(gm, f"layer0_v_{n}").double() for n in ("down", "up0"))
    assert torch.equal(up[:, :32], torch.eye(32).double())
    assert (up[:, 32:] @ down[32:] - want).abs().max() <= 1e-5 * want.abs().max()
    assert (up @ down - w).abs().max() <= 8 * EPS * w.abs().max()
    seen = [Samples(p.graph_module, ids).attention[0].v for p in (base, program.after("project"))]
    assert (seen[0] - seen[1]).abs().max() <= 64 * EPS * seen[0].abs().max()


@pytest.mark.parametrize("arch, recipe", [
    ("llama", "cskv(window=0, by=svd)+kivi(bits=4, group=16)"),
    ("gpt2", "cskv(by=svd, heads=2)"), ("llama", "cskv(by=svd)+streamingllm(window=64)")])
def test_it_composes_with_what_stores_the_latents(arch, recipe):
    decodes_what_the_graph_says(arch, recipe)
    model = optimized(arch, recipe)
    for site in model.kvcompile.engine.sites:
        for side in (site.store.k, site.store.v):
            assert isinstance(side.format, Tail)
            assert (side.format.of.name == "int") == ("kivi" in recipe)
    assert kvcompile.explain(model).kv_bytes(300) == model(
        prompt(300), use_cache=True).past_key_values.nbytes


def test_the_compiled_step_reads_both_tiers():
    """Two rows of different lengths, across a page."""
    recipe = "cskv(by=svd)"
    models = [kvcompile.optimize(optimized("llama:2"), recipe, compile=c) for c in (False, True)]
    ids, mask = prompt(125, batch=2), torch.ones(2, 125, dtype=torch.long)
    mask[1, :13] = 0
    options = dict(attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    want, got = (greedy(m, ids, 8, **options) for m in models)
    assert torch.equal(want.sequences, got.sequences)
    for a, b in zip(want.logits, got.logits, strict=True):
        assert (a - b).abs().max() <= 1024 * EPS * a.abs().max()
    assert {r.kernel for r in kvcompile.explain(models[1]).rows} == {"fused C++"}


@pytest.mark.parametrize("change, reason", [
    (lambda t: t.pop("model.layers.1.self_attn.v_proj_b.weight"),
     r"holds no layers.1.self_attn.v_proj_b.weight"),
    (lambda t: t.update({"model.layers.0.self_attn.k_proj_a.weight": torch.zeros(15, 64)}),
     r"layers.0.self_attn.k_proj_a is \[15, 64\], not \[16, 64\]"),
    (lambda t: t.update({"model.layers.0.self_attn.k_proj_b.weight": torch.zeros(16, 16)}),
     r"layers.0.self_attn.k_proj_b is \[16, 16\], not \[32, at most 32\]"),
    (lambda t: t.pop("model.layers.0.self_attn.k_proj_a.weight"),
     "holds no layers.0.self_attn.k_proj_a.weight")])
def test_factors_that_do_not_fit_are_refused(change, reason, tmp_path):
    tensors = made_up(plain("llama:2"), 16)
    change(tensors)
    save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises(RecipeError, match=reason) as error:
        optimized("llama:2").kvcompile.program.lower(f'cskv(factors="{tmp_path}/f.safetensors")')
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe, reason", [
    ('cskv(factors="nowhere.safetensors")', "nowhere.safetensors cannot be read: No such file"),
    (f'cskv(factors="{__file__}")', "is no safetensors file"),
    ("cskv(factors=3)", "factors=3: must name a safetensors file"),
    ("cskv+kivi", "both set lag.k"),
    ("cskv(by=svd)+palu", "both set rank")])
def test_what_cannot_be_is_refused_in_a_line(recipe, reason):
    with pytest.raises(RecipeError, match=reason) as error:
        optimized("llama:2").kvcompile.program.lower(recipe)
    assert "\n" not in str(error.value)


def test_layers_are_not_merged_behind_the_newest_tokens():
    program = optimized("gpt2").kvcompile.program.lower("cskv(by=svd)+minicache(start=0)")
    assert {o.reason for o in program.outcomes["merge"]} >= {
        "only the newest tokens of layer 0 are kept whole"}


def test_the_graph_before_and_after(request):
    model = tiny("llama", num_hidden_layers=1)
    program = kvcompile.optimize(model, "cskv(by=svd)", compile=False).kvcompile.program
    text = ""
    for name in ("project", "quantize"):
        lines = str(program.after(name)).splitlines()
        start = next(i for i, line in enumerate(lines) if "q_proj" in line)
        end = next(i for i, line in enumerate(lines) if "o_proj" in line)
        text += f"after {name}\n" + "\n".join(lines[start : end + 1]) + "\n"
    path = GOLDEN / "cskv.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()
