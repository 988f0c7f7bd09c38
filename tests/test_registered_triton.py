"""The laws of Triton's kernels for every registered format and method, by the interpreter."""

import pytest
from test_triton import interpret, needs_triton

QUICK = "format or kivi or streamingllm or dms or jointkv"  # every format, and each kind of tiers


@needs_triton
def test_laws():
    interpret("-k", f"registered and ({QUICK})")


@needs_triton
@pytest.mark.slow
def test_laws_of_the_other_methods():
    interpret("-k", f"registered and not ({QUICK})")
