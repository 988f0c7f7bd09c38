"""A recipe on a number of layers: what each layer's axes are set to, and by which term."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from kvcompile.errors import RecipeError
from kvcompile.method import Axes, find_method, located
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

    A term that names layers wins there over one that names none: ``kivi(bits=2)+int8(layers=0)``
    stores layer 0 by int8, and ``full(layers=:2)+kivi`` leaves the first two as they are, since a
    term without any axis keeps its layers whole. Otherwise two terms may set an axis of a layer to
    one value, never to two.
    """
    claims: list[list[tuple[Term, Axes]]] = [[] for _ in range(layers)]
    for term in Recipe.parse(recipe).terms:
        method = find_method(term)
        params = method.bind(term)
        if missing := method.uncalibrated(params):
            raise RecipeError(f"{located(term)}: {missing.name} comes from "
                              f"{missing.by.partition('=')[0]}: kvcompile.optimize(model, recipe, "
                              f"{missing.by}) finds it")
        claimed = claimed_layers(term, params["layers"], layers)
        for i, axes in zip(claimed, method.layer_axes(term, params, claimed), strict=True):
            claims[i].append((term, {a: _value(a, v) for a, v in axes.items()}))
    merged = [_merged(own) for own in claims]
    clashes = [(clash, i) for i, (_, clash) in enumerate(merged) if clash]
    if clashes:
        first = clashes[0][0]
        assert first is not None
        raise RecipeError(_conflict(*first, [i for clash, i in clashes if clash == first]))
    return tuple(own for own, _ in merged)


_Clash: TypeAlias = tuple[Term, Term, str]


def _merged(claims: list[tuple[Term, Axes]]) -> tuple[LayerPlan, _Clash | None]:
    """One layer's plan from the terms that claim it, and the first two that contradict."""
    named = [claim for claim in claims if _names(claim[0])]
    whole = next((term for term, axes in named if not axes), None)
    if whole:
        other = next(((t, axis) for t, axes in named for axis in axes), None)
        return LayerPlan(), other and (whole, *other)
    values: dict[str, Value] = {}
    origin: dict[str, Term] = {}
    for term, axes in (*named, *(claim for claim in claims if not _names(claim[0]))):
        for axis, value in axes.items():
            if values.setdefault(axis, value) == value:
                origin.setdefault(axis, term)
            elif _names(term) == _names(origin[axis]):
                return LayerPlan(), (origin[axis], term, axis)
    return LayerPlan(values, origin), None


def _names(term: Term) -> bool:
    """Whether `term` says which layers it is for."""
    return term.get("layers") is not None


def _value(axis: str, value: Value) -> Value:
    """Formats are compared as terms."""
    return parse_term(value) if axis.startswith("format.") and isinstance(value, str) else value


def claimed_layers(term: Term, layers: Slice | int | tuple[int, ...], n: int) -> list[int]:
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
