"""Recipe text: `parse(str(r)) == r` for every recipe, and the exact words of every refusal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.errors import KVCompileError, RecipeError, nearest
from kvcompile.recipe import Recipe, Slice, Term, Value, parse_term

WORDS = {"true", "True", "false", "False"}
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True).filter(
    lambda name: name not in WORDS and name.lower() not in {"inf", "infinity", "nan"}
)
bounds = st.none() | st.integers(-50, 50)
slices = st.builds(Slice, bounds, bounds, bounds.filter(lambda step: step != 0))
strings = st.text(st.characters(), max_size=12) | st.sampled_from(
    [
        "",
        "true",
        "False",
        "inf",
        "NaN",
        "-1",
        "2x",
        "1e5",
        "a b",
        "k=(v)",
        '"',
        "\\",
        "\n",
        "\ud800",
    ]
)
leaves = (
    st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | names
    | strings
    | slices
)


def terms(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Term]:
    args = st.lists(st.tuples(names, values), max_size=3, unique_by=lambda arg: arg[0])
    return st.builds(Term, names, args.map(tuple))


values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3).map(tuple) | terms(inner), max_leaves=8
)
recipes = st.lists(terms(values), min_size=1, max_size=3).map(lambda found: Recipe(tuple(found)))


def typed(value: Value) -> object:
    """A value with its types spelled out, since True == 1 == 1.0."""
    if isinstance(value, tuple):
        return tuple(map(typed, value))
    if isinstance(value, Term):
        return value.name, tuple((key, typed(inner)) for key, inner in value.args)
    return type(value), repr(value)


@given(recipes)
def test_text_round_trips(recipe: Recipe) -> None:
    read = Recipe.parse(str(recipe))
    assert read == recipe and hash(read) == hash(recipe) and str(read) == str(recipe)
    assert [typed(term) for term in read.terms] == [typed(term) for term in recipe.terms]
    for term in recipe.terms:
        assert parse_term(str(term)) == term


@given(recipes, st.text(" \t\n", min_size=1, max_size=3))
def test_white_space_between_tokens_means_nothing(recipe: Recipe, blank: str) -> None:
    spaced, quoted, escaped = "", False, False
    for character in str(recipe):
        quoted ^= character == '"' and not escaped
        escaped = quoted and character == "\\" and not escaped
        token = character in "+()[],=" and not quoted and spaced[-1:].lower() != "e"
        spaced += f"{blank}{character}{blank}" if token else character
    assert Recipe.parse(f"{blank}{spaced}{blank}") == recipe


@given(st.text('ab-1.5e:=,+()[]" \\t', max_size=20))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        recipe = Recipe.parse(text)
    except RecipeError as error:
        assert f"recipe {text!r}: column " in str(error) and "\n" not in str(error)
    else:
        assert Recipe.parse(str(recipe)) == recipe


@given(slices, st.integers(0, 40))
def test_a_slice_takes_what_python_takes(part: Slice, n: int) -> None:
    assert list(part.indices(n)) == list(range(n))[part.start : part.stop : part.step]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("-3", -3),
        ("0.25", 0.25),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        ("2E-3", 0.002),
        ("true", True),
        ("True", True),
        ("false", False),
        ("False", False),
        ("e4m3", "e4m3"),
        ("pre-rope_2", "pre-rope_2"),
        ('"two words\\n"', "two words\n"),
        ('"\\u00e9"', "é"),
        ("2:", Slice(2)),
        (":10", Slice(None, 10)),
        ("2:28:2", Slice(2, 28, 2)),
        (":", Slice()),
        ("::-1", Slice(None, None, -1)),
        ("-4 : -1", Slice(-4, -1)),
        ("2::", Slice(2)),
        ("[]", ()),
        ("[1, [a, 2:], int(bits=4)]", (1, ("a", Slice(2)), Term("int", (("bits", 4),)))),
        ("int()", Term("int")),
        ("had(inner=int(bits=2))", Term("had", (("inner", Term("int", (("bits", 2),))),))),
    ],
)
def test_values(text: str, value: Value) -> None:
    assert typed(parse_term(f"m(x={text})").args[0][1]) == typed(value)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("minicache + kivi", "minicache+kivi"),
        ("full()", "full"),
        ("h2o(ratio = .2,layers=2 :)", "h2o(ratio=0.2, layers=2:)"),
        ("a(x=True, y=[b,c], z=bf16())", "a(x=true, y=[b, c], z=bf16())"),
        ('a(x="plain", y="true", z="2x")', 'a(x=plain, y="true", z="2x")'),
        (
            "store(k=int(bits=2, axis=channel, group=32), k_block=128)",
            "store(k=int(bits=2, axis=channel, group=32), k_block=128)",
        ),
    ],
)
def test_one_spelling(text: str, canonical: str) -> None:
    assert str(Recipe.parse(text)) == canonical


def test_columns_are_kept_but_not_compared() -> None:
    first, second = Recipe.parse("full + kivi(bits=4, group=64)").terms
    assert (first.column, second.column, second.arg_columns) == (1, 8, (13, 21))
    assert second == Term("kivi", (("bits", 4), ("group", 64)))
    assert second.get("group") == 64 and second.get("residual") is None
    assert second.get("residual", 128) == 128
    recipe = Recipe((first, second))
    assert Recipe.parse(recipe) is recipe


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("", 1, "expected a name"),
        ("kivi(bits=", 11, "expected a value"),
        ("kivi(bits=)", 11, "expected a value"),
        ("kivi(bits=-)", 11, "expected a value"),
        ("kivi(bits", 10, "expected '=' after bits"),
        ("kivi(bits 2)", 11, "expected '=' after bits"),
        ("kivi(", 6, "expected a parameter name"),
        ("kivi(bits=2,)", 13, "expected a parameter name"),
        ("kivi(bits=2 group=3)", 13, "expected ',' or ')'"),
        ("kivi(bits=[1, 2)", 16, "expected ',' or ']'"),
        ("kivi(bits=2, bits=4)", 14, "bits is given twice to kivi"),
        ("kivi(bits=2x)", 11, "'2x' is neither a number nor a name"),
        ("kivi(bits=1.2.3)", 11, "'1.2.3' is neither a number nor a name"),
        ("kivi(bits=inf)", 11, "expected a finite number"),
        ("kivi(bits=NaN)", 11, "expected a finite number"),
        ("kivi(bits=-1e999)", 11, "expected a finite number"),
        ("kivi(bits=" + "9" * 5000 + ")", 11, "expected a finite number"),
        ("kivi(layers=1:2.5)", 13, "a slice takes whole numbers"),
        ("kivi(layers=::0)", 13, "the step of a slice must not be 0"),
        ('kivi(x="ab)', 8, "expected a string closed by '\"', with JSON's escapes"),
        ('kivi(x="\\q")', 9, "expected a string closed by '\"', with JSON's escapes"),
        ("kivi+", 6, "expected a name"),
        ("+kivi", 1, "expected a name"),
        ("true", 1, "expected a name"),
        ("2x", 1, "expected a name"),
        ("kivi int8", 6, "expected '+' or the end"),
        ("kivi)", 5, "expected '+' or the end"),
    ],
)
def test_refusals_name_the_column(text: str, column: int, reason: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text)
    assert str(error.value) == f"recipe {text!r}: column {column}: {reason}"


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RecipeError, match=r": column \d+: nested too deeply$"):
        Recipe.parse("a(a=" * 5000)


def test_one_term_is_not_a_recipe() -> None:
    with pytest.raises(RecipeError) as error:
        parse_term("a+b")
    assert str(error.value) == "term 'a+b': column 2: expected the end"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Term("2x"), "'2x' cannot name a term"),
        (lambda: Term("true"), "'true' cannot name a term"),
        (lambda: Term("a", (("b c", 1),)), "'b c' cannot name a parameter of a"),
        (lambda: Term("a", (("b", float("nan")),)), "b=nan of a cannot be written in a recipe"),
        (
            lambda: Term("a", (("b", (1, float("inf"))),)),
            "b=(1, inf) of a cannot be written in a recipe",
        ),
        (lambda: Term("a", (("b", 1), ("b", 2))), "a is given one parameter twice"),
        (lambda: Slice(0, 4, 0), "the step of a slice must not be 0"),
        (lambda: Slice(True), "a slice takes whole numbers"),
        (lambda: Recipe(()), "a recipe has at least one term"),
        (lambda: Recipe.parse(3), "a recipe is text or a Recipe, not int"),  # type: ignore[arg-type]
    ],
)
def test_what_could_not_be_read_back_is_never_built(build: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        build()
    assert str(error.value) == message


def test_errors() -> None:
    assert issubclass(RecipeError, KVCompileError) and issubclass(RecipeError, ValueError)
    assert nearest("kivvi", ["full", "kivi"]) == "; did you mean 'kivi'?"
    assert nearest("FULL", ["full", "kivi"]) == "; did you mean 'full'?"
    assert nearest("zzz", ["full", "kivi"]) == ""
