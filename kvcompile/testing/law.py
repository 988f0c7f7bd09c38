"""What a law is: a check that everything registered of a kind must pass, or say why it need not."""

import warnings
from collections.abc import Callable, Iterator
from random import randrange
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as reproducible
from hypothesis import strategies as st

from kvcompile.backend.inductor import check_compiler
from kvcompile.errors import KVCompileError, nearest
from kvcompile.format import formats
from kvcompile.method import methods
from kvcompile.registry import module
from kvcompile.rewrite import passes


class Law(NamedTuple):
    """One law. `check(thing, data)` raises AssertionError; `data` is hypothesis's `st.data()`.

    `applies(thing)` is False where the law says nothing, such as one on codes of a format that
    has none. One example costs `cost` of a cheap law's.
    """

    kind: str
    name: str
    check: Callable[[Any, Any], None]
    applies: Callable[[Any], bool]
    cost: int
    target: str = ""

    @property
    def statement(self) -> str:
        """The first line of the check's docstring."""
        return (self.check.__doc__ or "").partition("\n")[0]


LAWS: list[Law] = []


def law(kind: str, applies: Callable[[Any], bool] = lambda thing: True, cost: int = 1,
        target: str = "") -> Callable[[Callable[[Any, Any], None]], Callable[[Any, Any], None]]:
    """Make the decorated check a law for all of a kind: format, method or pass; of the kernels of
    a `target`: C++ or Triton."""

    def add(check: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        LAWS.append(Law(kind, check.__name__, check, applies, cost, target))
        return check

    return add


def registered() -> dict[str, dict[str, Any]]:
    """kind -> name -> what is registered."""
    return {"format": dict(formats()), "method": dict(methods()),
            "pass": {p.name: p for p in passes()}}


def exempt(thing: Any, name: str) -> str:
    """Why `thing` need not keep the law `name`: its field `exempt`, law -> reason; else ``""``."""
    reasons: dict[str, str] = dict(getattr(thing, "exempt", {}))
    known = {x.name for x in LAWS}
    for told, reason in reasons.items():
        if told not in known or not reason.strip():
            raise KVCompileError(f"{getattr(thing, 'name', thing)}: exempt={{{told!r}: {reason!r}}}"
                                 f" must give a reason for one of {', '.join(sorted(known))}")
    return reasons.get(name, "")


def pairs() -> Iterator[tuple[Law, str, Any]]:
    """Every law with everything that it must hold for."""
    for kind, things in registered().items():
        for one in LAWS:
            if one.kind == kind:
                yield from ((one, name, thing) for name, thing in things.items()
                            if one.applies(thing) and not exempt(thing, one.name))


def check(one: Law, thing: Any, seed: int | None = None, examples: int = 0) -> None:
    """Try a law on as many examples as hypothesis's profile says, less for costly ones.

    A failure carries the line that repeats it. The seed is 0 where the profile is derandomized.
    """
    profile: Any = settings.default
    seed = seed if seed is not None else 0 if profile.derandomize else randrange(2**32)
    cost = one.cost * (5 if any(p.calibrated for p in getattr(thing, "params", ())) else 1)
    least = 1 if one.target else 2  # the first is the simplest
    examples = examples or max(least, profile.max_examples // cost)
    slow = (Phase.shrink, Phase.explain) if cost > 1 else ()  # they take minutes
    phases = [p for p in profile.phases if p not in slow]
    mute = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @reproducible(seed)
    @settings(max_examples=examples, deadline=None, derandomize=False, database=None,
              phases=phases, suppress_health_check=mute)
    @given(data=st.data())
    def holds(data: Any) -> None:
        one.check(thing, data)

    try:
        holds()
    except Exception as error:
        error.add_note(f"{one.name}: {one.statement}\nreproduce: python -m kvcompile.testing "
                       f"{thing.name} {one.name} --seed {seed} --examples {examples}")
        raise


def absent(target: str) -> str:
    """Why the kernels of a target do not run in this process; ``""`` if they do."""
    source = module("kernels", "triton_source")
    if target == "Triton" and not source.installed():
        return "pip install triton"
    if target == "Triton" and not (source.interpreted() or torch.cuda.is_available()):
        return "set TRITON_INTERPRET=1 for Triton's interpreter"
    try:
        check_compiler() if target == "C++" else None
    except KVCompileError as error:
        return str(error)
    return ""


def check_registered(*names: str) -> None:
    """Try every law on what is registered under these names; on everything without any. Warns of
    kernels that do not run in this process."""
    known = {name for things in registered().values() for name in things}
    if unknown := set(names) - known:
        raise KVCompileError(f"nothing is registered as {', '.join(sorted(unknown))}"
                             f"{nearest(min(unknown), known)}")
    for target in {one.target: "" for one in LAWS}:
        if why := absent(target):
            warnings.warn(f"laws of {target}'s kernels are not tried: {why}", stacklevel=2)
    for one, name, thing in pairs():
        if (not names or name in names) and not absent(one.target):
            check(one, thing)
