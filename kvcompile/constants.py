"""Numbers that formats have layer by layer, taken out of them so that layers share kernels.

A format class may name options that are lists of numbers in `per_layer`, such as a codebook. Of
layers that are stored alike but for these, each has its numbers in one row of a plane, and the
option is a slice of that row: `nuq(table=0:16)` has the table that a layer's first 16 numbers are.
"""

from collections.abc import Callable
from typing import Any

from kvcompile.format import Format, format_of, formats, term_of
from kvcompile.recipe import Slice, Term, Value


def take(fmt: Format, numbers: list[float]) -> Format:
    """`fmt` with slices in place of its lists, which are put behind `numbers`."""
    def slices(found: tuple[float, ...]) -> Slice:
        numbers.extend(found)
        return Slice(len(numbers) - len(found), len(numbers))

    return format_of(_changed(term_of(fmt), tuple, slices))


def give(fmt: Format, numbers: tuple[float, ...]) -> Format:
    """The format that `fmt` is where the layer's row is `numbers`."""
    return format_of(_changed(term_of(fmt), Slice, lambda at: numbers[at.start : at.stop]))


def many(fmt: Format) -> int:
    """The numbers that a row must have for `fmt`; 0 if it has all that it needs."""
    ends = [0]

    def note(at: Slice) -> Slice:
        ends.append(at.stop or 0)
        return at

    _changed(term_of(fmt), Slice, note)
    return max(ends)


def _changed(term: Term, kind: type, change: Callable[[Any], Value]) -> Term:
    """`term` with `change` made to the options of `kind` that its formats have layer by layer."""
    own = getattr(formats()[term.name], "per_layer", ())
    return Term(term.name, tuple(
        (key, _changed(value, kind, change) if isinstance(value, Term)
         else change(value) if key in own and isinstance(value, kind) else value)
        for key, value in term.args))
