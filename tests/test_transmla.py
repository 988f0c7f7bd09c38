"""TransMLA: one rotary head, a mixture of all kv heads' keys, beside a latent for the rest."""

import pytest
import torch
from support import greedy, optimized, prompt, slow_but
from test_project import logits
from transformers import AttentionInterface

import kvcompile
from kvcompile.calibration.rorope import concentrate
from kvcompile.errors import RecipeError
from kvcompile.models.tiny import tiny

EPS = torch.finfo(torch.float32).eps


def theirs(arch, fold, text, ids):
    """Logits of transformers' model in which of the keys of all heads, a vector of H `fold` complex
    numbers for every `fold` rotary pairs, the `fold` principal components are rotated (in place of
    the first head's), and the others are not. They are those of `text`, with real coefficients."""
    model = tiny(arch)
    heads, half = model.config.num_key_value_heads, 8
    seen, basis = {}, {}

    def note(module, args, kwargs):
        x, angles = kwargs["hidden_states"], kwargs["position_embeddings"]
        seen[module.layer_idx] = module.q_proj(x), module.k_proj(x), angles

    def folded(x):
        """[N, heads * 16] -> complex [N, half / fold, heads * fold]."""
        x = x.double().unflatten(-1, (heads, 2, half // fold, fold))
        z = torch.complex(x[:, :, 0], x[:, :, 1])                     # [N, H, blocks, fold]
        return z.transpose(1, 2).flatten(2)

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(text)
    for i, (_, k, _) in seen.items():
        z = folded(k.flatten(0, 1)).transpose(0, 1)                   # [blocks, N, H fold]
        both = torch.cat([z.real, z.imag], 1)
        basis[i] = torch.linalg.svd(both, full_matrices=False)[2].mT  # columns, the largest first

    def attend(module, q, k, v, mask, scaling=None, **_):
        pure, k, (cos, sin) = seen[module.layer_idx]
        turn = torch.polar(torch.ones(()).double(), torch.atan2(sin, cos)[0, :, :half].double())
        turn = turn.unflatten(-1, (half // fold, fold))               # [T, blocks, fold]
        pure = pure.unflatten(-1, (-1, 16)).double()
        zq = torch.complex(pure[0, ..., :8], pure[0, ..., 8:])        # [T, Hq, half]
        zk, per = folded(k[0]), zq.shape[1] // heads
        scores = []
        for h in range(zq.shape[1]):
            own = torch.zeros(len(zq), heads, half // fold, fold).to(zq)
            own[:, h // per] = zq[:, h].unflatten(-1, (half // fold, fold))
            a, b = (torch.einsum("bcj,tbc->tbj", basis[module.layer_idx].to(x), x)
                    for x in (own.transpose(1, 2).flatten(2), zk))
            a, b = (torch.cat([x[..., :fold] * turn, x[..., fold:]], -1).flatten(1) for x in (a, b))
            scores.append((a @ b.mT.conj()).real * scaling)
        scores = torch.stack(scores).float()
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (p @ v[0].repeat_interleave(per, 0))[None].transpose(1, 2), None

    AttentionInterface.register("transmla", attend)
    model.set_attn_implementation("transmla")
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("case", slow_but([("llama", 1), ("llama", 4)],
                                          [("llama", 1), ("llama", 4), ("qwen2", 2)]))
def test_the_principal_mixtures_keep_their_rotation(case):
    """With a latent of full rank; against complex numbers in transformers' model."""
    arch, fold = case
    text, ids = prompt(64, batch=2, seed=5), prompt(40)
    program = optimized(arch).kvcompile.program.lower(
        f"transmla(ratio=1.0, fold={fold}, multiple=1)", calibration=text)
    got, exact = logits(program, ids), logits(optimized(arch).kvcompile.program, ids)
    want = theirs(arch, fold, text, ids)
    assert (exact - want).abs().max() > 0.05 * want.abs().max(), "something is lost"
    assert (got - want).abs().max() <= 2e-3 * want.abs().max()


def test_a_mixture_of_all_is_all_there_is():
    """fold = P: the rotary head is the whole of one head's channels, and k . q is as it was before
    any rotation: an orthogonal change of all heads' channels."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 16, 24, generator=g).double() for n in (6, 3))
    x = torch.randn(50, 24, generator=g).double()
    keys = (x @ k.flatten(0, 1).T)
    pairs = torch.arange(16).view(2, -1).t()
    for fold in (1, 2, 8):
        made = concentrate(q, k, keys.T @ keys / 50, pairs, fold)
        want = torch.einsum("hdn,tn->htd", q, x) @ torch.einsum(
            "hdn,tn->htd", k, x).repeat_interleave(2, 0).mT
        rest = torch.einsum("hdn,tn->htd", made.k, x).repeat_interleave(2, 0).mT
        got = torch.einsum("hdn,tn->htd", q, x) @ rest + torch.einsum(
            "hdn,tn->htd", made.q_turned, x) @ (x @ made.k_turned.T).T
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()
        assert 1 / 3 < made.carried < 1


def test_what_is_cached_is_deepseeks():
    model = kvcompile.optimize(optimized("llama"), "transmla(multiple=1)", compile=False,
                               calibration=prompt(64, 2))
    for site in model.kvcompile.engine.sites:
        assert (site.heads, site.dims, site.store.v_in_k) == (1, (32 + 16, 32), True)
        assert not site.rebuilt
    report = kvcompile.explain(model)
    with torch.no_grad():
        assert model(prompt(200), use_cache=True).past_key_values.nbytes == report.kv_bytes(200)
    errors, ids = [], prompt(40)
    want = logits(optimized("llama").kvcompile.program, ids)
    for ratio in (0.125, 0.5, 1.0):
        program = optimized("llama").kvcompile.program.lower(
            f"transmla(ratio={ratio}, multiple=1)", calibration=prompt(64, 4))
        errors.append(float((logits(program, ids) - want).norm()))
    assert errors[0] > errors[-1]
    got, stateless = (logits(model.kvcompile.program, ids)[0, -1],
                      greedy(model, ids, 1, return_dict_in_generate=True, output_logits=True))
    assert (got - stateless.logits[0][0]).abs().max() <= 512 * EPS * got.abs().max()


@pytest.mark.parametrize("arch, recipe, reason", [
    ("llama", "transmla(fold=32)", "32 does not divide the 8 rotary pairs of layer 0"),
    ("llama", "transmla(fold=3)", "fold must be one of 1, 2")])
def test_what_cannot_be_is_refused(arch, recipe, reason):
    with pytest.raises(RecipeError, match=reason):
        optimized(arch).kvcompile.program.lower(recipe, calibration=prompt(64, 2))


def test_layers_that_cannot_be_converted_say_why():
    program = optimized("qwen3").kvcompile.program.lower("transmla", calibration=prompt(64, 2))
    assert "a norm stands" in program.outcomes["partial"][0].reason
    one = kvcompile.capture(tiny("llama", num_hidden_layers=1, num_key_value_heads=1))
    assert "one kv head has all" in one.lower("transmla", calibration=prompt(64, 2)).outcomes[
        "partial"][0].reason
