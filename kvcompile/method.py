"""Named methods: one value per axis, a few checked parameters, the paper they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from kvcompile.errors import KVCompileError, RecipeError, nearest
from kvcompile.recipe import Slice, Term, Value
from kvcompile.registry import plugins

if TYPE_CHECKING:
    from kvcompile.calibration.samples import Samples

Axes: TypeAlias = Mapping[str, Value]

CALIBRATED = "calibrated"  # asks for what calibration finds where a parameter has a default

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name",
    Slice: "a slice",
    Term: "a term",
    tuple: "a list",
}


@dataclass(frozen=True)
class Param:
    """One parameter. Its type is that of `default`, or where that is None of the first bound."""

    name: str
    default: Value | None
    choices: tuple[Value, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int | str | None = None  # a str names another parameter
    help: str = ""
    calibrated: bool = False  # a list that the method's `calibrate` finds where it is None, or
    # named `calibrated`
    by: str = "calibration=ids"  # what `optimize` is given for that

    @property
    def kind(self) -> type | None:
        if self.calibrated:
            return tuple
        known = (self.default, self.minimum, self.maximum, *(self.choices or ()))
        return next((type(value) for value in known if value is not None), None)

    def coerce(self, value: Value) -> Value | None:
        """`value` in the parameter's type where nothing is lost: int to float, name to term. What
        is to be `calibrated` is None."""
        if self.calibrated and value == CALIBRATED:
            return None
        if self.kind is float and type(value) is int:
            return float(value)
        return Term(value) if self.kind is Term and isinstance(value, str) else value

    def fault(self, bound: Mapping[str, Any]) -> str:
        """What the value in `bound` must be and is not, else ``""``."""
        value, kind = bound[self.name], self.kind
        base = bound[self.multiple_of] if isinstance(self.multiple_of, str) else self.multiple_of
        if value is None:
            return ""
        if kind and type(value) is not kind and not self.choices:
            return f"must be {_KINDS[kind]}"
        if self.choices and (type(value), value) not in [(type(c), c) for c in self.choices]:
            return f"must be one of {', '.join(str(choice) for choice in self.choices)}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum}"
        if base and value % base:
            named = f"{self.multiple_of} ({base})" if isinstance(self.multiple_of, str) else base
            return f"must be a multiple of {named}"
        return ""


@dataclass(frozen=True)
class Method:
    """A named method; `axes` maps bound parameters to the axes that the method sets.

    These are the same for all layers, or a sequence: one mapping for each claimed layer, in order;
    `layers` of the parameters are then the numbers of those layers.
    A method with `calibrate` has parameters that are None until it has seen text: `calibrate`
    gives them from the bound ones and what attention saw in the claimed layers. They are written
    into the recipe (`kvcompile.calibration`), so that its text is all that anybody needs.

    `exempt` names laws that the method need not keep, each with the reason (`kvcompile.testing`).

    Every method also takes ``layers=``: a slice, a layer or a list of layers.
    """

    name: str
    title: str
    paper: str
    family: str
    params: tuple[Param, ...]
    axes: Callable[[Mapping[str, Any]], Axes | Sequence[Axes]]
    note: str = ""
    calibrate: Callable[[Mapping[str, Any], Samples], Axes] | None = None
    exempt: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        names = [param.name for param in self.params]
        if "layers" in names or len(set(names)) < len(names):
            raise KVCompileError(f"method {self.name}: parameter names clash: {', '.join(names)}")
        self.bind(Term(self.name))

    @property
    def defaults(self) -> dict[str, Value | None]:
        """Declared parameters and their defaults, without ``layers``."""
        return {param.name: param.default for param in self.params}

    def uncalibrated(self, bound: Mapping[str, Any]) -> Param | None:
        """The first parameter that calibration has yet to find."""
        return next((p for p in self.params if p.calibrated and bound[p.name] is None), None)

    def layer_axes(self, term: Term, bound: Mapping[str, Any], layers: Sequence[int]
                   ) -> list[Axes]:
        """What `term`, bound, sets on each of the layers that it claims, given by number."""
        axes = self.axes({**bound, "layers": tuple(layers)})
        if isinstance(axes, Mapping):
            return [axes] * len(layers)
        if len(axes) != len(layers):
            raise RecipeError(f"{located(term)}: was calibrated for {len(axes)} layers, but claims "
                              f"{len(layers)}")
        return list(axes)

    def bind(self, term: Term) -> dict[str, Any]:
        """Every parameter's value, checked, and ``layers`` (all of them unless `term` says)."""
        bound: dict[str, Any] = {**self.defaults, "layers": Slice()}
        for index, (key, value) in enumerate(term.args):
            if key not in bound:
                where = _at(term.arg_columns[index] if term.arg_columns else 0)
                hint = suggestion(key, bound)
                raise RecipeError(f"unknown parameter '{key}' of {self.name}{where}{hint}")
            bound[key] = value
        for param in self.params:
            bound[param.name] = param.coerce(bound[param.name])
        faults = [(param.name, param.fault(bound)) for param in self.params]
        for name, fault in [*faults, ("layers", _layers_fault(bound["layers"]))]:
            if fault:
                raise RecipeError(f"{located(term)}: {name} {fault}")
        return bound


def _at(column: int) -> str:
    """``" at column 3"``, or ``""`` for a term that was not read from text."""
    return f" at column {column}" if column else ""


def located(term: Term) -> str:
    """The term, and its column where it was read from text: how messages about it begin."""
    return f"{term}: column {term.column}" if term.column else str(term)


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of an ``unknown ...`` message: the nearest spelling and everything known."""
    names = list(known)
    return f"{nearest(word, names) or ';'} known: {', '.join(names)}"


def _layers_fault(value: Value) -> str:
    layers = value if isinstance(value, tuple) else (value,)
    if isinstance(value, Slice) or all(type(layer) is int for layer in layers):
        return ""
    return "must be a slice, a layer or a list of layers"


_registered: dict[str, Method] = {}


def methods() -> dict[str, Method]:
    """Every known method by name.

    Those in ``METHODS`` of the modules in `kvcompile.passes`, those of the entry points in group
    ``kvcompile.methods`` (each a `Method` or a tuple of them), and those registered.
    """
    return {**_discovered(), **_registered}


def register_method(method: Method) -> None:
    """Add `method` to `methods()` for this process."""
    _add(_registered, method, methods())


def find_method(term: Term) -> Method:
    """The method that `term` names."""
    known = methods()
    if term.name not in known:
        hint = suggestion(term.name, known)
        raise RecipeError(f"unknown method '{term.name}'{_at(term.column)}{hint}")
    return known[term.name]


@cache
def _discovered() -> Mapping[str, Method]:
    found: dict[str, Method] = {}
    for loaded in plugins("passes", "METHODS", "kvcompile.methods"):
        for method in loaded if isinstance(loaded, tuple) else (loaded,):
            _add(found, method, found)
    return found


def _add(table: dict[str, Method], method: object, taken: Mapping[str, Method]) -> None:
    if not isinstance(method, Method):
        raise KVCompileError(f"expected a Method, not {type(method).__name__}")
    if method.name in taken:
        titles = f"{taken[method.name].title!r} and {method.title!r}"
        raise KVCompileError(f"two methods are named '{method.name}': {titles}")
    table[method.name] = method
