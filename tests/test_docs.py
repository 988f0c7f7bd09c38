"""The documentation's code runs, its graphs are printed ones, and its links lead somewhere."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import optimized, plain
from transformers import Gemma2ForCausalLM, LlamaForCausalLM

import kvcompile
from kvcompile import format as formats_module
from kvcompile import method as methods_module
from kvcompile import rewrite
from kvcompile.models import load as loading
from kvcompile.models import tiny as models
from kvcompile.models.tiny import tiny
from kvcompile.printer import text

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLAIN = (LlamaForCausalLM, Gemma2ForCausalLM)
FILE = re.compile(r"# ((?:passes|kernels)/\w+\.py)\n")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Path]:
    """A folder whose passes/ and kernels/ are as good as ours; forgotten afterwards."""
    caches = (rewrite.passes, rewrite.phases, formats_module.formats, methods_module._discovered)
    registered = dict(methods_module._registered)
    for folder in ("passes", "kernels"):
        (tmp_path / folder).mkdir()
    kvcompile.__path__.append(str(tmp_path))
    try:
        yield tmp_path
    finally:
        kvcompile.__path__.remove(str(tmp_path))
        methods_module._registered.clear()
        methods_module._registered.update(registered)
        for cached in caches:
            cached.cache_clear()


@pytest.mark.parametrize("page", ["adding-a-pass.md", "adding-a-method.md"])
def test_examples_run_as_they_are_printed(page: str, installed: Path,
                                          monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    captured = {arch: optimized(arch) for arch in ("llama", "gemma2")}
    optimize, explain = kvcompile.optimize, kvcompile.explain

    def start(model: Any) -> Any:  # every capture is made once
        return captured.get(model.config.model_type) if type(model) in PLAIN else model

    monkeypatch.setattr(models, "tiny", plain)
    monkeypatch.setattr(kvcompile, "optimize", lambda model, recipe, **options: (
        optimize(start(model), recipe, **options)))
    monkeypatch.setattr(kvcompile, "explain", lambda model, recipe=None: (
        explain(start(model), recipe)))
    scope: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / page, "python"):
        if found := FILE.match(block):
            (installed / found[1]).write_text(block.removeprefix(found[0]))
            for cached in (rewrite.passes, formats_module.formats, methods_module._discovered):
                cached.cache_clear()
        else:
            exec(compile(block, page, "exec"), scope)
    assert "recipe: " in capsys.readouterr().out


class Letters:
    """Stands in for a tokenizer: a token for every character, padding on the left."""

    padding_side = "right"
    eos_token_id = pad_token_id = 0

    def __call__(self, texts: str | list[str], padding: bool = False, **options: Any) -> Any:
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[3 + ord(c) % 120 for c in text] for text in texts]
        width = max(map(len, rows))
        assert padding and self.padding_side == "left" or len(rows) == 1
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return Inputs(input_ids=ids, attention_mask=(ids > 0).long())

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        return " ".join(map(str, ids.tolist()))

    def batch_decode(self, ids: torch.Tensor, **options: Any) -> list[str]:
        return [self.decode(row) for row in ids]


class Inputs(dict):
    """What a tokenizer returns: keys that are attributes too."""

    __getattr__ = dict.__getitem__


def test_the_readme_runs(monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loading, "load", lambda name: (plain("llama"), Letters()))
    first, optimize = optimized("llama"), kvcompile.optimize
    monkeypatch.setattr(kvcompile, "optimize", lambda model, recipe: (
        optimize(first, recipe, compile=False)))
    scope: dict[str, Any] = {}
    for block in blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), scope)
    assert "LlamaForCausalLM, recipe: kivi(bits=4)" in capsys.readouterr().out


def test_graphs_are_printed_ones() -> None:
    program = kvcompile.capture(tiny("llama", num_hidden_layers=1), "int8")
    graphs = [str(program), *(text(gm) for gm in program.phases.values())]
    lines = {line for graph in graphs for line in graph.splitlines()}
    shown = [line for page in PAGES for block in blocks(page, "graph")
             for line in block.replace("\n    ", " ").splitlines()]
    assert len(shown) > 5
    for line in shown:
        assert line in lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_lists_what_there_is() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in kvcompile.methods():
        assert f"`{name}" in readme, f"README.md's table lacks {name}"
