"""A decoder in plain PyTorch is captured by structure and runs through the same graphs."""

import pytest
import torch
from support import prompt

import kvcompile
from kvcompile.engine import Engine
from kvcompile.models.decoder import Decoder
from kvcompile.own_cache import OwnCache


@pytest.mark.parametrize("options", (
    {}, {"attention": "eager", "rope": "interleaved"},
    {"attention": "sdpa_gqa", "fused_qkv": True}), ids=str)
def test_cached_decoding_equals_the_module(options):
    model = Decoder.tiny(**options)
    program = kvcompile.capture(model)
    engine = Engine(program, compile=False)
    cache = OwnCache(engine.sites, "full", "test")
    ids = prompt(40)
    positions, valid = torch.arange(40)[None], torch.ones(1, 40, dtype=torch.bool)
    with torch.no_grad():
        want, got = model(ids, positions), []
        for start, end in ((0, 30), (30, 36), *((i, i + 1) for i in range(36, 40))):
            at = slice(start, end)
            got.append(engine.run(cache, ids[:, at], positions[:, at], valid[:, at],
                                  torch.arange(end - start)))
    assert (torch.cat(got, 1) - want).abs().max() <= 1e-4 + 1e-5 * want.abs().max()


def test_optimize_says_where_it_belongs():
    with pytest.raises(kvcompile.UnsupportedModelError, match="kvcompile.capture takes any"):
        kvcompile.optimize(Decoder.tiny(), "full")
