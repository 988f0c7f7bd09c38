"""kvc.linear: the kernel against exact sums, and the rewrite that puts it into decode steps."""

import pytest
import torch
import torch.nn.functional as F
from support import greedy, optimized, prompt, slow_but
from torch._inductor.utils import run_and_get_code

import kvcompile
from kvcompile.backend import template
from kvcompile.backend.inductor import compile_graph
from kvcompile.ir import LINEAR, argument
from kvcompile.kernels import linear as text
from kvcompile.models.tiny import tiny

UNIT = torch.finfo(torch.float32).eps
SIZES = ([1, 1, 1, 1], [5, 2, 9, 3], [33, 17, 1, 130], [64, 96, 32, 96], [40, 24, 31, 1000])
FORMS = [pytest.param(dtype, hold_back, marks=[pytest.mark.slow] * (dtype is torch.float16))
         for dtype in (torch.float32, torch.bfloat16, torch.float16)
         for hold_back in ("", "KVC_NO_PAIRS", "KVC_HALVES", "KVC_PORTABLE")
         if hold_back != "KVC_NO_PAIRS" or dtype is torch.bfloat16]


def several(x, w0, w1, w2, b0, b1, b2):
    """One linear, three as one, and one gated by another."""
    return (LINEAR(x, [w0], [b0]), LINEAR(x, [w0, w1, w2], [b0, None, b2]),
            LINEAR(x, [w1, w1], [None, None]))


