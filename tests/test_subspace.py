"""xKV: layers whose tokens are mixtures of common vectors, by a plain SVD."""

import copy
from pathlib import Path

import pytest
import torch
from support import greedy, optimized, plain, prompt
from transformers import AttentionInterface

import kvcompile
from kvcompile.checks.view import slots
from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.format import step_bytes
from kvcompile.kernels.subspace import Subspace
from kvcompile.models.tiny import tiny
from kvcompile.plan import plan
from kvcompile.recipe import parse_term

GOLDEN = Path(__file__).parent / "golden"


def cut(x, rank):
    """x [128, D] nearest by a matrix of that rank (Eckart and Young), and how far it is off."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).to(x.dtype), s[rank:].square().sum().sqrt()


def block(dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(128, dim, generator=g) * torch.logspace(0, -3, dim) @ torch.randn(
        dim, dim, generator=g)


@pytest.mark.parametrize("dim", [24, 128, 200])
def test_the_factors_are_the_svd(dim):
    """At every rank the nearest matrix; the error falls, and at full rank it is rounding."""
    x, errors = block(dim), []
    for rank in (16, 32, 64, 96, 128):
        fmt = Subspace(rank=rank, basis="same")
        planes = fmt.encode(x, "k")
        back = fmt.decode(planes, dim, torch.float32, "k")
        want, off = cut(x, rank)
        assert (back - want).abs().max() <= 2.0**-18 * x.abs().max()
        errors.append(float((back - x).norm()))
        assert abs(errors[-1] - off) <= 1e-4 * x.norm()
        assert planes["data"].numel() == 128 * min(rank, dim)
        least = float((back - x).abs().max())
        assert least <= planes["worst"] <= least + 1e-3 * x.abs().max(), "the bound is the error"
    whole = sum(rank >= min(dim, 128) for rank in (16, 32, 64, 96, 128))
    assert all(a > b for a, b in zip(errors, errors[1 : len(errors) - whole + 1], strict=False))
    assert errors[-1] <= 1e-6 * x.norm()


def test_no_block_is_no_error():
    for fmt in (Subspace(), Subspace(basis="same"), Subspace(of=parse_term("int(bits=4)"))):
        like, none = (fmt.encode(torch.zeros(2, n, 64), "k") for n in (128, 0))
        assert {n: (x.dtype, x.shape[2:]) for n, x in like.items()} == {
            n: (x.dtype, x.shape[2:]) for n, x in none.items()}
        assert fmt.decode(none, 64, torch.float32, "k").shape == (2, 0, 64)


def test_vectors_in_8_bits_cost_little():
    x = block(64)
    for rank in (16, 32):
        exact, rough = (Subspace(rank=rank, basis=b) for b in ("same", "int8"))
        off = [(f.decode(f.encode(x, "v"), 64, torch.float32, "v") - x).norm()
               for f in (exact, rough)]
        step = 0.5 / 127 * (rank * 64) ** 0.5 * float(cut(x, 1)[0].abs().max()) * 128**0.5
        assert off[0] <= off[1] <= off[0] + step
        sizes = [sum(p.numel() * p.element_size() for p in f.encode(x, "v").values())
                 for f in (exact, rough)]
        assert sizes[0] - sizes[1] == rank * 64 * 3 - rank * 4


class Theirs:
    """transformers' model, call by call; whole blocks of 128 tokens of all layers are cut to the
    nearest matrix of low rank, K before its rotation."""

    def __init__(self, arch, ranks, turned):
        self.model, self.ranks, self.turned = tiny(arch), ranks, turned
        self.stored, self.calls = {}, 0
        AttentionInterface.register("cutting", self.attend)
        self.model.set_attn_implementation("cutting")

    def attend(self, module, q, k, v, mask, scaling=None, **_):
        old, given = self.stored.get(module.layer_idx), q.shape[2]
        now = (k, v) if old is None else tuple(torch.cat(x, 2) for x in zip(old, (k, v),
                                                                           strict=True))
        self.stored[module.layer_idx] = now
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in now)
        seen = torch.ones(given, keys.shape[2]).tril(keys.shape[2] - given).bool()
        o = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen,
                                                             scale=scaling)
        return o.transpose(1, 2), None

    def turn(self, x, start, back):
        """x [H, 128, D] turned by the positions from `start` on, or back."""
        at = torch.arange(start, start + 128)[None]
        cos, sin = (y[0] for y in self.model.model.rotary_emb(x[None], at))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * (-sin if back else sin)

    def __call__(self, ids):
        """Logits of the call's last token, after which blocks are cut."""
        before, self.calls = self.calls, self.calls + ids.shape[1]
        at = torch.arange(before, self.calls)[None]
        with torch.no_grad():
            logits = self.model(ids, position_ids=at, use_cache=False).logits[:, -1]
        for start in range(before // 128 * 128, self.calls - 127, 128):
            for side, rank in enumerate(self.ranks):
                turned = self.turned and side == 0
                views = [self.stored[i][side][0, :, start : start + 128] for i in range(4)]
                own = [self.turn(x, start, True) if turned else x for x in views]
                for head in range(views[0].shape[0]):
                    new = cut(torch.cat([x[head] for x in own], -1), rank)[0]
                    for x, part in zip(own, new.chunk(4, -1), strict=True):
                        x[head] = part
                for view, x in zip(views, own, strict=True):
                    view.copy_(self.turn(x, start, False) if turned else x)
        return logits


@pytest.mark.parametrize("arch, turned", [
    ("llama", True), pytest.param("llama", False, marks=pytest.mark.slow), ("gpt2", False)])
def test_decoding_sees_what_was_cut(arch, turned):
    """Every step's logits against transformers' model over caches that are cut by hand."""
    recipe = f"xkv(rank_k=16, rank_v=32, basis=same, prerope={str(turned).lower()})"
    model, theirs = optimized(arch, recipe), Theirs(arch, (16, 32), turned)
    out = greedy(model, prompt(120), 15, return_dict_in_generate=True, output_logits=True)
    ids, got = out.sequences, torch.cat(out.logits)
    want = [theirs(ids[:, :120]), *(theirs(ids[:, i : i + 1]) for i in range(120, 134))]
    error = (torch.cat(want) - got).abs().amax(-1)
    assert error.max() <= 1e-3, "fp32 through four layers"
    exact = tiny(arch)(ids).logits[0, 119:-1]
    assert (exact - got)[:9].abs().max() <= 1e-3 < 0.1 < (exact - got)[9:].abs().max()


def test_full_rank_is_exact():
    recipe = "xkv(rank_k=128, rank_v=128, basis=same)"
    got, want = (greedy(m, prompt(150), 12, return_dict_in_generate=True, output_logits=True)
                 for m in (optimized("llama", recipe), plain("llama")))
    assert torch.equal(got.sequences, want.sequences)
    assert (torch.cat(got.logits) - torch.cat(want.logits)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["quantize", "merge", "insert_cache"])
def test_the_graph_has_one_store_for_a_group(name, request):
    program = kvcompile.capture(tiny("llama", num_hidden_layers=2), "xkv(group=2)+kivi(bits=4)")
    text = str(program.after(name)) + "\n"
    path = GOLDEN / f"xkv-{name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()
    if name == "insert_cache":
        assert all(f"g0_k_body_{plane} = input" in text for plane in ("codes", "basis", "unit"))
        assert "g1_" not in text and text.count("kvc.append(") == 1


RECIPES = ("xkv", "xkv+kivi(bits=4)", "xkv(groups=[[0, 2], [1, 3]], prerope=false)+int8",
           "streamingllm(sinks=4, window=150)+xkv(group=2)")


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_rows_and_crops(recipe):
    model = optimized("llama", recipe)
    report = kvcompile.explain(model)
    assert not [r for r in report.rows if r.status == "refused"]
    for tokens, batch in ((1, 1), (260, 2)):
        with torch.no_grad():
            cache = model(prompt(tokens, batch), use_cache=True).past_key_values
        assert cache.nbytes == report.kv_bytes(tokens, batch)
    ids, mask = prompt(140, batch=2), torch.ones(2, 140, dtype=torch.long)
    mask[1, :11] = 0
    both = greedy(model, ids, 3, attention_mask=mask)
    assert torch.equal(both[1, 11:], greedy(model, ids[1:, 11:], 3)[0])


def test_a_crop_gives_back_what_was_cut():
    model = optimized("llama", "xkv")
    with torch.no_grad():
        cache = model(prompt(256), use_cache=True).past_key_values
    before = copy.deepcopy(cache)
    cache.crop(200)
    assert cache.stored_tokens(3).tolist() == [[200, 200]]
    for one, other in zip(cache.groups, before.groups, strict=True):
        for spec, x, y in zip(one.specs, one.planes, other.planes, strict=True):
            if ".body." in spec.name and spec.shape:   # the first 128 tokens of every head
                assert torch.equal(x[::2], y[::2])


@pytest.mark.parametrize("dtype, recipe", [
    (torch.bfloat16, "xkv"), (torch.float32, "xkv(group=2, prerope=false)+kivi(bits=4)")])
def test_every_layer_is_within_its_bound(dtype, recipe):
    model = kvcompile.optimize(tiny("llama", dtype=dtype), recipe, compile=False, verify=True)
    greedy(model, prompt(140), 2)
    assert all(row.error <= row.bound for row in model.kvcompile.audit.layers)


def test_bytes_of_large_heads():
    """SmolLM2's heads, 4 layers, 4,096 tokens, bf16: what the docs say."""
    model = tiny("llama", head_dim=64, dtype=torch.bfloat16)
    full = 4096 * 2 * 2 * 64 * 2 * 4
    for recipe, share in (("xkv", 0.41), ("xkv+kivi(bits=4)", 0.281)):
        assert kvcompile.explain(model, recipe).kv_bytes(4096) <= share * full
    each = 128 * 32 * 2 + 32 * 256 + 32 * 4 + 4
    assert step_bytes(Subspace(rank=32), 256, torch.bfloat16, "k") == each


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["xkv(group=2)+kivi(bits=4)", "xkv(group=2, prerope=false)"])
def test_a_compiled_step_gives_the_same_tokens(recipe):
    want = greedy(optimized("llama:2", recipe), prompt(250), 12)
    assert torch.equal(greedy(optimized("llama:2", recipe, compile=True), prompt(250), 12), want)


