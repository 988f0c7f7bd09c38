"""Hypothesis strategies: numbers as caches hold them, formats, terms and recipes, small decoders.

Formats are drawn from what their class shows in `examples`: every value that an option has in one
of them is combined with every other. Methods are drawn from the legal values of their parameters.
"""

from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.format import PAGE, Format, format_of, formats, term_of
from kvcompile.method import Method, Param, methods
from kvcompile.plan import plan
from kvcompile.recipe import Recipe, Term, parse_term
from kvcompile.rewrite import check_axes

DIMS = (16, 32, 48, 64, 80, 128)
EDGES = (1, 2, 15, 16, 31, 32, 33, 127, 128, 129, 255, 256, 257, 300)  # around steps and pages


class Features(NamedTuple):
    """What makes numbers hard to store; each is one field that hypothesis can switch off."""

    seed: int
    exponent: int            # size of the numbers, 2^exponent; -140 makes them denormal
    outlier: bool            # a channel 40 times the others
    constant: bool           # a channel that does not vary, and one that is 0
    ties: bool               # numbers on a coarse grid, halfway between codes
    silent: bool             # a token of zeros
    equal: bool              # the tokens of a group alike

    def tensor(self, *shape: int) -> Tensor:
        """fp32 numbers [..., tokens, dim] with these features."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        if self.outlier:
            x[..., shape[-1] // 3] *= 40
        if self.ties:
            x = (x * 4).round() / 8
        if self.constant:
            x[..., 1], x[..., 2] = 1.5, 0.0
        if self.silent:
            x[..., shape[-2] // 2, :] = 0
        if self.equal:
            x[..., : 1 + shape[-2] // 2, :] = x[..., :1, :]
        return torch.ldexp(x, torch.tensor(self.exponent))


def features() -> st.SearchStrategy[Features]:
    """Numbers from 2^-12 to 2^6, or denormal."""
    flag = st.booleans()
    sizes = st.one_of(st.just(0), st.integers(-12, 6), st.just(-140))
    return st.builds(Features, st.integers(0, 2**20), sizes, *[flag] * 5)


def plain_features() -> st.SearchStrategy[Features]:
    """Numbers of size 1, without constant or equal ones: what a query can tell apart."""
    no = st.just(False)
    return st.builds(Features, st.integers(0, 2**20), st.just(0), st.booleans(), no, no, no, no)


@cache
def examples(cls: type[Format]) -> tuple[Term, ...]:
    """What a format shows of itself: its `examples`, else the format without options."""
    texts = getattr(cls, "examples", ()) or (cls.name,)
    return tuple(parse_term(text) for text in texts)


def formats_of(cls: type[Format], depth: int = 2) -> st.SearchStrategy[Format]:
    """Formats of one class, in every combination of its examples' options that it takes."""
    pools: dict[str, list[Any]] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        shown = [term.get(field.name) for term in examples(cls)]
        pools[field.name] = [*dict.fromkeys(v for v in shown if v is not None), None]

    @st.composite
    def draw_one(draw: Any) -> Format | None:
        args = []
        for name, pool in pools.items():
            value = draw(st.sampled_from(pool))
            if isinstance(value, Term) and depth and draw(st.booleans()):
                value = term_of(draw(any_format(depth - 1)))
            if value is not None:
                args.append((name, value))
        try:
            return format_of(Term(cls.name, tuple(args)))
        except (RecipeError, TypeError):
            return None

    some: st.SearchStrategy[Any] = draw_one().filter(lambda found: found is not None)
    return st.one_of(st.sampled_from([format_of(t) for t in examples(cls)]), some)


def any_format(depth: int = 2) -> st.SearchStrategy[Format]:
    """Formats of any registered class; wrappers around wrappers `depth` deep."""
    return st.sampled_from(sorted(formats())).flatmap(lambda n: formats_of(formats()[n], depth))


def fits(fmt: Format, dim: int, side: Any = "k") -> bool:
    """Whether the format takes heads of so many channels."""
    try:
        fmt.planes(dim, torch.float32, side)
    except RecipeError:
        return False
    return True


