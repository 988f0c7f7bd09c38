"""A recipe on a number of layers: what each layer's axes are set to, and by which term."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kvcompile.errors import RecipeError
from kvcompile.method import find_method, located
from kvcompile.recipe import Recipe, Slice, Term, Value, parse_term


@dataclass(frozen=True)
class LayerPlan:
    """One layer's axes. An empty plan keeps the layer exact; who set an axis is not compared."""

    values: Mapping[str, Value] = field(default_factory=dict)
    origin: Mapping[str, Term] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))
        object.__setattr__(self, "origin", MappingProxyType(dict(self.origin)))

    def get(self, axis: str, default: Value | None = None) -> Value | None:
        """The value of `axis`, else `default`."""
        return self.values.get(axis, default)

    def __hash__(self) -> int:
        return hash(frozenset(self.values.items()))

    def __reduce__(self) -> tuple[Callable[..., LayerPlan], tuple[Any, ...]]:
        return LayerPlan, (dict(self.values), dict(self.origin))


def plan(recipe: str | Recipe, layers: int) -> tuple[LayerPlan, ...]:
    """Bind every term of `recipe` to the layers that it claims, out of `layers`.

    Two terms may set an axis of a layer to one value, never to two.
    """
    values: list[dict[str, Value]] = [{} for _ in range(layers)]
    origin: list[dict[str, Term]] = [{} for _ in range(layers)]
    for term in Recipe.parse(recipe).terms:
        method = find_method(term)
        params = method.bind(term)
        claimed = _claimed(term, params["layers"], layers)
        for axis, value in method.axes(params).items():
            if axis.startswith("format.") and isinstance(value, str):
                value = parse_term(value)
            clash = [i for i in claimed if values[i].get(axis, value) != value]
            if clash:
                other = origin[clash[0]][axis]
                shared = [i for i in clash if origin[i][axis] is other]
                raise RecipeError(_conflict(other, term, axis, shared))
            for i in claimed:
                values[i][axis] = value
                origin[i].setdefault(axis, term)
    return tuple(map(LayerPlan, values, origin))


def _claimed(term: Term, layers: Slice | int | tuple[int, ...], n: int) -> list[int]:
    """The layers, ascending, that `term` claims among `n`."""
    if isinstance(layers, Slice):
        claimed = set(layers.indices(n))
    else:
        named = layers if isinstance(layers, tuple) else (layers,)
        for layer in named:
            if not -n <= layer < n:
                raise RecipeError(f"{located(term)}: layer {layer} is out of range for {n} layers")
        claimed = {layer % n for layer in named}
    if not claimed:
        raise RecipeError(f"{located(term)}: claims none of the {n} layers")
    return sorted(claimed)


def _conflict(first: Term, second: Term, axis: str, layers: list[int]) -> str:
    a, b = (first.name, second.name) if first.name != second.name else (first, second)
    return f"'{a}' and '{b}' both set {axis} of {runs(layers)}; give them different layers="


def runs(layers: Iterable[int]) -> str:
    """Layer numbers in short: ``layer 3``, ``layers 0-5, 7``."""
    ends: list[list[int]] = []
    for layer in sorted(layers):
        if ends and layer == ends[-1][1] + 1:
            ends[-1][1] = layer
        else:
            ends.append([layer, layer])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ends)
    return f"layers {text}" if "," in text or "-" in text else f"layer {text}"
