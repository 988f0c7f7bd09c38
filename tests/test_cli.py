"""The command line, in process: what it prints, its JSON, and one line for every mistake."""

import json
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain, prompt
from transformers import PreTrainedTokenizerBase

import kvcompile
from kvcompile import commands
from kvcompile.cli import main
from kvcompile.explain import explain
from kvcompile.measure.demo import compare
from kvcompile.measure.generate import timed
from kvcompile.models import load as loading
from kvcompile.models.tiny import tiny


class Letters:
    """A tokenizer of sorts: a token for every character below 128."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(c) % 128 for c in text]])}

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        return "".join(chr(i) if 32 <= i < 127 else "~" for i in ids.tolist())


@cache
def small(name: str) -> Any:
    return tiny(name.removeprefix("tiny-"), num_hidden_layers=2)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model tiny-llama` has two layers, `--model letters` a tokenizer as well."""
    def load(name: str, dtype: torch.dtype | None = None
             ) -> tuple[Any, PreTrainedTokenizerBase | Letters | None]:
        if name == "letters":
            return small("tiny-llama"), Letters()
        return small(name), None

    monkeypatch.setattr(loading, "load", load)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """optimize() and explain() start from one capture of the small model."""
    def optimize(model: Any, recipe: str, **options: Any) -> Any:
        return kvcompile.optimize(ready(), recipe, **options)

    monkeypatch.setattr(commands, "optimize", optimize)
    monkeypatch.setattr(commands, "explained", lambda model, recipe: explain(ready(), recipe))


@cache
def ready() -> Any:
    return kvcompile.optimize(small("tiny-llama"), "full", compile=False)


