"""The laws of the C++ kernels for every registered format and method.

Triton's are in tests/interpreted.
"""

import pytest

from kvcompile.testing import check, pairs


@pytest.mark.parametrize("one, thing", [
    pytest.param(one, thing, id=f"{one.kind}-{name}-{one.name}") for one, name, thing in pairs()
    if one.target == "C++"])
def test_laws(one, thing):
    check(one, thing)
