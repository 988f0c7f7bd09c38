"""Every law for everything that is registered, and models and recipes of all kinds together."""

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from kvcompile.errors import RecipeError
from kvcompile.method import methods
from kvcompile.recipe import Recipe
from kvcompile.testing import check, pairs
from kvcompile.testing.models import check_decoder
from kvcompile.testing.stores import LAYERS, sites_of
from kvcompile.testing.strategies import decoders, recipes


@pytest.mark.parametrize("one, thing", [
    pytest.param(one, thing, id=f"{name}-{one.name}") for one, name, thing in pairs()
    if not one.target])
def test_laws(one, thing):
    check(one, thing)


@pytest.mark.share(20)
@given(data=st.data())
@settings(max_examples=max(3, settings.default.max_examples // 5))
def test_terms_commute(data):
    """The order of terms means nothing: axes are independent, and passes have their own order."""
    recipe = data.draw(recipes(LAYERS))
    try:
        found = sites_of(str(recipe))
    except RecipeError:  # too few tokens to calibrate on
        reject()
    assert sites_of(str(Recipe(recipe.terms[::-1]))) == found


@pytest.mark.parametrize("name", methods())
def test_sharing_then_quantizing_is_quantizing_the_owner(name):
    """Where a method makes layers read others, another says how the owners store."""
    alone = sites_of(name)
    if all(site.owner is None for site in alone):
        return
    for other in ("kivi(bits=4)", "streamingllm(window=64)+int8"):
        for site, shared, own in zip(sites_of(f"{name}+{other}"), alone, sites_of(other),
                                     strict=True):
            assert site.owner == shared.owner
            assert site.store == (own.store if site.owner is None else
                                  sites_of(other)[site.owner].store)


@pytest.mark.parametrize("recipe", [
    "qfilters(budget=300, ratio=1.0, layers=2)", "cam(next=300)+razorattention(sinks=300)",
    "kvtuner(bits=5.0)+keydiff+streamingllm(sinks=1, layers=3)", "d2o(ratio=1.0)+headkv(window=1)"])
def test_what_calibration_shows_to_be_wrong_is_refused_in_one_line(recipe):
    """Found by the laws of passes, which took such recipes for well-formed."""
    with pytest.raises(RecipeError) as error:
        sites_of(recipe)
    assert "\n" not in str(error.value) and "give " in str(error.value)


@pytest.mark.share(100)
@given(data=st.data(), options=decoders(), seed=st.integers(0, 99))
@settings(max_examples=max(2, settings.default.max_examples // 10))
def test_any_decoder_under_any_recipe(data, options, seed):
    check_decoder(options, data.draw(recipes(options["layers"])), seed)
