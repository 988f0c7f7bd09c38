"""What entries of methods that choose among tokens are made of: budgets, windows, rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kvcompile.errors import RecipeError
from kvcompile.method import Axes, Method, Param
from kvcompile.recipe import Term, Value

BUDGET = Param("budget", None, minimum=1, help="tokens that a head keeps, on average")
RATIO = Param("ratio", None, minimum=0.001, maximum=1.0,
              help="or the share of the prompt that it keeps")


def chosen(name: str, default: float, *params: Param, axes: Callable[[Mapping[str, Any]], Any],
           **about: Any) -> Method:
    """A method with a budget: tokens, if `default` is an int, else a share of the prompt."""
    tokens = isinstance(default, int)
    both = (replace(BUDGET, help=f"{BUDGET.help} ({default} if ratio is not given)") if tokens
            else BUDGET, RATIO if tokens else
            replace(RATIO, help=f"{RATIO.help} ({default} if budget is not given)"))

    def bound(p: Mapping[str, Any]) -> Any:
        if p["budget"] is not None and p["ratio"] is not None:
            raise RecipeError(f"{name}: give budget= (tokens) or ratio= (a share), not both")
        if p["budget"] is None and p["ratio"] is None:
            p = {**p, "budget" if tokens else "ratio": default}
        return axes(p)

    return Method(name=name, params=(*both, *params), axes=bound,
                  **{"family": "selection", **about})


def sized(p: Mapping[str, Any]) -> tuple[tuple[str, Value], ...]:
    """The options of a budget for these parameters."""
    return (("ratio", p["ratio"]),) if p["budget"] is None else (("tokens", p["budget"]),)


def keep(score: Term, p: Mapping[str, Any], name: str = "uniform", *options: tuple[str, Value],
         **more: Value) -> Axes:
    """The axes of a rule."""
    rest = {f"keep.{axis}": value for axis, value in more.items() if value}
    return {"keep.score": score, "keep.budget": Term(name, (*sized(p), *options)), **rest}


def term(name: str, **options: Value) -> Term:
    return Term(name, tuple(options.items()))


WINDOW = (Param("window", 32, minimum=1, help="last queries that look; their tokens stay"),
          Param("kernel", 5, minimum=1, help="neighbours that scores are smoothed over (odd)"),
          Param("pool", "avg", choices=("avg", "max"), help="how they are smoothed"))


def window(p: Mapping[str, Any]) -> Term:
    return term("window", window=p["window"], kernel=p["kernel"], pool=p["pool"])


PROTECT = (Param("sinks", 4, minimum=0, help="first tokens that always stay"),)
