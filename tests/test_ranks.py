"""Ranks of layers by Fisher information, and projections of K after its rotation."""

import pytest
import torch
from safetensors.torch import save_file
from support import optimized, prompt
from test_project import logits

import kvcompile
from kvcompile.calibration.fisher import fisher, shares
from kvcompile.calibration.greedy import costs as measured
from kvcompile.calibration.greedy import greedy
from kvcompile.calibration.samples import Samples
from kvcompile.errors import RecipeError
from kvcompile.ir import attention_nodes
from kvcompile.models.tiny import tiny
from kvcompile.passes.targets import target

EPS = torch.finfo(torch.float32).eps


def test_fisher_information_is_that_of_the_weights():
    """Of the model's own parameters, text by text; frozen weights or not."""
    model, ids = tiny("llama", num_hidden_layers=2), prompt(32, batch=3)
    gm = kvcompile.capture(model).graph_module
    nodes = attention_nodes(gm.graph)
    found = fisher(gm, ids, {(i, s): target(gm, nodes[i], s, i).linear
                             for i in range(2) for s in "kv"})
    weights = {(i, s): getattr(layer.self_attn, f"{s}_proj").weight.requires_grad_()
               for i, layer in enumerate(model.model.layers) for s in "kv"}
    squares = dict.fromkeys(weights, 0)
    for text in ids:
        loss = model(text[None], labels=text[None], use_cache=False).loss
        for key, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            squares[key] = squares[key] + g.square() / len(ids)
    assert found == pytest.approx({k: float(x.sqrt().mean()) for k, x in squares.items()}, rel=1e-3)


def test_shares_are_in_proportion_and_at_most_all():
    assert shares([1, 1, 2], [8, 8, 8], 0.5) == pytest.approx([3 / 8, 3 / 8, 6 / 8])
    assert shares([1, 1, 8], [8, 8, 8], 0.5) == pytest.approx([2 / 8, 2 / 8, 1])
    assert shares([1, 3, 16], [8, 8, 8], 0.5) == pytest.approx([1.4 / 8, 2.6 / 8, 1])
    assert shares([0, 0], [8, 8], 0.25) == pytest.approx([0.25, 0.25])
    assert shares([1, 2, 3], [8, 4, 8], 1.0) == pytest.approx([1, 1, 1])


def test_palu_gives_layers_what_they_matter():
    """The same channels altogether; what was found is written into the recipe."""
    ids = prompt(64, batch=2, seed=1)
    program = optimized("llama").kvcompile.program.lower("palu(ranks=calibrated, multiple=1)",
                                                         calibration=ids)
    (term,) = program.recipe.terms
    ranks = term.get("ranks")
    assert len({kept for own in ranks for kept in own}) > 2
    kept = [site.heads * n for site in program.sites for n in site.dims]
    assert kept == [round(32 * x) for own in ranks for x in own]
    assert sum(kept) == pytest.approx(0.5 * 32 * len(kept), abs=len(kept) / 2)
    assert program.lower(program.recipe).sites == program.sites


@pytest.mark.parametrize("recipe, reason", [
    ("palu(ranks=[[0.5, 2.0]], layers=0)", r"must be a list of \[K, V\]"),
    ("palu(ranks=[0.5])", r"must be a list of \[K, V\]"),
    ("palu(energy=0.9, ranks=[[0.5, 0.5]])", "energy= and ranks= both say"),
    ("palu(ranks=[[0.5, 0.5]])", "was calibrated for 1 layers, but claims 4")])
def test_ranks_that_do_not_fit_are_refused(recipe, reason):
    with pytest.raises(RecipeError, match=reason):
        optimized("llama").kvcompile.program.lower(recipe)


def test_rotated_keys_are_projected_on_their_principal_channels():
    """K' = U U^T K head by head, U from the SVD of all keys of the text; so V."""
    ids = prompt(64, batch=2)
    base = optimized("llama").kvcompile.program
    program = base.lower("matryoshkakv(ratio=0.25, multiple=1)", calibration=ids)
    want = Samples(base.graph_module, ids).attention[0]
    got = Samples(program.after("project").graph_module, ids).attention[0]
    for side in "kv":
        x, y = (getattr(s, side).transpose(0, 1).flatten(1, 2).double() for s in (want, got))
        for own, projected in zip(x, y, strict=True):
            _, _, v = torch.linalg.svd(own, full_matrices=False)
            near = own @ v[:4].mT @ v[:4]
            assert (projected - near).abs().max() <= 1e-4 * own.abs().max()
    assert {(s.heads, s.dims, s.rebuilt) for s in program.sites} == {(2, (4, 4), False)}


