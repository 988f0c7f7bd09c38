"""kvcompile bench on tiny sizes: rows, units, ratios and forms; never how long anything took."""

import json
from typing import Any

import pytest
import torch
from support import plain
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvcompile
from kvcompile import bench as package
from kvcompile.bench import GROUPS, attend, bench, prefill, report, settings, start, step
from kvcompile.bench.report import Result, cells
from kvcompile.bench.row import Row, Target, summary
from kvcompile.bench.settings import Settings
from kvcompile.bench.timing import in_turn
from kvcompile.cli import main
from kvcompile.errors import KVCompileError
from kvcompile.models import load as loading

MACHINE = {"cpu": "a CPU", "vectors": "AVX512", "cores": 2, "threads": 2, "torch": "2.13",
           "transformers": "5", "load_before": 0.5}


def small(**options: Any) -> Settings:
    """A few hundred tokens, a MiB, and the first two layers of the tiny llama."""
    return Settings(**{"model": "tiny-llama", "quick": True, "threads": torch.get_num_threads(),
                       "mib": 1, "tokens": 200, **options})


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", lambda name: (plain("llama:2"), None))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the model is compiled."""
    optimize = kvcompile.optimize
    monkeypatch.setattr(settings, "optimize",
                        lambda model, recipe: optimize(model, recipe, compile=False))


def test_a_ratio_says_how_many_times_less_ours_takes() -> None:
    row = Row("g", "w", "ms", [2.0, 1.0, 9.0], "peer", [8.0, 7.0, 10.0], target=Target(">=", 4))
    assert (row.ratio, row.met) == (4.0, True)
    row = Row("g", "w", "ms", [3.0], "floor", [2.0], inverse=True, target=Target("<=", 1.4))
    assert (row.ratio, row.met) == (1.5, False)
    assert Row("g", "w", "s", [44.0], target=Target("<=", 45)).met is True  # no peer: the figure
    assert Row("g", "w", "ms", [1.0], "peer", target=Target(">=", 1)).met is None
    assert Row("g", "w", "ms", note="why", target=Target("<=", 1)).met is None


def test_samples_are_all_told() -> None:
    assert summary([]) is None
    assert summary([5.0]) == {"median": 5.0, "quartiles": [5.0, 5.0], "samples": [5.0]}
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "quartiles": [1.0, 3.0],
                                        "samples": [3.0, 1.0, 2.0]}


