"""The laws of the C++ kernels for every registered format and method.

Triton's are in tests/interpreted.
"""

import pytest
from support import LONG

from kvcompile.testing import check, pairs


@pytest.mark.parametrize("one, thing", [
    pytest.param(one, thing, id=f"{one.kind}-{name}-{one.name}",
                 marks=pytest.mark.slow if one.kind == "method" and name in LONG else ())
    for one, name, thing in pairs()
    if one.target == "C++"])
def test_laws(one, thing):
    check(one, thing)
