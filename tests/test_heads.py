"""heads: kv heads put into groups, exactly, and merged into one."""

from functools import cache

import pytest
import torch
from support import prompt
from test_project import logits

import kvcompile
from kvcompile.calibration.grouping import group
from kvcompile.errors import RecipeError
from kvcompile.ir import attention_nodes
from kvcompile.models.tiny import tiny
from kvcompile.plan import plan
from kvcompile.rewrite import Refused, copy_graph

EPS = torch.finfo(torch.float32).eps
HEADS, DIM = 4, 16


def rows(model, side):
    """(parameter, its rows [H, D] or columns) of K or V of each layer, fused or not."""
    for layer in model.model.layers:
        own = layer.self_attn
        if hasattr(own, "qkv_proj"):
            first = HEADS * DIM * (1 if side == "k" else 2)
            yield [own.qkv_proj.weight[first : first + HEADS * DIM]]
        else:
            yield list(getattr(own, f"{side}_proj").parameters())


def made(arch, change, **options):
    """A tiny model of 4 kv heads with `change(x [H, D, ...])` made to the rows of K and V."""
    model = tiny(arch, num_hidden_layers=2, num_key_value_heads=HEADS, **options)
    with torch.no_grad():
        for side in "kv":
            for own in rows(model, side):
                for p in own:
                    p.copy_(change(p.unflatten(0, (HEADS, DIM)), side).flatten(0, 1))
    return model


def mean(size):
    def change(x, side):
        groups = x.unflatten(0, (-1, size)).mean(1)
        return groups.repeat_interleave(size, 0)
    return change


def as_it_is(x, side):
    return x


@pytest.mark.parametrize("arch, size", [("llama", 2), ("qwen2", 4), ("phi3", 2)])
def test_a_group_becomes_the_mean_of_its_heads(arch, size):
    """Biases, a fused projection: the model whose heads of a group all are the mean."""
    ids = prompt(40, batch=2)
    program = kvcompile.capture(made(arch, as_it_is), f"gqa(heads={size})")
    with torch.no_grad():
        want = made(arch, mean(size))(ids, use_cache=False).logits
    got = logits(program, ids)
    assert {site.heads for site in program.sites} == {HEADS // size}
    assert (got - want).abs().max() <= 512 * EPS * want.abs().max()
    assert (logits(program, ids, "canonicalize") - want).norm() > 0.01 * want.norm()


@pytest.mark.parametrize("recipe", ["gqa", "gqa(by=svd)"])
def test_equal_heads_are_merged_exactly_and_half_the_bytes_stay(recipe):
    source = made("llama", mean(2))
    base = kvcompile.optimize(source, "full", compile=False)
    model = kvcompile.optimize(base, recipe, compile=False, calibration=prompt(64, 2, seed=3))
    ids = prompt(130)
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                   output_logits=True, attention_mask=torch.ones_like(ids))
    want, got = source.generate(ids, **options), model.generate(ids, **options)
    assert torch.equal(want.sequences, got.sequences)
    for a, b in zip(want.logits, got.logits, strict=True):
        assert (a - b).abs().max() <= 1024 * EPS * a.abs().max()
    with torch.no_grad():
        halves = [m(prompt(256), use_cache=True).past_key_values.nbytes for m in (base, model)]
    assert halves[1] == kvcompile.explain(model).kv_bytes(256) <= halves[0] * 0.51
    assert kvcompile.explain(model).kv_bytes(256) * 2 <= (
        kvcompile.explain(model).baseline_kv_bytes(256) * 1.02)


def turns(side):
    """For each head a turn that nothing notices: of rotary pairs for K, any for V."""
    g = torch.Generator().manual_seed(5)
    out = []
    for _ in range(HEADS):
        if side == "v":
            out.append(torch.linalg.qr(torch.randn(DIM, DIM, generator=g))[0])
            continue
        angle = torch.rand(DIM // 2, generator=g) * 6
        c, s = angle.cos().diag(), angle.sin().diag()
        out.append(torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)]))
    return torch.stack(out)


def hidden(turned):
    """Heads 0 and 2, and 1 and 3, are one but for a turn."""
    def change(x, side):
        x = x[[0, 1, 0, 1]]
        return torch.einsum("hde,hei->hdi", turns(side), x) if turned else x
    return change


@cache
def planted(turned):
    return kvcompile.capture(made("llama", hidden(turned)))


@pytest.mark.parametrize("recipe, turned", [
    ("gqa(group=cosine)", False), ("gqa(group=cosine, align=true)", True),
    ("gqa(group=cka, align=true)", True)])
def test_heads_that_are_one_are_found_and_merged_exactly(recipe, turned):
    base = planted(turned)
    program = base.lower(recipe, calibration=prompt(64, 2, seed=3))
    ids = prompt(40, batch=2)
    want, got = logits(base, ids), logits(program, ids)
    assert [o.what.split(",")[0] for o in program.outcomes["heads"]] == ["heads 0 2 | 1 3"] * 2
    assert {site.heads for site in program.sites} == {2}
    assert (got - want).abs().max() <= 1e-4 + 1e-5 * want.abs().max()
    assert (logits(base.lower("gqa"), ids) - want).norm() > 0.01 * want.norm()


def test_groups_by_cka_do_not_see_turns():
    g = torch.Generator().manual_seed(0)
    one, two = (torch.randn(1, 200, DIM, generator=g) for _ in range(2))
    heads = torch.stack([one, two, one @ turns("v")[0].mT, two @ turns("v")[1].mT], 1)
    assert group(heads, heads, 2, "cka", False, None).heads == (0, 2, 1, 3)
    assert group(heads, heads, 2, "place", False, None).heads == (0, 1, 2, 3)
    found = group(heads, heads, 2, "cka", True, None)
    assert found.after == pytest.approx(1, abs=1e-6) and found.before < 0.9


@pytest.mark.parametrize("arch, options, reason", [
    ("llama", {"num_key_value_heads": 1}, "1 kv heads do not fall into groups of 2"),
    ("qwen3", {}, "a norm stands between the projection and attention")])
def test_what_cannot_be_merged_says_why(arch, options, reason):
    program = kvcompile.capture(tiny(arch, num_hidden_layers=1, **options), "gqa")
    (outcome,) = program.outcomes["heads"]
    assert isinstance(outcome, Refused) and reason in outcome.reason and outcome.node


def test_likeness_needs_a_text():
    from kvcompile.passes.heads import PASS

    program = kvcompile.capture(tiny("llama", num_hidden_layers=1))
    gm = copy_graph(program.after("canonicalize").graph_module)
    gm.meta.clear()
    with pytest.raises(RecipeError, match=r"^gqa\(group=cka\): finding heads .* needs a text"):
        PASS.run(gm, plan("gqa(group=cka)", len(attention_nodes(gm.graph))))
