"""The table of methods, the binding of terms, and the plan of a recipe on some layers."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest

import kvcompile.method
from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.method import Method, Param, find_method, methods, register_method
from kvcompile.plan import LayerPlan, plan, runs
from kvcompile.recipe import Recipe, Slice, Term, parse_term

METHODS = sorted(methods().values(), key=lambda method: method.name)
KNOWN = ", ".join(methods())


def bind(text: str) -> dict[str, Any]:
    term = parse_term(text)
    return find_method(term).bind(term)


def refusal(text: str, layers: int = 30) -> str:
    with pytest.raises(RecipeError) as error:
        plan(text, layers)
    return str(error.value)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Method]:
    """Methods registered by a test are forgotten after it."""
    table: dict[str, Method] = {}
    monkeypatch.setattr(kvcompile.method, "_registered", table)
    return table


def made(name: str, *params: Param, **axes: Any) -> Method:
    return Method(name, name, "none", "test", params, lambda _: axes)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method(method: Method) -> None:
    assert methods()[method.name] is method
    assert re.match(r"arXiv:\d{4}\.\d{5}$|https://", method.paper) and method.title
    given = tuple((name, value) for name, value in method.defaults.items() if value is not None)
    written = Term(method.name, given)
    assert Recipe.parse(str(written)).terms == (written,)
    assert (
        method.bind(written)
        == method.bind(Term(method.name))
        == {
            **method.defaults,
            "layers": Slice(),
        }
    )
    if method.uncalibrated(method.bind(Term(method.name))):
        assert re.search("comes from (calibration|tokenizer): ", refusal(method.name))
    else:
        assert plan(str(written), 3) == plan(method.name, 3)
    for param in method.params:
        assert param.help
        for choice in param.choices or ():
            bound = method.bind(Term(method.name, ((param.name, choice),)))
            for axis, value in method.layer_axes(written, bound, range(4))[-1].items():
                if axis.startswith("format."):
                    assert str(parse_term(str(value))) == str(value)


def test_kivi() -> None:
    kivi = plan("kivi(bits=4, residual=64)", 1)[0].values
    assert {axis: str(value) for axis, value in kivi.items()} == {
        "format.k": "int(bits=4, axis=channel, group=32)",
        "block.k": "64",
        "lag.k": "0",
        "format.v": "int(bits=4, axis=token, group=32)",
        "block.v": "1",
        "lag.v": "64",
    }
    assert plan("kivi(group=16, residual=0)", 1)[0].get("block.k") == 16
    assert plan("kivi", 1)[0].get("block.k") == plan("kivi", 1)[0].get("lag.v") == 128


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("int8(group=64, residual=16)", "int(bits=8, axis=token, group=64)"),
        ("fp8(format=e5m2, residual=16)", "fp8(kind=e5m2)"),
    ],
)
def test_formats_by_token(text: str, stored: str) -> None:
    values = plan(text, 1)[0].values
    both = {"format": parse_term(stored), "block": 1, "lag": 16}
    assert values == {f"{axis}.{x}": value for x in "kv" for axis, value in both.items()}


def test_streamingllm_and_full() -> None:
    assert plan("streamingllm(window=256)", 1)[0].values == {"sinks": 4, "window": 256}
    assert plan("full", 2) == (LayerPlan(), LayerPlan())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kivi(bits=3)", "kivi(bits=3): column 1: bits must be one of 2, 4"),
        ("kivi(bits=2.0)", "kivi(bits=2.0): column 1: bits must be one of 2, 4"),
        ("fp8(format=e3m4)", "fp8(format=e3m4): column 1: format must be one of e4m3, e5m2"),
        (
            "kivi(residual=100)",
            "kivi(residual=100): column 1: residual must be a multiple of group (32)",
        ),
        ("int8(residual=-1)", "int8(residual=-1): column 1: residual must be at least 0"),
        ("int8(residual=1.5)", "int8(residual=1.5): column 1: residual must be a whole number"),
        ("int8(residual=true)", "int8(residual=true): column 1: residual must be a whole number"),
        (
            "full + streamingllm(window=0)",
            "streamingllm(window=0): column 8: window must be at least 1",
        ),
        (
            "kivi(bit=2)",
            "unknown parameter 'bit' of kivi at column 6; did you mean 'bits'?"
            " known: bits, group, residual, layers",
        ),
        ("full(q=2)", "unknown parameter 'q' of full at column 6; known: layers"),
        ("kivvi", f"unknown method 'kivvi' at column 1; did you mean 'kivi'? known: {KNOWN}"),
        ("full+zzz", f"unknown method 'zzz' at column 6; known: {KNOWN}"),
        ("kivi(bits=", "recipe 'kivi(bits=': column 11: expected a value"),
    ],
)
def test_refused_terms(text: str, message: str) -> None:
    assert refusal(text) == message


def test_terms_that_were_not_read_have_no_column() -> None:
    with pytest.raises(RecipeError, match=r"^kivi\(bits=3\): bits must be one of 2, 4$"):
        plan(Recipe((Term("kivi", (("bits", 3),)),)), 4)
    with pytest.raises(RecipeError, match=r"^unknown parameter 'bit' of kivi; did you mean 'bits'"):
        plan(Recipe((Term("kivi", (("bit", 3),)),)), 4)


def test_types_follow_the_default() -> None:
    method = made(
        "m",
        Param("ratio", 0.5, minimum=0, maximum=1),
        Param("budget", None, minimum=1),
        Param("flag", False),
        Param("inner", Term("bf16")),
        Param("heads", (0, 1)),
        Param("rows", Slice()),
        Param("name", "x"),
        Param("size", 8, multiple_of=8),
    )
    bound = method.bind(parse_term("m(ratio=1, inner=fp16, flag=true, heads=[], rows=2:, size=16)"))
    assert bound == {
        "ratio": 1.0,
        "budget": None,
        "flag": True,
        "inner": Term("fp16"),
        "heads": (),
        "rows": Slice(2),
        "name": "x",
        "size": 16,
        "layers": Slice(),
    }
    assert type(bound["ratio"]) is float
    for text, fault in {
        "ratio=true": "ratio must be a number",
        "ratio=2": "ratio must be at most 1",
        "budget=0": "budget must be at least 1",
        "budget=0.5": "budget must be a whole number",
        "flag=1": "flag must be true or false",
        "inner=4": "inner must be a term",
        "heads=1": "heads must be a list",
        "rows=1": "rows must be a slice",
        "name=bf16()": "name must be a name",
        "size=12": "size must be a multiple of 8",
    }.items():
        with pytest.raises(RecipeError) as error:
            method.bind(parse_term(f"m({text})"))
        assert str(error.value).endswith(f"): column 1: {fault}")


def test_a_method_that_refuses_itself_is_not_made() -> None:
    with pytest.raises(RecipeError, match=r"^m: n must be at least 1$"):
        made("m", Param("n", 0, minimum=1))
    with pytest.raises(KVCompileError, match=r"^method m: parameter names clash: n, n$"):
        made("m", Param("n", 0), Param("n", 1))
    with pytest.raises(KVCompileError, match=r"^method m: parameter names clash: layers$"):
        made("m", Param("layers", 0))


def test_registered_methods(registered: dict[str, Method]) -> None:
    method = made("mine", score="norm")
    register_method(method)
    assert methods()["mine"] is method and set(methods()) - {"mine"} == {m.name for m in METHODS}
    assert plan("mine+kivi", 1)[0].get("score") == "norm"
    with pytest.raises(KVCompileError, match=r"^two methods are named 'kivi': 'KIVI' and 'kivi'$"):
        register_method(made("kivi"))
    with pytest.raises(KVCompileError, match=r"^two methods are named 'mine'"):
        register_method(method)
    with pytest.raises(KVCompileError, match=r"^expected a Method, not str$"):
        register_method("mine")  # type: ignore[arg-type]
    methods().clear()
    assert "kivi" in methods()


def test_methods_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def plugins(*where: str) -> list[Any]:
        asked.append(where)
        return [(made("a"), made("b")), made("c")]

    monkeypatch.setattr(kvcompile.method, "plugins", plugins)
    assert list(kvcompile.method._discovered.__wrapped__()) == ["a", "b", "c"]
    assert asked == [("passes", "METHODS", "kvcompile.methods")]


@pytest.mark.parametrize(
    ("layers", "claimed"),
    [
        ("2:", [2, 3, 4, 5]),
        (":-4", [0, 1]),
        ("::2", [0, 2, 4]),
        ("::-1", [0, 1, 2, 3, 4, 5]),
        (":", [0, 1, 2, 3, 4, 5]),
        ("1:100", [1, 2, 3, 4, 5]),
        ("3", [3]),
        ("-1", [5]),
        ("[0, -1, 2, 2]", [0, 2, 5]),
    ],
)
def test_layers(layers: str, claimed: list[int]) -> None:
    planned = plan(f"kivi(layers={layers})", 6)
    assert [i for i, layer in enumerate(planned) if layer.values] == claimed
    term = parse_term(f"kivi(layers={layers})")
    for layer in planned:
        assert all(origin == term for origin in layer.origin.values())
        assert layer.values.keys() == layer.origin.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kivi(layers=40:)", "kivi(layers=40:): column 1: claims none of the 30 layers"),
        ("kivi(layers=[])", "kivi(layers=[]): column 1: claims none of the 30 layers"),
        ("kivi(layers=40)", "kivi(layers=40): column 1: layer 40 is out of range for 30 layers"),
        ("kivi(layers=-31)", "kivi(layers=-31): column 1: layer -31 is out of range for 30 layers"),
        (
            "full+kivi(layers=[0, 30])",
            "kivi(layers=[0, 30]): column 6: layer 30 is out of range for 30 layers",
        ),
        *(
            (
                f"kivi(layers={wrong})",
                f"kivi(layers={wrong}): column 1: "
                "layers must be a slice, a layer or a list of layers",
            )
            for wrong in ("true", "1.5", "all", "[1, 2:]", "int()")
        ),
    ],
)
def test_refused_layers(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "kivi+int8",
            "'kivi' and 'int8' both set format.k of layers 0-29; give them different layers=",
        ),
        (
            "kivi(layers=:20)+streamingllm+fp8(layers=[3, 19, 20, 1, 2])",
            "'kivi' and 'fp8' both set format.k of layers 1-3, 19; give them different layers=",
        ),
        (
            "kivi(layers=:9)+kivi(bits=4, layers=7)",
            "'kivi(layers=:9)' and 'kivi(bits=4, layers=7)' both set format.k of layer 7;"
            " give them different layers=",
        ),
        (
            "streamingllm+streamingllm(window=8)",
            "'streamingllm' and 'streamingllm(window=8)' both set window of layers 0-29;"
            " give them different layers=",
        ),
        (
            "full(layers=:3)+streamingllm(layers=1:)",
            "'full' and 'streamingllm' both set sinks of layers 1-2; give them different layers=",
        ),
    ],
)
def test_two_values_for_one_axis_are_refused(text: str, message: str) -> None:
    assert refusal(text) == message


def test_one_value_twice_is_fine() -> None:
    assert plan("kivi+kivi", 2) == plan("kivi", 2)
    assert plan("kivi+streamingllm", 2) == plan("streamingllm+kivi", 2)
    parts = plan("kivi(layers=:1)+int8(layers=1:)", 3)
    assert parts == plan("kivi", 1) + plan("int8", 2)
    assert [str(layer.origin["format.k"]) for layer in parts[:2]] == [
        "kivi(layers=:1)",
        "int8(layers=1:)",
    ]


def test_a_term_that_names_layers_wins_over_one_that_names_none() -> None:
    kivi, int8, full = (plan(name, 1)[0] for name in ("kivi", "int8", "full"))
    assert plan("full(layers=:2)+kivi", 3) == plan("kivi+full(layers=:2)", 3) == (full, full, kivi)
    assert plan("kivi+int8(layers=[0, -1])", 3) == (int8, kivi, int8)
    assert plan("full+kivi", 2) == (kivi, kivi)
    first, second = plan("streamingllm(layers=0)+kivi", 2)
    assert second == kivi and first.values == {**kivi.values, "sinks": 4, "window": 1024}
    assert str(first.origin["window"]) == "streamingllm(layers=0)"


def test_formats_are_compared_as_terms(registered: dict[str, Method]) -> None:
    register_method(made("a", **{"format.k": "int(bits=4,axis=token)", "read": "dense"}))
    register_method(made("b", **{"format.k": parse_term("int( bits=4, axis=token )")}))
    layer = plan("a+b", 1)[0]
    assert layer.get("format.k") == parse_term("int(bits=4, axis=token)")
    assert layer.get("read") == "dense"
    assert layer.get("nothing") is None and layer.get("nothing", 3) == 3


def test_a_layer_plan_is_a_value() -> None:
    kivi, same = plan("kivi+streamingllm", 2)
    assert len({kivi, same, plan("full", 1)[0]}) == 2
    for twin in (copy.deepcopy(kivi), pickle.loads(pickle.dumps(kivi))):
        assert twin == kivi and twin.origin == kivi.origin and hash(twin) == hash(kivi)
    with pytest.raises(TypeError):
        kivi.values["window"] = 1  # type: ignore[index]


def test_layer_numbers_in_short() -> None:
    assert runs([3]) == "layer 3"
    assert runs([5, 0, 1, 2]) == "layers 0-2, 5"
    assert runs(range(30)) == "layers 0-29"