def operands(n0, n1, n2, k, dtype, seed=0):
    """x [1, 1, k], three weights [n, k] and their biases."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, 1, k), *((n, k) for n in (n0, n1, n2)), (n0,), (n1,), (n2,)]
    return [torch.randn(*s, generator=generator).to(dtype) for s in shapes]


def exact(x, weights, biases):
    """The linears in fp64, and gamma(K + 1) (sum |x w| + |b|): what summing in fp32 may be off."""
    x, biases = x.double(), [torch.zeros(1) if b is None else b.double() for b in biases]
    terms = x.shape[-1] + 1
    gamma = terms * UNIT / (1 - terms * UNIT)
    values = [F.linear(x, w.double()) + b for w, b in zip(weights, biases, strict=True)]
    sizes = [F.linear(x.abs(), w.double().abs()) + b.abs()
             for w, b in zip(weights, biases, strict=True)]
    return values, [gamma * size for size in sizes]


def rounded(value, error, dtype):
    """The error after one rounding of what is off by at most `error` to `dtype`."""
    info = torch.finfo(dtype)
    return error + info.eps / 2 * (value.abs() + error) + info.smallest_normal * info.eps


def check(outputs, x, w0, w1, w2, b0, b1, b2):
    for got, weights, biases in zip(outputs, ([w0], [w0, w1, w2], [w1, w1]),
                                    ([b0], [b0, None, b2], [None, None])):
        value, error = (torch.cat(parts, -1) for parts in exact(x, weights, biases))
        assert got.dtype == x.dtype and got.shape == value.shape
        assert bool(((got.double() - value).abs() <= rounded(value, error, x.dtype)).all())


@pytest.mark.parametrize("dtype,hold_back", FORMS)
def test_kernel(dtype, hold_back, monkeypatch):
    """Every form of the text that this machine can run; sizes that end anywhere in a vector."""
    define = f"#define {hold_back}\n" if hold_back else ""
    written = (define, *text.headers())
    monkeypatch.setattr(text, "headers", lambda: written)
    monkeypatch.setattr(template, "digest", lambda: define)  # a key of its own in Inductor's cache
    dynamic = [[2], [0, 1], [0, 1], [0, 1], [0], [0], [0]]
    with torch.no_grad():
        step, codes = run_and_get_code(
            lambda: compile_graph(torch.fx.symbolic_trace(several), operands(8, 4, 3, 7, dtype),
                                  dynamic))
        assert "".join(codes).count(" kvc::linear(") == 6, "the body was called"
        for sizes in SIZES:
            given = operands(*sizes, dtype)
            check(several(*given), *given)
            check(step(*given), *given)


def gated(x, w0, w1, w2, b0, b1, b2):
    """Two weights of n0 rows, every gate."""
    return tuple(LINEAR(x, [w0, w1], [None, b1], gate=gate) for gate in text.GATES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates(dtype):
    """The slope of every gate is at most 1.13, and computing it loses at most 8 units of |g|."""
    x, w0, w1, *_, b1, _ = given = operands(37, 37, 1, 70, dtype)
    with torch.no_grad():
        outputs = compile_graph(torch.fx.symbolic_trace(gated), given, [[]] * 7)(*given)
    (g, y), (dg, dy) = exact(x, [w0, w1], [None, b1])
    for got, gate in zip(outputs, text.GATES.values(), strict=True):
        value, slack = gate(g) * y, 1.13 * dg + 8 * UNIT * g.abs()
        error = slack * (y.abs() + dy) + gate(g).abs() * dy
        assert bool(((got.double() - value).abs() <= rounded(value, error, dtype)).all())


def nodes(monkeypatch, model):
    """The kvc.linear nodes of the step that is compiled for `model`, and its plain linears."""
    graphs = []
    monkeypatch.setattr("kvcompile.engine.compile_graph",
                        lambda gm, *_: graphs.append(gm) or gm)
    engine = model.kvcompile.engine
    engine._decode = {}
    engine.step(1, torch.device("cpu"))
    engine.step(2, torch.device("cpu"))
    one, many = (gm.graph for gm in graphs)
    assert not [n for n in many.nodes if n.target is LINEAR], "a batch has more rows than one"
    plain = [n for n in one.nodes if n.target is torch.ops.aten.linear.default]
    return [n for n in one.nodes if n.target is LINEAR], plain


@pytest.mark.parametrize("arch,gate", [("llama:2", "silu"), ("qwen2:2", "silu"),
                                       ("gemma:2", "tanh")])
def test_step_has_four_linears_a_layer(arch, gate, monkeypatch):
    """q, k and v; o; gate and up; down; and one head, tied or not."""
    found, plain = nodes(monkeypatch, optimized(arch, compile=True))
    assert [len(argument(n, "weights")) for n in found] == [3, 1, 2, 1] * 2 + [1] and not plain
    assert [argument(n, "gate") for n in found] == ["", "", gate, ""] * 2 + [""]


def test_weights_that_lie_otherwise_stay(monkeypatch):
    """GPT-2 keeps its weights as [K, N]: only its head is ours."""
    found, _ = nodes(monkeypatch, optimized("gpt2:2", compile=True))
    assert len(found) == 1


@pytest.mark.parametrize("arch", slow_but(["qwen2:2"], ["llama:2", "qwen2:2"]))
def test_tokens_equal_eager_and_follow_the_weights(arch):
    """No copy of a weight is made: what is written into it in place counts at once."""
    model = kvcompile.optimize(tiny(arch.partition(":")[0], num_hidden_layers=2), "full")
    eager = kvcompile.optimize(model, "full", compile=False)
    for _ in range(2):
        assert torch.equal(greedy(model, prompt(20), 30), greedy(eager, prompt(20), 30))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "proj" in name:
                    weight.copy_(weight.roll(1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_low_precision(dtype):
    """As far from fp32's logits as the eager step is, with a margin of a half."""
    ids, step = prompt(20), prompt(1, seed=1)
    logits = {}
    for name, kind, compile in (("exact", torch.float32, False), ("eager", dtype, False),
                                ("ours", dtype, True)):
        source = tiny("llama", num_hidden_layers=2).to(torch.bfloat16).to(kind)
        model = kvcompile.optimize(source, "full", compile=compile)
        cache = model(ids, use_cache=True).past_key_values
        logits[name] = model(step, past_key_values=cache).logits.double()
    eager, ours = ((logits[n] - logits["exact"]).norm() for n in ("eager", "ours"))
    assert ours <= 1.5 * eager
