"""Forced decode reads the cache: against whole forwards, exact and compressed."""

import pytest
import torch
from support import optimized, plain, prompt
from torch.nn.functional import cross_entropy

from kvcompile.errors import KVCompileError
from kvcompile.measure.perplexity import Forced, forced_decode, forced_decodes


def scored(logits: torch.Tensor, ids: torch.Tensor, context: int) -> list[float]:
    """Nats of tokens context + 1, ..., each under the logits of the token before it."""
    each = cross_entropy(logits[0, context:-1], ids[0, context + 1 :], reduction="none")
    return each.tolist()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_without_compression_it_is_the_models_own_likelihood(arch: str) -> None:
    ids = prompt(150)
    with torch.no_grad():
        want = scored(plain(arch)(ids).logits, ids, 100)
    got = forced_decode(plain(arch), ids, 100)
    assert len(got.ms) == len(got.nll) == 49 and min(got.ms) > 0
    assert got.nll == pytest.approx(want, abs=1e-3)


def test_every_step_reads_what_the_recipe_stored() -> None:
    """From a context of one token on, the steps are the stateless graph with lossy storage.

    Not to the last digit: rounding may tip a number at the edge between two codes into the other.
    """
    model, ids = optimized("llama", "fp8(format=e5m2)"), prompt(150)
    positions = torch.arange(150)[None]
    with torch.no_grad():
        logits = model.kvcompile.program.graph_module(
            ids, positions, torch.ones_like(ids, dtype=torch.bool), positions[0])
    got = forced_decodes([plain("llama"), model], ids, 1)
    exact, compressed = (torch.tensor(each.nll) for each in got)
    want = torch.tensor(scored(logits, ids, 1))
    assert ((compressed - want).abs() < 0.02).float().mean() > 0.9
    assert ((compressed - exact).abs() < 0.02).float().mean() < 0.2


def test_perplexity_and_median() -> None:
    forced = Forced([0.0, 2.0], [900.0, 3.0, 1.0])
    assert forced.perplexity == pytest.approx(2.718281828)
    assert forced.median_ms == 3.0


@pytest.mark.parametrize("context", [0, 9, 10, 11])
def test_the_text_must_go_on_after_the_context(context: int) -> None:
    with pytest.raises(KVCompileError, match="context=.*: must be from 1 to 8"):
        forced_decode(plain("llama"), prompt(10), context)
