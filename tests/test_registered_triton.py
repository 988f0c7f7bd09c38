"""The laws of Triton's kernels for every registered format and method, by the interpreter."""

from test_triton import interpret, needs_triton


@needs_triton
def test_laws():
    interpret("-k", "registered")
