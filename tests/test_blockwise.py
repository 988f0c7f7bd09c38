"""Attention of many queries: the kernel of kvc.attention and of kvc.attend with S > 1."""

import operator
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, GraphModule

from kvcompile.backend import template
from kvcompile.backend.inductor import compile_graph
from kvcompile.ir import APPEND, ATTEND, ATTENTION
from kvcompile.kernels import cpp_blockwise
from kvcompile.planes import Group
from kvcompile.site import Site
from kvcompile.store import Store
from tests.support import optimized, prompt
from tests.test_kernels import QUICK

CPU = Path("/proc/cpuinfo")


class Prompt:
    """Random q, k and v of rows of which some columns are padding, on top of what is stored."""

    def __init__(self, store=None, heads=2, group=3, dims=(64, 64), dtype=torch.float32,
                 stored=(300, 0, 129), tokens=150, **options):
        g, rows = torch.Generator().manual_seed(0), len(stored)
        self.dims, self.dtype, self.options, self.planes = dims, dtype, options, []

        def some(heads, tokens, dim):
            return torch.randn(rows, heads, tokens, dim, generator=g).to(dtype)

        self.q = some(heads * group, tokens, dims[0])
        self.k, self.v = (some(heads, tokens, dim) for dim in dims)
        self.valid = torch.ones(rows, tokens, dtype=torch.bool)
        self.valid[1, :37] = False                       # left padding, and a hole
        self.valid[2, 5] = False
        self.positions = torch.arange(tokens).expand(rows, -1)
        self.sinks = torch.randn(heads * group, generator=g) if options.pop("sinks", 0) else None
        options["scale"] = dims[0] ** -0.5
        if store is None:
            return
        most, options["store"], options["slot"] = max(stored), store, 1
        site = Site(0, heads * group, heads, dims, dtype, options.get("window", 0),
                    Store.parse(store))
        layers = Group([site, site], rows, torch.device("cpu"))
        layers.reserve(list(stored))
        self.planes = layers.planes
        held = torch.arange(most)[None] < torch.tensor(stored)[:, None]
        k, v = ([some(heads, most, dim) for _ in range(site.store.members)] for dim in dims)
        APPEND(self.planes, k, v, torch.arange(most).expand(rows, -1), held, store=store, slots=[1])

    def given(self, dtype=None):
        x = [x.to(dtype or self.dtype) for x in (self.q, self.k, self.v)]
        return (*x, *([self.planes] if self.planes else []), self.positions, self.valid, self.sinks)

    def check(self):
        op = ATTEND if self.planes else ATTENTION
        want = op(*self.given(torch.float32), **self.options)
        want = want[0] if self.planes else want
        graph, flat = Graph(), []

        def put(x):
            if x is None:
                return None
            if isinstance(x, list):
                return [put(y) for y in x]
            flat.append(x)
            return graph.placeholder(f"x{len(flat)}")

        out = graph.call_function(op, tuple(map(put, self.given())), self.options)
        graph.output((graph.call_function(operator.getitem, (out, 0)) if self.planes else out,))
        with torch.no_grad(), config.patch(force_disable_caches=True):
            run, texts = run_and_get_code(
                lambda: compile_graph(GraphModule({}, graph), flat, [[]] * len(flat)))
            got = run(*flat)[0]
        assert "kvc::blockwise<" in "".join(texts), "the plain body was run"
        assert got.stride()[-1] == 1 and got.shape == want.shape
        error = (got.float() - want).abs().max()
        assert error <= self.tolerance(want), (error, self.tolerance(want))
        assert not got.transpose(1, 2)[~self.valid].any()

    def tolerance(self, want):
        """As in test_kernels; 16-bit models also round decoded K and V and the weights to bf16,
        each by half its eps, where their dtype is bf16."""
        dk, tokens = self.dims[0], self.q.shape[2] + 300
        peak = 5.0 * 5.0 * dk * self.options["scale"]    # sum |q||k| scale, of normal numbers
        coarse = torch.finfo(self.dtype).eps / 2 if self.dtype is torch.bfloat16 else 0.0
        eps = 2.0**-24
        logit = 2 * (dk + 4) * eps * peak / 4 + coarse * dk**0.5 * 5 * self.options["scale"]
        weights = 2 * tokens * eps + 2 * coarse + 4 * 8e-5 * (self.dtype is not torch.float32)
        last = float(want.abs().max()) * torch.finfo(self.dtype).eps / 2
        return (2.718281828 ** (2 * logit) - 1 + weights) * 5.0 + last


