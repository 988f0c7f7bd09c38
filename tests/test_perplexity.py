"""Forced decode reads the cache: against whole forwards, exact and compressed."""

import pytest
import torch
from support import optimized, plain, prompt
from torch.nn.functional import cross_entropy

from kvcompile.errors import KVCompileError
from kvcompile.perplexity import Forced, forced_decode, forced_decodes


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
    """From a context of one token on, the steps are the stateless graph with lossy storage."""
    model, ids = optimized("llama", "kivi(bits=2)"), prompt(150)
    positions = torch.arange(150)[None]
    with torch.no_grad():
        logits = model.kvcompile.program.graph_module(
            ids, positions, torch.ones_like(ids, dtype=torch.bool), positions[0])
    got = forced_decodes([plain("llama"), model], ids, 1)
    assert got[1].nll == pytest.approx(scored(logits, ids, 1), abs=1e-3)
    same = [abs(a - b) < 1e-3 for a, b in zip(got[0].nll, got[1].nll, strict=True)]
    assert all(same[:126]) and not all(same[127:])  # the first block of 128 keys is stored by then


def test_perplexity_and_median() -> None:
    forced = Forced([0.0, 2.0], [900.0, 3.0, 1.0])
    assert forced.perplexity == pytest.approx(2.718281828)
    assert forced.median_ms == 3.0


@pytest.mark.parametrize("context", [0, 9, 10, 11])
def test_the_text_must_go_on_after_the_context(context: int) -> None:
    with pytest.raises(KVCompileError, match="context=.*: must be from 1 to 8"):
        forced_decode(plain("llama"), prompt(10), context)