def dims(fmt: Format, side: Any = "k") -> list[int]:
    """The head dimensions of DIMS that the format takes."""
    return [dim for dim in DIMS if fits(fmt, dim, side)]


def _param(param: Param, bound: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Legal values of a parameter; None leaves its default."""
    if param.calibrated:
        return st.none()
    if param.choices:
        return st.one_of(st.none(), st.sampled_from(param.choices))
    if param.kind is bool:
        return st.one_of(st.none(), st.booleans())
    base = bound.get(param.multiple_of) if isinstance(param.multiple_of, str) else param.multiple_of
    low, high = param.minimum or 0, param.maximum
    if param.kind is int:
        step, top = int(base or 1), int(300 if high is None else high)
        first, last = -(-int(low) // step), max(top // step, -(-int(low) // step))
        values = st.sampled_from(sorted({first, min(first + 1, last), min(first + 4, last), last}))
        return st.one_of(st.none(), values.map(lambda n: n * step))
    if param.kind is float and high is not None:
        return st.one_of(st.none(), st.sampled_from([low, (low + high) / 2, high]).map(float))
    return st.none()


def terms(method: Method, layers: int = 0) -> st.SearchStrategy[Term]:
    """Terms of one method with legal parameters; for some of `layers` layers if there are any."""

    @st.composite
    def draw_one(draw: Any) -> Term | None:
        bound: dict[str, Any] = dict(method.defaults)
        args = []
        for param in method.params:
            value = draw(_param(param, bound))
            if value is not None:
                bound[param.name] = value
                args.append((param.name, value))
        if layers and draw(st.booleans()):
            args.append(("layers", draw(st.integers(0, layers - 1))))
        term = Term(method.name, tuple(args))
        try:
            plan_of(Recipe((term,)), layers or 2)
        except KVCompileError:
            return None
        return term

    some: st.SearchStrategy[Any] = draw_one().filter(lambda found: found is not None)
    return some


def plan_of(recipe: Recipe, layers: int) -> None:
    """Raise KVCompileError for a recipe that cannot be meant, calibration aside."""
    known = [t for t in recipe.terms if not methods()[t.name].uncalibrated(
        methods()[t.name].bind(t))]
    if known:
        check_axes(plan(Recipe(tuple(known)), layers))


def recipes(layers: int) -> st.SearchStrategy[Recipe]:
    """Well-formed compositions of one to three terms on a number of layers."""
    one = st.sampled_from(sorted(methods())).flatmap(lambda n: terms(methods()[n], layers))

    def joined(parts: list[Term]) -> Recipe | None:
        recipe = Recipe(tuple({t.name: t for t in parts}.values()))
        try:
            plan_of(recipe, layers)
        except KVCompileError:
            return None
        return recipe

    some: st.SearchStrategy[Any] = st.lists(one, min_size=1, max_size=3).map(joined)
    return some.filter(lambda found: found is not None)


def decoders() -> st.SearchStrategy[dict[str, Any]]:
    """Options of `models.decoder.Decoder.tiny`: small decoders in every spelling."""
    heads = st.sampled_from([(2, 2), (4, 2), (4, 1)])
    return st.builds(
        lambda heads, **rest: {"heads": heads[0], "kv_heads": heads[1], **rest}, heads,
        layers=st.integers(1, 3), head_dim=st.sampled_from([16, 32]),
        rope=st.sampled_from(["half", "interleaved", "partial", "none"]),
        norm=st.sampled_from(["rms", "layer"]), placement=st.sampled_from(["pre", "post"]),
        attention=st.sampled_from(["sdpa", "sdpa_gqa", "eager", "eager_fp32softmax"]),
        window=st.sampled_from([0, 0, 24]), fused_qkv=st.booleans(), qk_norm=st.booleans(),
        bias=st.booleans(), tied=st.booleans(), learned_positions=st.booleans())


__all__ = ["DIMS", "EDGES", "PAGE", "Features", "any_format", "decoders", "dims", "examples",
           "features", "fits", "formats_of", "plain_features", "recipes", "terms"]