def test_explain_says_what_became_of_the_layers():
    report = kvcompile.explain(optimized("llama", "xkv(group=2)"))
    rows = {(r.layer, r.name): r for r in report.rows}
    assert rows[2, "merge"].what == "one subspace with layer 3"
    assert rows[2, "merge"].storage.endswith("with layer 3")
    assert rows[2, "merge"].why.startswith("kvc.append runs its plain body: format subspace has no "
                                           "C++ writer; ")


def test_the_groups():
    def groups(recipe, layers):
        return [p.get("merge") for p in plan(recipe, layers)]

    assert groups("xkv", 9) == [(0, 1, 2, 3)] * 4 + [(4, 5, 6, 7)] * 4 + [None]
    assert groups("xkv(layers=2:, group=2)", 5) == [None, None, (2, 3), (2, 3), None]
    assert groups("xkv(groups=[[2, 0]])", 3) == [(0, 2), None, (0, 2)]
    formats = plan("xkv(rank_k=16)", 2)[0]
    assert str(formats.get("merge.k")) == "subspace(rank=16, basis=int8)"
    assert "recompute" not in plan("xkv(prerope=false)", 2)[0].values


def test_what_cannot_be_grouped():
    def refused(arch, recipe):
        report = kvcompile.explain(optimized(arch), recipe)
        return {r.layer: r.what for r in report.rows if r.status == "refused"}

    assert refused("gemma2", "xkv") == dict.fromkeys(
        range(4), "the window of layers 0 and 3 differ: 8, 0")
    assert set(refused("llama", "xkv(prerope=false)+snapkv(budget=32)").values()) == {
        "which tokens layer 0 keeps is decided by scores"}
    assert set(refused("llama", "xkv+snapkv(budget=32)").values()) == {
        "its keys are rebuilt at every read; scores need them as they are"}
    assert refused("llama", "xkv+cla") == dict.fromkeys(range(4), "layer 3 stores nothing")
    assert refused("llama", "xkv(group=2)+full(layers=3)") == dict.fromkeys(
        (2, 3), "layer 3 is kept by itself")
    for recipe, message in (("xkv(groups=[[0, 1], [1, 2]])", "each layer can be in one group only"),
                            ("xkv(groups=[0, 1])", "must be a list of lists of layers"),
                            ("xkv(groups=[[0, 9]])", "layer 9 is not among those claimed"),
                            ("xkv(rank_k=17)", "rank_k must be one of 16, 32, 64, 96, 128"),
                            ("xkv+minicache", "'xkv' and 'minicache' both set merge of layer")):
        with pytest.raises(RecipeError, match=message):
            plan(recipe, 4)
    with pytest.raises(RecipeError, match="rank must be a multiple of 16 up to 128"):
        Subspace(rank=144)
    with pytest.raises(RecipeError, match="basis must be int8 or same"):
        Subspace(basis="int4")
    with pytest.raises(KVCompileError, match="xkv.*: merge changes the model's graph, which a KVC"):
        kvcompile.KVCache(plain("llama").config, "xkv(prerope=false)")


