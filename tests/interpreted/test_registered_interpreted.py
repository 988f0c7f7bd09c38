"""The laws of Triton's kernels for every registered format and method, by Triton's interpreter.

tests/test_triton.py runs them in a process of their own: Triton decides when it is imported.
"""

import warnings

import pytest

from kvcompile.testing import absent, check, pairs

if why := absent("Triton"):
    pytest.skip(why, allow_module_level=True)


@pytest.mark.parametrize("one, thing", [
    pytest.param(one, thing, id=f"{one.kind}-{name}-{one.name}") for one, name, thing in pairs()
    if one.target == "Triton"])
def test_laws(one, thing):
    with warnings.catch_warnings():  # numpy tells of what masks leave out
        warnings.simplefilter("ignore", RuntimeWarning)
        check(one, thing)