PROMPTS = {
    "plain": {},
    "padded-head": dict(dims=(48, 80), group=1, tokens=300),
    "window-softcap-sinks": dict(window=40, softcap=20.0, sinks=True, group=5, tokens=260),
    "bf16": dict(dtype=torch.bfloat16, tokens=333),
    "bf16-window": dict(dtype=torch.bfloat16, tokens=333, window=77, dims=(80, 96), group=4),
    "fp16": dict(dtype=torch.float16, group=9),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt(name):
    Prompt(**PROMPTS[name]).check()


LATER = sorted(QUICK)


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=() if n in ("bf16", "sinks-window", "gear") else pytest.mark.slow)
    for n in LATER])
def test_a_later_turn(name):
    Prompt(**QUICK[name], tokens=70).check()


@pytest.mark.skipif(not CPU.exists() or "avx512_bf16" not in CPU.read_text(),
                    reason="needs AVX-512's products of bf16")
@pytest.mark.parametrize("name", ["bf16", "bf16-window"])
def test_tiles(name, monkeypatch):
    """The text for machines with AMX gives the same, with its instructions done by plain C++."""
    amx = (Path(__file__).parent / "amx.h").read_text()
    text = (amx, *cpp_blockwise.headers(), "static_assert(KVC_TILES);\n")
    monkeypatch.setattr(cpp_blockwise, "headers", lambda: text)
    monkeypatch.setattr(template, "digest", lambda: "tiles")  # a key of its own
    Prompt(**PROMPTS[name]).check()


@pytest.mark.slow
@pytest.mark.parametrize("held_back", ["KVC_HALVES", "KVC_PORTABLE"])
@pytest.mark.parametrize("name", ["bf16", "kivi4", "kivi2-80"])
def test_other_machines(name, held_back, monkeypatch):
    """The texts for machines with AVX2 alone, and for any other, give the same."""
    text = (f"#define {held_back}\n", *cpp_blockwise.headers())
    monkeypatch.setattr(cpp_blockwise, "headers", lambda: text)
    monkeypatch.setattr(template, "digest", lambda: held_back)  # a key of its own
    Prompt(**QUICK[name], tokens=70).check()


@pytest.mark.parametrize("arch, recipe", [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("gpt_oss:2", "kivi(bits=4)"), ("gemma2", "full"))])
def test_prompts_and_later_turns_of_a_model(arch, recipe):
    """Compiled or not: the same logits for a padded batch and, on top of it, for several tokens."""
    models = [optimized(arch, recipe, compile=c) for c in (True, False)]
    ids, more = prompt(150, 2), prompt(9, 2, seed=1)
    mask = torch.ones(2, 159, dtype=torch.long)
    mask[0, :40] = 0
    logits = []
    for model in models:
        with torch.no_grad():
            first = model(input_ids=ids, attention_mask=mask[:, :150], use_cache=True)
            later = model(input_ids=more, attention_mask=mask,
                          past_key_values=first.past_key_values)
        logits += [first.logits[0, 40:], first.logits[1], later.logits]
    names = [str(key[0]) for key in models[0].kvcompile.engine.alone._compiled]
    assert {"kvc.append.default", "kvc.attention.default", "kvc.attend.default"} <= set(names)
    for got, want in zip(logits[:3], logits[3:], strict=True):
        assert (got - want).abs().max() <= 1e-4 + 1e-4 * want.abs().max()