def test_candidates_take_turns() -> None:
    said: list[str] = []
    times = in_turn({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, 2,
                    between=lambda: said.append("|"), burst=2)
    assert "".join(said) == "ab|aa|bb|bb|aa"
    assert {name: len(took) for name, took in times.items()} == {"a": 4, "b": 4}


def test_the_forms_of_a_result() -> None:
    rows = [Row("g", "first", "ms", [1.0], "peer", [2.0], target=Target(">=", 3)),
            Row("g", "second", "GB/s", [10.0], "streaming", [40.0], inverse=True),
            Row("g", "third", "ms", note="not today")]
    result = Result(rows, MACHINE, [30.0, 40.0, 50.0], 12.3)
    assert cells(rows[0]) == ["first", "1 ms", "peer", "2 ms", "2.00x", ">= 3", "NO"]
    assert cells(rows[1])[4:] == ["25%", "", ""]
    assert cells(rows[2])[1:] == ["-", "-", "-", "-", "", ""]
    told = json.loads(json.dumps(result.as_dict()))
    assert told["bandwidth_gb_s"]["samples"] == [30.0, 40.0, 50.0]
    assert told["rows"][0] == {
        "group": "g", "what": "first", "unit": "ms", "ours": summary([1.0]), "peer": "peer",
        "theirs": summary([2.0]), "ratio": 2.0, "ratio_is": "theirs/ours", "target": ">= 3",
        "met": False, "note": None}
    assert "Streaming bandwidth 40.0 GB/s" in str(result) and "third: not today" in str(result)
    assert "| first | 1 ms | peer | 2 ms | 2.00x | >= 3 | NO |" in result.markdown().splitlines()
    assert len(report.COLUMNS) == len(cells(rows[0]))


@pytest.mark.parametrize("layout", ["gqa", "folded", "expanded"])
def test_the_layouts_of_sdpa_are_the_same_attention(layout: str) -> None:
    dense = attend.Dense(layout, torch.float32, (6, 2, 16), 10, 0)
    k, v = dense.kv[0]
    got = dense.attend(k, v).reshape(1, 6, 1, 16)
    want = sdpa(dense.q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    assert torch.allclose(got, want, atol=1e-6)
    assert dense.layers == len(dense.kv) == 2


def test_copies_are_distinct_memory_of_the_stated_size() -> None:
    many = attend.Attend("int8", (4, 2, 32), 300, 2)
    pages = [x for planes in many.copies for x in planes[1:]]
    assert len({x.data_ptr() for x in pages}) == len(pages)
    assert sum(x.nbytes for planes in many.copies for x in planes) == many.layers * many.nbytes
    assert many.layers * many.nbytes >= 2 * 2**20
    outs = [many.run(*many.new, *planes, *many.at) for planes in many.copies]
    first = outs[0][0]
    assert all(torch.equal(first, layer) for out in outs for layer in out)


def test_bandwidth_reads_every_byte() -> None:
    probe = small().bandwidth
    probe.buffer.copy_(torch.arange(probe.buffer.numel()))
    assert probe.run(probe.buffer)[0].tolist() == [int(probe.buffer.sum())]
    before = len(probe.samples)
    probe()
    assert len(probe.since(before)) == 1 and probe.samples[-1] > 0


def test_rows_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "HEADS", {"4/2 heads of 32": (4, 2, 32)})
    monkeypatch.setattr(attend, "RECIPES", {"int8": ("int8", 4), "odd": ("kivi(bits=4)", 8)})
    monkeypatch.setattr(attend, "LAYOUTS", ("gqa float32", "folded bfloat16"))
    refused, compiled = KVCompileError("no kernel: odd"), attend.compiled

    def compile(site: Any) -> Any:
        if "bits=4" in str(site.store):
            raise refused
        return compiled(site)

    monkeypatch.setattr(attend, "compiled", compile)
    time, share, odd = attend.rows(small())
    assert (time.unit, share.unit, share.peer) == ("ms a layer", "GB/s", "streaming")
    assert time.peer in ("SDPA gqa float32", "SDPA folded bfloat16")
    assert time.target == Target(">=", 4) and share.target == Target(">=", 0.6)
    size = 2 * 2 * 256 * (32 + 2 * 2) + 4 * 2 * (1 + 2 * 2)  # codes, scales and offsets; tables
    assert share.ours[0] * time.ours[0] == pytest.approx(size / 1e6)
    assert (odd.ours, odd.note) == ((), "no kernel: odd")


def test_rows_of_the_step(two_layers: None, eager: None) -> None:
    rows = list(step.rows(small()))
    whats = [(row.what, row.peer.split(":")[0]) for row in rows]
    kivi, full = "step kivi(bits=4), 200 tokens", "step full, 200 tokens"
    assert whats == [
        (kivi, step.EAGER), (full, step.EAGER), (kivi, "full, compiled by us"), (kivi, step.STATIC),
        (kivi, "HF eager, QuantizedCache quanto"), (kivi, "HF eager, QuantizedCache hqq"),
        (kivi, "floor"), (full, "floor")]
    assert all(len(row.ours) == 5 * step.BURST and row.unit == "ms" for row in rows)
    assert all(row.note.startswith("not with --quick") for row in rows[3:6])
    assert all(row.target is None for row in rows)  # targets are set for another model


def test_rows_of_the_recipes_asked_for(two_layers: None, eager: None) -> None:
    rows = list(step.rows(small(recipes=("int8", "kivi(bits=2)"))))
    int8, kivi = "step int8, 200 tokens", "step kivi(bits=2), 200 tokens"
    assert [(row.what, row.peer.split(":")[0]) for row in rows] == [
        (int8, step.EAGER), (kivi, step.EAGER), (kivi, "int8"), (int8, "floor"), (kivi, "floor")]
    assert rows[2].theirs == rows[0].ours and rows[2].ours == rows[1].ours
    assert all(row.ours and not row.note for row in rows)


@pytest.mark.slow
def test_every_peer_does_the_same_steps(two_layers: None) -> None:
    model, ids = plain("llama:2"), small().ids(40)
    alone = step.Decoder(model)
    alone.fill(ids)
    static = step._static(model, alone, 4)
    want = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 40:].tolist()
    got = [int(alone.last)]
    for _ in range(3):
        alone()
        got.append(int(alone.last))
    assert got == want and int(static.last) == want[1]
    alone.fill(torch.cat([ids, ids], 1))
    assert alone.cache.get_seq_length() == 80


