"""The laws of kvcompile as property tests for formats, methods and passes: yours and ours.

    from kvcompile.testing import check_registered
    def test_my_plugin():
        check_registered("my_format", "my_method")

draws examples with hypothesis for every law and everything named (by default all that is
registered). `python -m kvcompile.testing` prints what is covered. docs/laws.md.
"""

from kvcompile.testing import formats, kernels, models, stores  # noqa: F401  # their laws
from kvcompile.testing.law import (
    LAWS,
    Law,
    absent,
    check,
    check_registered,
    exempt,
    law,
    pairs,
    registered,
)

__all__ = ["LAWS", "Law", "absent", "check", "check_registered", "exempt", "law", "pairs",
           "registered"]
