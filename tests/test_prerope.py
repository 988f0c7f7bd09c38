"""prerope: keys are cached before their rotation and turned at every read."""

import pytest
import torch

import kvcompile
from kvcompile.calibration.samples import Samples
from kvcompile.errors import RecipeError
from kvcompile.format import format_of
from kvcompile.models.tiny import tiny
from kvcompile.program import capture
from kvcompile.recipe import parse_term

IDS = torch.randint(3, 100, (2, 150), generator=torch.Generator().manual_seed(0))


def turned(x, cos, sin):
    """RoPE by halves: pairs (i, i + r/2) of the first r channels are turned by an angle."""
    r = cos.shape[-1]
    a, b, rest = x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
    c, s = cos[..., : r // 2], sin[..., : r // 2]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


@pytest.mark.parametrize("arch", ["phi", *(  # part of a head is turned; halves; windows
    pytest.param(arch, marks=pytest.mark.slow) for arch in ("llama", "gemma2"))])
def test_without_a_lossy_format_nothing_changes(arch):
    model = tiny(arch)
    own = kvcompile.optimize(model, "prerope", compile=False)
    assert all(site.rotated for site in own.kvcompile.program.sites)
    with torch.no_grad():
        cache = own(IDS, use_cache=True).past_key_values
        got = own(IDS[:, :3], past_key_values=cache).logits
        want = model(torch.cat([IDS, IDS[:, :3]], 1)).logits[:, -3:]
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_what_attention_sees_is_the_rotated_decoded_key():
    """Layer 0 of a stateless forward: rope(decode(encode(k))), k before its rotation."""
    program = capture(tiny("llama"), "rtn(bits=2, group=16)+prerope")
    seen = Samples(program.snapshots["capture"], IDS)
    after, before = seen.attention[0], seen.under("prerope").attention[0]
    d = before.k.shape[-1]
    angle = torch.arange(150)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
    assert (turned(before.k, cos, sin) - after.k).abs().max() <= 1e-5
    fmt = format_of(parse_term("int(bits=2, group=16)"))
    stored = [fmt.decode(fmt.encode(x, side), d, torch.float32, side)
              for side, x in (("k", before.k), ("v", before.v))]
    key = torch.cat([turned(stored[0], cos, sin)[..., :-1, :], after.k[..., -1:, :]], -2)
    value = torch.cat([stored[1][..., :-1, :], after.v[..., -1:, :]], -2)
    heads = after.q.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(heads, 1) for x in (key, value))
    weights = (after.q[..., -1:, :] @ key.mT * after.scale).softmax(-1)
    site = next(n for n in program.after("quantize").graph_module.graph.nodes
                if str(n.target) == "kvc.attention.default")
    run = torch.fx.Interpreter(program.after("quantize").graph_module)
    run.garbage_collect_values = False
    at = torch.arange(150)
    run.run(IDS, at.expand(2, -1), torch.ones_like(IDS, dtype=torch.bool), at[-1:])
    assert (run.env[site][..., -1:, :] - weights @ value).abs().max() <= 1e-4


def test_it_is_said_what_turns_keys():
    report = kvcompile.explain(tiny("llama"), "kivi+prerope")
    assert "calls of several tokens rebuild keys in the plain body of kvc.attend" in str(report)
    assert {row.kernel for row in report.rows} == {"fused C++"}
    places = [row.what for row in report.rows if row.name == "place"]
    assert len(places) == 4 and all("K is rebuilt at read" in what for what in places)


@pytest.mark.parametrize("arch", ["gpt2", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
def test_keys_that_are_not_rotated_as_a_whole_stay(arch):
    """Without RoPE, and where a part is rotated apart: as without the term."""
    plain = capture(tiny(arch), "full")
    assert plain.sites == plain.lower("prerope").sites


def test_palu_stores_its_latents_before_the_rotation_by_itself():
    with pytest.raises(RecipeError, match="recompute"):
        kvcompile.explain(tiny("llama"), "palu+prerope")


def test_codebooks_are_fitted_to_what_is_stored():
    """kvquant(pre_rope=true) finds other tables of K than kvquant, and the same ones of V."""
    program = capture(tiny("llama"), "full")
    found = [program.lower(f"kvquant(bits=2, pre_rope={flag})", calibration=IDS).recipe.terms[0]
             for flag in ("true", "false")]
    assert found[0].get("v") == found[1].get("v") and found[0].get("k") != found[1].get("k")
    sites = program.lower(str(found[0])).sites
    assert all(site.rotated for site in sites) and len({site.layout for site in sites}) == 1
