"""The roofline model against sums over stores, models and data sheets."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from support import plain
from sympy import lambdify

import kvcompile
from kvcompile.bench import roofline as bench
from kvcompile.bench.attend import Attend
from kvcompile.bench.settings import Settings
from kvcompile.cli import main
from kvcompile.errors import KVCompileError
from kvcompile.measure.roofline import (
    DEVICES,
    Device,
    N,
    Roofline,
    Step,
    attention_flops,
    attention_seconds,
    device,
    read_bytes,
    tier_tokens,
)

RECIPES = ["full", "int8", "kivi(bits=4)", "streamingllm(sinks=4, window=32)"]


def program(recipe, arch="llama:2"):
    return kvcompile.explain(plain(arch), recipe).program


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_are_those_of_the_tiers(recipe):
    """Over whole blocks the mean of what is stored is the formula's mean; int4: 4 bits and a
    16-bit scale and minimum for every 32 numbers, of 16 in heads of 16."""
    site = program(recipe).sites[0]
    counts = range(1024, 1024 + 128)
    if recipe == "kivi(bits=4)":
        token = {"k": 16 * (0.5 + 4 / 32), "v": 16 * (0.5 + 4 / 16)}
    else:
        token = dict.fromkeys("kv", 16 + 4 if recipe == "int8" else 16 * 4)
    want = 0.0
    for n in counts:
        for side in "kv":
            spans = site.store.spans(side, n)
            body = spans["body"].end - spans["body"].start
            rest = site.store.stored(n) - body
            want += site.heads * (body * token[side] + rest * 16 * 4)
    stored = lambdify(N, read_bytes(site))
    got = sum(float(stored(n)) for n in counts)
    assert got == pytest.approx(want, rel=1e-9 if recipe != "streamingllm(sinks=4, window=32)"
                                else 1 / 36)  # there whole groups are dropped
    kept = sum(tier_tokens(site.store, "k").values()).subs(N, 2000)
    assert abs(int(kept) - site.store.stored(2000)) < site.store.grain
    assert attention_flops(site).subs(N, 2000) == 2 * site.q_heads * 32 * kept


def test_weights_are_what_linears_hold():
    model = plain("llama:2")
    step = Step(program("full"), batch=3)
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert step.weight_bytes == sum(w.nbytes for w in linears)
    assert step.weight_flops == 2 * 3 * sum(w.numel() for w in linears)


def test_launches():
    """Two layers of 7 linears and 4 inputs of linears, the head, attend and merge, one group."""
    assert Step(program("full")).launches == 2 * (7 + 4) + 2 + 2 * 2 + 5


def test_time_is_the_slower_of_bytes_and_operations():
    step = Step(program("full"))
    kv = 2 * step.program.sites[0].exact_bytes_per_token * 1000
    slow = Device("slow", 1e6, 1e15, 0.0, "")
    assert float(step.seconds(slow).subs(N, 1000)) == pytest.approx(
        (step.weight_bytes + kv) / 1e6)
    weak = Device("weak", 1e18, 1e6, 1e-3, "")
    flops = step.weight_flops + float(step.kv_flops.subs(N, 1000))
    assert float(step.seconds(weak).subs(N, 1000)) == pytest.approx(
        flops / 1e6 + step.launches * 1e-3)


def test_what_does_not_overlap_is_added():
    site = program("int8").sites[0]
    read, compute = (float(x(site).subs(N, 1000)) for x in (read_bytes, attention_flops))
    assert read < compute                                       # of the tiny model
    on = Device("", 1e6, 1e6, 0.5, "", overlap=0.75)
    got = float(attention_seconds(site, on).subs(N, 1000))
    assert got == pytest.approx(0.5 + compute / 1e6 + read / 4e6)
    whole = float(attention_seconds(site, replace(on, overlap=1.0)).subs(N, 1000))
    assert whole == pytest.approx(0.5 + compute / 1e6)


def test_the_overlap_is_what_calls_take_beyond_the_longer_part():
    on = Device("", 2.0, 5.0, 0.0, "", overlap=0.6)
    calls = [(float(on.seconds(a, b)), a / 2, b / 5) for a, b in ((8, 5), (3, 40), (10, 25))]
    assert bench.hidden(calls) == pytest.approx(0.6)
    assert bench.hidden([(1.0, 2.0, 1.0)]) == 1.0 and bench.hidden([(9.0, 2.0, 1.0)]) == 0.0


def test_tokens_that_lie_in_a_few_pages_are_attended_to_alike():
    """The calibration's kernel does the work of as many tokens in memory that caches hold."""
    few = Attend("int8", (2, 1, 16), 700, 0, pages=2)
    [planes] = few.copies
    tables = [p for spec, p in zip(few.specs, planes, strict=True) if spec.name.endswith("table")]
    assert all(int(t.max()) == 1 and t.shape[-1] == 6 for t in tables) and len(tables) == 2
    o = few.run(*few.new, *planes, *few.at)[0]
    own = Attend("int8", (2, 1, 16), 700, 0)
    whole = own.run(*few.new, *own.copies[0], *few.at)[0]
    assert o.isfinite().all() and not torch.equal(o, whole)


def test_explain_prints_it(capsys):
    assert main(["explain", "--model", "tiny-llama", "--recipe", "int8", "--device", "h100"]) == 0
    text = capsys.readouterr().out
    assert "Roofline of a decode step on H100 SXM 80 GB" in text and "131,072" in text


def test_mistakes(capsys):
    with pytest.raises(KVCompileError, match="unknown device 'h10'; did you mean 'h100'"):
        device("h10")
    assert main(["explain", "--model", "tiny-llama", "--plot", "x.png"]) == 2
    assert capsys.readouterr().err == "kvcompile explain: --plot needs --device\n"


def test_plot(tmp_path):
    one = Roofline(Step(program("int8")), DEVICES["a100"], (100, 1000))
    if find_spec("matplotlib") is None:
        with pytest.raises(KVCompileError, match="pip install matplotlib"):
            one.plot(tmp_path / "plot.png")
    else:
        one.plot(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [row["tokens"] for row in one.as_dict()["rows"]] == [100, 1000]


@pytest.mark.slow
def test_the_bench_prints_prediction_and_measurement():
    share, *rows = bench.rows(Settings(quick=True, tokens=256, mib=1))
    assert 0 <= share.ours[0] <= 1
    assert len(rows) == 3 and all(row.theirs[0] > 0 and row.ratio > 0 for row in rows)