def test_weights_that_a_step_reads() -> None:
    model = plain("llama:2")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    every = sum(p.nbytes for p in model.parameters())
    assert step.weight_bytes(model) == every - (0 if tied else 128 * 64 * 4)


def test_rows_of_prefill(two_layers: None, eager: None) -> None:
    time, share = prefill.rows(small())
    assert (time.what, time.unit, time.peer) == ("prefill kivi(bits=4), 200 tokens", "s",
                                                 prefill.PEER)
    assert share.what == "compressing in prefill kivi(bits=4), 200 tokens" and share.inverse
    assert all(spent > 0 and rest > 0 for spent, rest in zip(share.ours, share.theirs, strict=True))


def test_rows_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []

    def started(_: Settings, folder: str) -> dict[str, float]:
        folders.append(folder)
        return {"optimize": 1.0, "prompt": 2.0, "first step": 4.0 / len(folders)}

    monkeypatch.setattr(start, "_started", started)
    cold, warm = start.rows(small(model="smollm2"))
    assert folders[0] == folders[1] and (cold.ours, warm.ours) == ([7.0], [5.0])
    assert (cold.target, warm.target) == (Target("<=", 45), Target("<=", 10))
    assert cold.note == "optimize 1.0 s, prompt 2.0 s, first step 4.0 s"


def test_a_quick_run_leaves_out_what_is_slow(monkeypatch: pytest.MonkeyPatch,
                                             two_layers: None) -> None:
    for name in GROUPS:
        monkeypatch.setitem(GROUPS, name, lambda _, name=name: iter([Row(name, name, "s", [1.0])]))
    monkeypatch.setattr(Settings, "bandwidth", type("Probe", (), {"samples": [1.0]}))

    def ran(quick: bool, *groups: str) -> list[str]:
        return [row.group for row in bench(Settings(quick=quick), groups).rows]

    assert ran(False) == ["attend", "context", "step", "prefill", "start", "roofline"]
    assert ran(True) == ["attend", "context", "step", "prefill"]
    assert ran(True, "start", "attend") == ["attend", "start"]


def test_a_group_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, two_layers: None) -> None:
    result = bench(small(tokens=4000), ["prefill"])
    assert [row.note for row in result.rows] == ["tiny-llama has only 2048 positions"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                     two_layers: None) -> None:
    given: list[Settings] = []

    def rows(options: Settings) -> list[Row]:
        given.append(options)
        return [Row("attend", "a row", "ms", [1.0], "peer", [2.0])]

    monkeypatch.setitem(GROUPS, "attend", rows)
    monkeypatch.setattr(package.settings, "PROBE", 1)
    argv = ["bench", "--quick", "--rows", "attend", "--threads", "1", "--tokens", "7"]
    assert main([*argv, "--json"]) == 0
    out = capsys.readouterr()
    told = json.loads(out.out)
    assert out.err == "" and [row["what"] for row in told["rows"]] == ["a row"]
    assert {"cpu", "cores", "threads", "torch", "load_before"} <= told["machine"].keys()
    assert (given[0].quick, given[0].threads, given[0].tokens) == (True, 1, 7)
    assert main([*argv, "--markdown"]) == 0
    assert "| a row | 1 ms | peer | 2 ms | 2.00x |  |  |" in capsys.readouterr().out
    assert main(argv) == 0
    assert "a row" in capsys.readouterr().out
    monkeypatch.setitem(GROUPS, "step", rows)
    assert main(["bench", "--recipes", "int8", "full"]) == 0
    assert given[-1].recipes == ("int8", "full") and len(given) == 4
    assert main(["bench", "--recipes", "kiwi"]) == 2
    assert "kivi" in capsys.readouterr().err
    assert main([*argv, "--recipes", "int8"]) == 2
    assert "only the rows of step" in capsys.readouterr().err
