"""The laws of Triton's kernels for every registered format and method, by the interpreter."""

import pytest
from support import LONG
from test_triton import interpret, needs_triton

SLOW = f"method and ({' or '.join(LONG)})"


@needs_triton
def test_laws():
    assert interpret("-k", f"registered and not ({SLOW})")


@needs_triton
@pytest.mark.slow
def test_laws_of_methods_that_take_long():
    assert interpret("-k", f"registered and {SLOW}")