def test_projections_are_exact_at_full_rank_and_worse_below():
    ids, base = prompt(60), optimized("llama:2").kvcompile.program
    want, errors = logits(base, ids), []
    for ratio in (0.125, 0.5, 1.0):
        made = base.lower(f"matryoshkakv(ratio={ratio}, multiple=1)", calibration=prompt(64, 4))
        errors.append(float((logits(made, ids) - want).norm() / want.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 512 * EPS and errors[0] > 0.01


def test_greedy_ranks_cut_what_costs_least():
    """By hand: the cheapest quarter per channel first; then by what each layer costs alone."""
    costs = {"a": [0, 1, 2, 8], "b": [0, 5, 6, 7], "c": [0, 3, 9, 10]}
    sizes = {"a": 8, "b": 8, "c": 16}
    for ratio, kept in ((0.9, (0.5, 1, 1)), (0.8, (0.5, 1, 0.75)), (0.7, (0.5, 1, 0.5)),
                        (0.6, (0.5, 1, 0.25))):
        found = greedy(costs, sizes, ratio)
        assert found == dict(zip("abc", kept, strict=True)), ratio
        assert sum(sizes[k] * x for k, x in found.items()) <= ratio * 32
    base, ids = optimized("llama").kvcompile.program, prompt(64, batch=2)
    alone = measured(Samples(base.graph_module, ids))
    exact = logits(base, ids).log_softmax(-1)
    for side, own in (("k", "0.5, 1.0"), ("v", "1.0, 0.5")):
        made = base.lower(f"matryoshkakv(ranks=[[{own}]], multiple=1, layers=2)", calibration=ids)
        off = (exact.exp() * (exact - logits(made, ids).log_softmax(-1))).sum(-1).mean()
        assert alone[2, side][2] == pytest.approx(float(off), rel=1e-3, abs=1e-7)
        assert 0 == alone[2, side][0] < alone[2, side][1] < alone[2, side][3]
    program = base.lower("matryoshkakv(ranks=calibrated, multiple=1)", calibration=ids)
    (term,) = program.recipe.terms
    assert [s.dims for s in program.sites] == [
        tuple(round(16 * x) for x in own) for own in term.get("ranks")]
    assert sum(sum(s.dims) for s in program.sites) <= 0.5 * 32 * len(program.sites)
    with pytest.raises(RecipeError, match="keeps at least 1 / 4"):
        base.lower("matryoshkakv(ratio=0.2, ranks=calibrated)", calibration=ids)


def test_bases_may_be_given(tmp_path):
    """As a training would leave them: any orthonormal directions, the first of them kept."""
    base, ids, heads = optimized("llama:2").kvcompile.program, prompt(60), 2
    g, tensors = torch.Generator().manual_seed(0), {}
    for i in range(2):
        for side in "kv":
            turned = [torch.linalg.qr(torch.randn(16, 16, generator=g))[0] for _ in range(heads)]
            tensors[f"layers.{i}.self_attn.{side}_proj_b.weight"] = torch.cat(turned)
    save_file(tensors, tmp_path / "bases.safetensors")
    recipe = f'matryoshkakv(ratio=RATIO, multiple=1, factors="{tmp_path}/bases.safetensors")'
    program = base.lower(recipe.replace("RATIO", "0.25"))
    want = Samples(base.graph_module, ids).attention[0]
    got = Samples(program.after("project").graph_module, ids).attention[0]
    for side in "kv":
        u = tensors[f"layers.0.self_attn.{side}_proj_b.weight"].unflatten(0, (2, 16))[..., :4]
        x, y = (getattr(s, side)[0] for s in (want, got))
        assert (x @ u @ u.mT - y).abs().max() <= 1e-5 * x.abs().max()
    whole = logits(base.lower(recipe.replace("RATIO", "1.0")), ids)
    assert (whole - logits(base, ids)).abs().max() <= 512 * EPS * whole.abs().max()
    tensors["layers.1.self_attn.v_proj_b.weight"] *= 2
    save_file(tensors, tmp_path / "bases.safetensors")
    with pytest.raises(RecipeError, match=r"layers.1.self_attn.v_proj_b is not orthonormal"):
        base.lower(recipe.replace("RATIO", "0.5"))


def test_heads_that_norms_stand_before_can_be_projected_too():
    model = kvcompile.optimize(tiny("qwen3", num_hidden_layers=1), "matryoshkakv(multiple=1)",
                               compile=False, calibration=prompt(64, 2))
    assert [site.dims for site in model.kvcompile.engine.sites] == [(8, 8)]
    ids = prompt(200)
    with torch.no_grad():
        got = model(ids, use_cache=True).past_key_values.nbytes
    report = kvcompile.explain(model)
    assert got == report.kv_bytes(200) and report.kv_bytes(256) < 0.51 * (
        report.baseline_kv_bytes(256))


def test_recalkv_puts_similar_heads_into_one_group():
    """At full rank nothing is lost, though heads have moved; below it a reordered pair of equal
    keys needs no more channels than one."""
    model = tiny("llama", num_hidden_layers=1, num_key_value_heads=4)
    with torch.no_grad():
        w = model.model.layers[0].self_attn.k_proj.weight.unflatten(0, (4, 16))
        w[2:] = w[:2]
    base, ids = kvcompile.capture(model), prompt(64, batch=2)
    want = Samples(base.graph_module, ids).attention[0].k
    found = base.lower("recalkv(heads=2, multiple=1)", calibration=ids)
    assert found.outcomes["heads"][0].what.startswith("heads 0 2 | 1 3")
    got = Samples(found.after("project").graph_module, ids).attention[0].k
    assert (got - want[:, [0, 2, 1, 3]]).abs().max() <= 1e-4 * want.abs().max()
    palu = base.lower("palu(heads=2, multiple=1)", calibration=ids)
    lost = Samples(palu.after("project").graph_module, ids).attention[0].k - want
    assert lost.norm() > 0.01 * want.norm()
    full = base.lower("recalkv(ratio=1.0, heads=2)", calibration=ids)
    assert (logits(full, ids) - logits(base, ids)).abs().max() <= 512 * EPS * (
        logits(base, ids).abs().max())
