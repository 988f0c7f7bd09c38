"""Every law for everything that is registered, and models and recipes of all kinds together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.testing import check, pairs
from kvcompile.testing.models import check_decoder
from kvcompile.testing.strategies import decoders, recipes


@pytest.mark.parametrize("one, thing", [
    pytest.param(one, thing, id=f"{name}-{one.name}") for one, name, thing in pairs()])
def test_laws(one, thing):
    check(one, thing)


@given(data=st.data(), options=decoders(), seed=st.integers(0, 99))
@settings(max_examples=max(2, settings.default.max_examples // 10))
def test_any_decoder_under_any_recipe(data, options, seed):
    check_decoder(options, data.draw(recipes(options["layers"])), seed)
