"""kvcompile eval on a tiny model: what the scores are, and that exact recipes have perfect ones."""

import json
from typing import Any

import pytest
import torch
from support import greedy, optimized, plain, prompt

import kvcompile
from kvcompile import commands
from kvcompile.cli import main
from kvcompile.errors import KVCompileError
from kvcompile.measure import evaluate as module
from kvcompile.measure.evaluate import HF, Evaluation, Score, defaults, evaluate
from kvcompile.measure.perplexity import forced_decode
from kvcompile.models import load as loading


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """optimize() starts from one capture of the tiny model."""
    optimize = kvcompile.optimize
    monkeypatch.setattr(module, "optimize", lambda model, recipe, compile: optimize(
        optimized("llama") if model is plain("llama") else model, recipe, compile=compile))


def test_scores(captured: None) -> None:
    text = prompt(170)
    result = evaluate(plain("llama"), text, 150, ["full", "int8", "kivi(bits=2)"], compile=False)
    first, full, int8, kivi = result.scores
    assert [s.recipe for s in result.scores] == [HF, "full", "int8", "kivi(bits=2)"]
    assert (result.context, result.tokens) == (150, 19)
    assert (first.agreement, first.alike, full.agreement, full.alike) == (1, 19, 1, 19)
    assert full.perplexity == pytest.approx(first.perplexity, rel=1e-4)
    assert full.attention_error == 0 and first.attention_error is None
    assert 0 < int8.attention_error < 0.1 < kivi.attention_error
    assert kivi.agreement < 1 and kivi.alike < 19
    assert first.kv_bytes == 150 * 4 * 2 * 2 * 16 * 4 and first.share == 2  # fp32, of 16 bits
    assert int8.kv_bytes == kvcompile.explain(optimized("llama", "int8")).kv_bytes(150)
    assert int8.share == int8.kv_bytes / (first.kv_bytes / 2)
    assert int8.perplexity == pytest.approx(
        forced_decode(optimized("llama", "int8"), text, 150).perplexity)
    assert all(s.ms_per_token > 0 for s in result.scores)


def test_alike_is_what_generate_has_in_common(captured: None) -> None:
    text = prompt(170)
    _, score = evaluate(plain("llama"), text, 150, ["kivi(bits=2)"], compile=False).scores
    both = [greedy(m, text[:, :150], 20)[0, 150:]
            for m in (plain("llama"), optimized("llama", "kivi(bits=2)"))]
    same = [*(both[0] == both[1]).tolist(), False].index(False)
    assert same == (score.alike + 1 if both[0][0] == both[1][0] else 0)  # the prompt gives one


def test_refused_recipes(captured: None) -> None:
    given = (plain("llama"), prompt(40), 30, ["full", "kivi(group=64, layers=99)"])
    with pytest.raises(KVCompileError):
        evaluate(*given, compile=False)
    *_, last = evaluate(*given, compile=False, lenient=True).scores
    assert last.perplexity is None and "99" in last.note
    with pytest.raises(KVCompileError, match="leaves none to score"):
        evaluate(plain("llama"), prompt(31), 30, ["full"], compile=False)


def test_every_known_method_is_scored_by_default() -> None:
    assert defaults("kivi(bits=4)") == [*kvcompile.methods(), "kivi(bits=4)"]
    assert defaults("full") == [*kvcompile.methods()]


def test_the_table_and_its_data() -> None:
    scores = [Score("a", 9.5, 1.0, 7, None, 1000, 1.0, 3.25), Score("b", note="why not")]
    result = Evaluation("m", 100, 7, scores)
    told = json.loads(json.dumps(result.as_dict()))
    assert told["scores"][0] == {
        "recipe": "a", "perplexity": 9.5, "agreement": 1.0, "alike": 7, "attention_error": None,
        "kv_bytes": 1000, "share": 1.0, "ms_per_token": 3.25, "note": None}
    text = str(result)
    assert "m: 7 tokens forced" in text and "9.500" in text and "b: why not" in text


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                     captured: None) -> None:
    monkeypatch.setattr(loading, "load", lambda name, dtype: (plain("llama"), None))
    argv = ["eval", "--model", "tiny-llama", "--context", "30", "--tokens", "4", "--no-compile",
            "--recipes", "full", "int8"]
    assert main([*argv, "--json"]) == 0
    out = capsys.readouterr()
    told: dict[str, Any] = json.loads(out.out)
    assert out.err == "" and [s["recipe"] for s in told["scores"]] == [HF, "full", "int8"]
    assert (told["model"], told["context"], told["tokens"]) == ("tiny-llama", 30, 4)
    assert main(argv) == 0
    assert "tiny-llama: 4 tokens forced through the cache" in capsys.readouterr().out
    assert commands.RECIPE in defaults(commands.RECIPE)
    assert torch.is_grad_enabled()
