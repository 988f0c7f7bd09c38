"""The named methods as a table, as a page each, and as plain data."""

from textwrap import fill
from typing import Any

from rich import box
from rich.table import Table

from kvcompile.method import Method, Param, find_method, methods
from kvcompile.recipe import Term
from kvcompile.show import WIDTH, as_text


def find(name: str) -> Method:
    """The method called `name`; RecipeError with the nearest spelling if there is none."""
    return find_method(Term(name))


def as_list() -> list[dict[str, Any]]:
    """Every method, as `as_dict` gives it."""
    return [as_dict(method) for method in methods().values()]


def as_dict(method: Method) -> dict[str, Any]:
    """A method in plain types; `axes` is what it sets with its defaults (on the last of 4)."""
    params = [{"name": p.name, "default": _plain(p.default), "legal": legal(p), "help": p.help}
              for p in method.params]
    term = Term(method.name)
    axes = method.layer_axes(term, method.bind(term), range(4))[-1]
    return {"name": method.name, "title": method.title, "family": method.family,
            "paper": method.paper, "note": method.note, "parameters": params,
            "axes": {axis: _plain(value) for axis, value in axes.items()}}


def legal(param: Param) -> str:
    """The legal values of a parameter in words: `2, 4` or `from 0, a multiple of group`."""
    if param.calibrated:
        return "a list, found by calibration"
    if param.choices:
        return ", ".join(str(_plain(choice)) for choice in param.choices)
    words = [f"{word} {bound:g}" for word, bound in (("from", param.minimum), ("to", param.maximum))
             if bound is not None]
    text = " ".join(words) or (param.kind.__name__ if param.kind else "any")
    return f"{text}, a multiple of {param.multiple_of}" if param.multiple_of else text


def table() -> str:
    """One line per method and parameter."""
    grid = Table("method", "family", "parameter", "default", "legal values", "paper",
                 box=box.SIMPLE, pad_edge=False)
    longest = max(len(m.paper) for m in methods().values())
    for column in (grid.columns[0], grid.columns[-1]):
        column.no_wrap = True
    for method in methods().values():
        params = [(p.name, str(_plain(p.default)), legal(p)) for p in method.params]
        head, *rest = params or [("", "", "")]
        grid.add_row(method.name, method.family, *head, method.paper)
        for line in rest:
            grid.add_row("", "", *line, "")
    return "\n".join([
        as_text(grid, WIDTH + longest), "", "Every method also takes layers=: a slice such as 2: "
        "or ::2, a layer, or a list of layers.", "Methods are joined by +, as in "
        '"streamingllm(window=512)+kivi(bits=4)".'])


def page(method: Method) -> str:
    """One method in full."""
    told = as_dict(method)
    lines = [f"{method.name}: {method.title} ({method.family}, {method.paper})",
             fill(method.note, WIDTH), ""]
    if told["parameters"]:
        grid = Table("parameter", "default", "legal values", "meaning", box=box.SIMPLE,
                     pad_edge=False)
        for p in told["parameters"]:
            grid.add_row(p["name"], str(p["default"]), p["legal"], p["help"])
        lines += [as_text(grid), ""]
    axes = [f"  {axis} = {value}" for axis, value in told["axes"].items()]
    head = "sets, for example:" if method.calibrate else "sets, by default:"
    return "\n".join([*lines, head if axes else "sets nothing", *axes])


def _plain(value: Any) -> Any:
    """Numbers, bools and None as they are, everything else as recipe text."""
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
