"""The laws of Triton's kernels for every registered format and method, by the interpreter."""

import pytest
from test_triton import interpret, needs_triton

# methods that take long, whose formats and tiers others have; what is registered anew is not here
SLOW = ("method and (kvquant or mha2mla or kvtuner or gear or rtn or quarot or xquant or zipcache "
        "or pod)")


@needs_triton
def test_laws():
    interpret("-k", f"registered and not ({SLOW})")


@needs_triton
@pytest.mark.slow
def test_laws_of_methods_that_take_long():
    interpret("-k", f"registered and {SLOW}")