def test_one_layer_by_itself_behind_a_window():
    """CSKV's two branches: older tokens of low rank, at least the newest 128 exact."""
    model = kvcompile.optimize(tiny("llama", num_hidden_layers=2, head_dim=64),
                               "xkv(group=1, rank_k=16, rank_v=32, basis=same, window=128, "
                               "prerope=false)", compile=False)
    ids = prompt(300)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        exact = kvcompile.optimize(model, "full", compile=False)(ids, use_cache=True)
    assert cache.nbytes == kvcompile.explain(model).kv_bytes(300)
    for layer in range(2):
        _, *held = slots(cache, layer, 0)
        _, *whole = slots(exact.past_key_values, layer, 0)
        for x, y, rank in zip(held, whole, (16, 32), strict=True):
            for head, (now, was) in enumerate(zip(x, y, strict=True)):
                want = cut(was[:128], rank)[0]
                assert (now[:128] - want).abs().max() <= 2.0**-16 * was.abs().max(), head
                assert torch.linalg.matrix_rank(now[:128], rtol=1e-4) == rank
            assert torch.equal(x[:, 128:], y[:, 128:])
    row = next(r for r in kvcompile.explain(model).rows if r.name == "merge")
    assert row.what == "subspace of its own"


@pytest.mark.parametrize("recipe", ["xkv(group=1)+kivi(bits=4)", "xkv(group=1, window=256)"])
def test_one_layer_by_itself_keeps_the_laws(recipe):
    model = kvcompile.optimize(tiny("llama", num_hidden_layers=2, head_dim=64), recipe,
                               compile=False, verify=True)
    with torch.no_grad():
        cache = model(prompt(450, 2), use_cache=True).past_key_values
    assert cache.nbytes == kvcompile.explain(model).kv_bytes(450, 2)