def spoken(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    out = capsys.readouterr()
    assert out.err == ""
    return out.out


@pytest.mark.parametrize("argv, line", [
    (["recipes", "kivy"], "kvcompile recipes: unknown method 'kivy'; did you mean 'kivi'? known: "
     + ", ".join(kvcompile.methods())),
    (["recipes", "a b"], "kvcompile recipes: 'a b' cannot name a term"),
    (["explain", "--recipe", "kivi(bits=3)"],
     "kvcompile explain: kivi(bits=3): column 1: bits must be one of 2, 4"),
    (["run", "--recipe", "kivi(bits"],
     "kvcompile run: recipe 'kivi(bits': column 10: expected '=' after bits"),
    (["run", "--model", "tiny-lama"],
     "kvcompile run: unknown tiny architecture 'lama'; did you mean 'llama'?"),
    (["run", "--model", "tiny-llama", "--prompt", "1 2 hello"],
     "kvcompile run: tiny-llama has no tokenizer: the prompt is token ids from 0 to 127, such as "
     "'1 2 3', not 'hello'"),
    (["run", "--model", "tiny-llama", "--prompt", "128"],
     "kvcompile run: tiny-llama has no tokenizer: the prompt is token ids from 0 to 127, such as "
     "'1 2 3', not '128'"),
    (["run", "--model", "tiny-llama", "--prompt", ""], "kvcompile run: the prompt is empty"),
    (["run", "--model", "tiny-llama", "--prompt-file", "/no/such/file"],
     "kvcompile run: cannot read /no/such/file: No such file or directory"),
    (["bench", "--rows", "attend", "prefil"], "kvcompile bench: unknown rows 'prefil'; did you "
     "mean 'prefill'?; known: attend, context, step, prefill, start, roofline"),
    (["bench", "--rows", "step", "--model", "tiny-lama"],
     "kvcompile bench: unknown tiny architecture 'lama'; did you mean 'llama'?"),
    (["eval", "--recipes", "full", "kivi(bits=3)"],
     "kvcompile eval: kivi(bits=3): column 1: bits must be one of 2, 4"),
    (["eval", "--model", "tiny-lama"],
     "kvcompile eval: unknown tiny architecture 'lama'; did you mean 'llama'?"),
    (["run", "--model", "tiny-llama", "--demo"],
     "kvcompile run: --demo needs a model with a tokenizer, which tiny-llama lacks"),
])
def test_mistakes_are_one_line(argv: list[str], line: str,
                               capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", line + "\n")


@pytest.mark.parametrize("argv, line", [
    (["run", "--dtype", "int4"], "kvcompile run: argument --dtype: invalid choice: 'int4' (choose "
     "from 'bf16', 'fp16', 'fp32')"),
    (["run", "--max-new-tokens", "0"],
     "kvcompile run: argument --max-new-tokens: '0' is not a positive whole number"),
    (["run", "--temperature", "0"],
     "kvcompile run: argument --temperature: '0' is not a positive number"),
    (["run", "--top-p", "1.5"], "kvcompile run: argument --top-p: '1.5' is more than 1"),
    (["run", "--prompt", "a", "--prompt-file", "b"],
     "kvcompile run: argument --prompt-file: not allowed with argument --prompt"),
    (["bench", "--json", "--markdown"],
     "kvcompile bench: argument --markdown: not allowed with argument --json"),
    (["eval", "--context", "-1"],
     "kvcompile eval: argument --context: '-1' is not a positive whole number"),
    (["frob"], "kvcompile: argument run | explain | recipes | bench | eval | kernels: invalid "
     "choice: 'frob' (choose from 'run', 'explain', 'recipes', 'bench', 'eval', 'kernels')"),
    ([], "kvcompile: the following arguments are required: run | explain | recipes | bench | eval "
     "| kernels"),
])
def test_bad_arguments_are_one_line(argv: list[str], line: str,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", line + "\n")


def test_a_model_that_is_refused_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "tiny-bloom"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kvcompile explain: BloomForCausalLM")


def test_recipes_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    text = spoken(capsys, "recipes")
    listed = json.loads(spoken(capsys, "recipes", "--json"))
    assert [method["name"] for method in listed] == list(kvcompile.methods())
    for method in kvcompile.methods().values():
        assert method.name in text and method.paper in text


def test_one_method_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    text = spoken(capsys, "recipes", "kivi")
    assert "kivi: KIVI (quantization, arXiv:2402.02750)" in text
    assert "format.k = int(bits=2, axis=channel, group=32)" in text
    told = json.loads(spoken(capsys, "recipes", "kivi", "--json"))
    assert {p["name"]: (p["default"], p["legal"]) for p in told["parameters"]} == {
        "bits": (2, "2, 4"), "group": (32, "16, 32, 64, 128"),
        "residual": (128, "from 0, a multiple of group")}
    assert told["axes"]["block.k"] == 128


def test_explain(capsys: pytest.CaptureFixture[str], small_models: None, captured: None) -> None:
    argv = ("explain", "--model", "tiny-llama", "--recipe", "kivi(bits=4)", "--tokens", "1000")
    report = explain(ready(), "kivi(bits=4)")
    assert spoken(capsys, *argv) == f"{report.table()}\n{report.memory(1000)}\n"
    told = json.loads(spoken(capsys, *argv, "--json", "--print-graph", "capture"))
    assert (told["tokens"], told["kv_bytes"], told["baseline_kv_bytes"]) == (
        1000, report.kv_bytes(1000), report.baseline_kv_bytes(1000))
    assert told["graph"] == str(report.program.after("capture"))
    assert "kvc.attention" in told["graph"]
    assert spoken(capsys, *argv, "--print-graph").endswith(f"\n\n{report.program}\n")
    assert main([*argv, "--print-graph", "quantise"]) == 2
    assert capsys.readouterr().err.startswith(
        "kvcompile explain: no pass 'quantise' was run; did you mean 'quantize'?; passes: ")


def test_run_gives_the_text_and_what_it_took(capsys: pytest.CaptureFixture[str],
                                             small_models: None, captured: None) -> None:
    argv = ("run", "--model", "tiny-llama", "--prompt", "5 6 7", "--no-compile",
            "--max-new-tokens", "9")
    told = json.loads(spoken(capsys, *argv, "--recipe", "full", "--json"))
    model = small("tiny-llama")
    want = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False)
    assert told["text"] == " ".join(map(str, want[0, 3:].tolist()))
    assert (told["prompt_tokens"], told["new_tokens"], told["cached_tokens"]) == (3, 9, 11)
    assert told["kv_bytes"] == explain(ready(), "full").kv_bytes(11)
    assert told["baseline_kv_bytes"] == 11 * 2 * 2 * 2 * 16 * 4
    assert told["prefill_s"] > 0 and told["first_step_s"] > 0 and told["ms_per_token"] > 0
    lines = spoken(capsys, *argv, "--recipe", "full").splitlines()
    assert lines[0] == told["text"]
    assert lines[2].startswith("KV cache of 11 tokens: ")
    sampled = [json.loads(spoken(capsys, *argv, "--sample", "--temperature", "3", "--seed", seed,
                                 "--json"))["text"] for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_run_takes_text_where_there_is_a_tokenizer(capsys: pytest.CaptureFixture[str],
                                                   tmp_path: Path, small_models: None,
                                                   captured: None) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Hello")
    argv = ("run", "--model", "letters", "--no-compile", "--max-new-tokens", "4", "--json")
    told = [json.loads(spoken(capsys, *argv, *more))
            for more in (("--prompt", "Hello"), ("--prompt-file", str(file)))]
    assert told[0]["text"] == told[1]["text"] and told[0]["prompt_tokens"] == 5
    assert len(told[0]["text"]) == 4
    assert main([*argv, "--chat"]) == 2
    assert capsys.readouterr().err == ("kvcompile run: letters has no chat template; leave out "
                                       "--chat\n")


def test_one_new_token_has_no_step_to_time() -> None:
    done = timed(plain("llama"), prompt(5), max_new_tokens=1)
    assert (done.first_step, done.ms_per_token, done.cached) == (None, None, 5)
    done = timed(plain("llama"), prompt(5), max_new_tokens=2)
    assert done.first_step is not None and done.ms_per_token is None


def test_the_demo_compares_on_the_same_tokens() -> None:
    result = compare(small("tiny-llama"), None, "full", prompt(40), prompt(60, seed=1), new=6,
                     context=50, compile=False)
    told = json.loads(json.dumps(result.as_dict()))
    theirs, ours = told["hugging_face"], told["kvcompile"]
    assert (told["context"], told["forced_steps"]) == (50, 9)
    assert (told["agreement"], told["alike"]) == (9, 6)
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], abs=1e-4)
    assert theirs["kv_bytes"] == result.report.baseline_kv_bytes(45)
    assert ours["kv_bytes"] == result.report.kv_bytes(45)
    text = str(result)
    assert text.startswith(told["text"]) and result.report.table() in text
    for part in ("KV cache of 45 tokens, bytes", "perplexity, forced decode of 9 tokens after 50",
                 "ms per token after 40", "9 of 9 times the likeliest", "alike for 6 of 6 tokens"):
        assert part in text


@pytest.mark.parametrize("module", ["kvcompile", "kvcompile.cli"])
def test_python_runs_it_as_a_module(module: str, capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kvcompile", "recipes", "full"])
    monkeypatch.delitem(sys.modules, module if "." in module else f"{module}.__main__",
                        raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("full: Full cache (exact, arXiv:1911.02150)")
