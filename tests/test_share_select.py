"""Layers that share K and V, of which tokens are selected and quantized: the owners' alone."""

import pytest
import selection_references as refs
import torch
from support import greedy, optimized, prompt
from transformers import AttentionInterface

import kvcompile
from kvcompile.format import format_of
from kvcompile.models.tiny import tiny
from kvcompile.recipe import parse_term

OWNERS, BUDGET, WINDOW = [0, 0, 2, 0], 40, 8
RECIPE = (f"kvsharer(shared=2, map={OWNERS})+snapkv(budget={BUDGET}, window={WINDOW})+int8")


class Theirs:
    """transformers' model, call by call: layers attend to their owner's K and V; of the prompt the
    owner keeps what SnapKV finds by its own queries, and what is stored comes back from int8."""

    def __init__(self, arch):
        self.model, self.stored, self.now, self.kept, self.at = tiny(arch), {}, {}, {}, 0
        self.format = format_of(parse_term("int"))
        AttentionInterface.register("of_owners_selected", self.attend)
        self.model.set_attn_implementation("of_owners_selected")

    def attend(self, module, q, k, v, mask, scaling=None, **_):
        layer = module.layer_idx
        owner, tokens = OWNERS[layer], q.shape[2]
        if owner == layer:
            self.now[layer] = k, v
            if self.at == 0:
                self.kept[layer] = snapkv(q[0], k[0], scaling)
        out = []
        for head in range(q.shape[1]):
            own = head // (q.shape[1] // k.shape[1])
            new = [x[0, own] for x in self.now[owner]]
            old = [x[own] for x in self.stored.get(owner, [[new[0][:0]] * k.shape[1]] * 2)]
            keys, values = (torch.cat(x) for x in zip(old, new, strict=True))
            logits = q[0, head] @ keys.T * scaling
            hidden = torch.ones_like(logits).triu(1 + len(keys) - tokens).bool()
            out.append(logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values)
        return torch.stack(out, 1)[None], None

    def __call__(self, ids):
        """Logits of the call's last token; then the owners store its tokens."""
        positions = torch.arange(self.at, self.at + ids.shape[1])[None]
        with torch.no_grad():
            logits = self.model(ids, position_ids=positions, use_cache=False).logits[:, -1]
        for owner, (k, v) in self.now.items():
            chosen = [sorted(s) for s in self.kept[owner]] if self.at == 0 else [[0]] * k.shape[1]
            new = [[self.coded(x[0, head, at], side) for head, at in enumerate(chosen)]
                   for x, side in ((k, "k"), (v, "v"))]
            old = self.stored.get(owner)
            self.stored[owner] = new if old is None else [
                [torch.cat(x) for x in zip(*side, strict=True)]
                for side in zip(old, new, strict=True)]
        self.at += ids.shape[1]
        return logits

    def coded(self, x, side):
        return self.format.decode(self.format.encode(x, side), x.shape[-1], x.dtype, side)


def snapkv(q, k, scale):
    """Kept tokens of each kv head: mean weights of the last queries, smoothed over 5 (SnapKV)."""
    tokens, out = q.shape[1], []
    logits = q @ k.repeat_interleave(q.shape[0] // k.shape[0], 0).mT * scale
    logits += torch.full((tokens, tokens), -torch.inf).triu(1)
    seen = logits.softmax(-1)[:, -WINDOW:, :-WINDOW].mean(1)
    for head in seen.unflatten(0, (k.shape[0], -1)):
        smooth = torch.stack([torch.nn.functional.pad(row, (2, 2)).unfold(0, 5, 1).mean(-1)
                              for row in head]).mean(0)
        out.append(refs.best([*smooth.tolist(), *[0.0] * WINDOW], BUDGET,
                             set(range(tokens - WINDOW, tokens))))
    return out


@pytest.mark.parametrize("arch", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_every_step_sees_what_the_owner_kept(arch):
    model, theirs = optimized(arch, RECIPE), Theirs(arch)
    out = greedy(model, prompt(150), 30, return_dict_in_generate=True, output_logits=True)
    ids, got = out.sequences, torch.cat(out.logits)
    want = torch.cat([theirs(ids[:, :150]), *(theirs(ids[:, i : i + 1]) for i in range(150, 179))])
    error = (want - got).abs().amax(-1)
    # rounding tips some numbers into the neighbouring code: a step of 1/255 of a group's range
    assert error[0] < 1e-4 and error.max() < 0.05 and error.median() < 5e-3
    every = torch.cat(greedy(optimized(arch, f"share(map={OWNERS})"), prompt(150), 30,
                             return_dict_in_generate=True, output_logits=True).logits)
    assert (every - want).abs()[1:].max() > 0.5, "the selection does nothing"
    cache = out.past_key_values
    for layer, owner in enumerate(OWNERS):
        for head, kept in enumerate(theirs.kept[owner]):
            assert cache.positions(layer)[0, head].tolist() == [*sorted(kept), *range(150, 179)]


PAIRS = (("kvsharer(shared=2, map=[0, 0, 2, 0])", "adakv(budget=40)+fp8"),
         ("cla", "h2o(budget=40)+int8"), ("yoco", "pyramidkv(budget=40)+kivi(bits=4)"),
         ("mlkv(owners=1)", "snapkv(budget=40, layers=:1)+int8"))


@pytest.mark.parametrize("shared, selected", PAIRS)
def test_owners_alone_store(shared, selected):
    """Bytes and kept tokens: consumers have no part of a plane, and what owners keep."""
    model, alone = (optimized("llama", r) for r in (f"{shared}+{selected}", selected))
    report, sites = kvcompile.explain(model), model.kvcompile.program.sites
    assert not [r for r in report.rows if r.status == "refused"]
    owners = [s.layer if s.owner is None else s.owner for s in sites]
    with torch.no_grad():
        cache, every = (m(prompt(200, 2), use_cache=True).past_key_values for m in (model, alone))
    assert cache.nbytes <= report.kv_bytes(200, 2)
    assert len(set(owners)) < 4 and cache.nbytes < every.nbytes
    assert [s.layer for g in cache.groups for s in g.sites] == sorted(set(owners))
    for layer, owner in enumerate(owners):
        assert (cache.stored_tokens(owner) >= 40 - 8).all() and (
            cache.stored_tokens(owner) < 200).all()
        assert torch.equal(cache.positions(layer), cache.positions(owner))
        assert torch.equal(cache.stored_tokens(layer), cache.stored_tokens(owner))


def test_every_layer_is_within_its_bound():
    model = kvcompile.optimize(optimized("llama"), RECIPE, compile=False, verify=True)
    greedy(model, prompt(60), 4)
    assert {row.layer for row in model.kvcompile.audit.layers} == {0, 1, 2, 3}
