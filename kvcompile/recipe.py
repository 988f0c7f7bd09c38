"""Recipe text and its values; ``Recipe.parse(str(r)) == r``.

    recipe := term ("+" term)*
    term   := name [ "(" [ key "=" value ("," key "=" value)* ] ")" ]
    value  := number | bool | name | "string" | slice | [list] | term
    slice  := [int] ":" [int] [ ":" [int] ]

A name starts with a letter or ``_`` and goes on with letters, digits, ``_`` and ``-``. As a value,
a bare name is a str and ``name()`` a term. Strings are JSON's, a list becomes a tuple, numbers are
finite, and white space between tokens means nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias, TypeVar

from kvcompile.errors import RecipeError

Value: TypeAlias = "bool | int | float | str | Slice | Term | tuple[Value, ...]"
_T = TypeVar("_T")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_NUMBER = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z0-9_.]+")
_BOOLS = {"true": True, "True": True, "false": False, "False": False}
_NOT_FINITE = {"inf", "infinity", "nan"}


@dataclass(frozen=True)
class Slice:
    """``start:stop:step`` with Python's meaning, and hashable."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if any(type(part) not in (int, type(None)) for part in (self.start, self.stop, self.step)):
            raise RecipeError("a slice takes whole numbers")
        if self.step == 0:
            raise RecipeError("the step of a slice must not be 0")

    def indices(self, n: int) -> range:
        """The indices that the slice takes from a sequence of `n`."""
        return range(n)[self.start : self.stop : self.step]

    def __str__(self) -> str:
        parts = [self.start, self.stop] + ([] if self.step is None else [self.step])
        return ":".join("" if part is None else str(part) for part in parts)


LONG = 60  # characters of an argument that messages still show


@dataclass(frozen=True)
class Term:
    """``name(key=value, ...)``. Where it was read (columns from 1, 0 unknown) is not compared."""

    name: str
    args: tuple[tuple[str, Value], ...] = ()
    column: int = field(default=0, compare=False, repr=False)
    arg_columns: tuple[int, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not _bare(self.name):
            raise RecipeError(f"{self.name!r} cannot name a term")
        for key, value in self.args:
            if not _NAME.fullmatch(key):
                raise RecipeError(f"{key!r} cannot name a parameter of {self.name}")
            if not _writable(value):
                raise RecipeError(f"{key}={value!r} of {self.name} cannot be written in a recipe")
        if len({key for key, _ in self.args}) < len(self.args):
            raise RecipeError(f"{self.name} is given one parameter twice")

    def get(self, key: str, default: Value | None = None) -> Value | None:
        """The value given for `key`, else `default`."""
        return next((value for name, value in self.args if name == key), default)

    @property
    def brief(self) -> str:
        """As str, for messages: what calibration found, which may be long, is left out."""
        texts = [value.brief if isinstance(value, Term) else _written(value)
                 for _, value in self.args]
        args = [f"{name}={text if len(text) <= LONG else '..'}"
                for (name, _), text in zip(self.args, texts, strict=True)]
        return f"{self.name}({', '.join(args)})" if args else self.name

    def __str__(self) -> str:
        return _written(self) if self.args else self.name


@dataclass(frozen=True)
class Recipe:
    """Terms joined by ``+``."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise RecipeError("a recipe has at least one term")

    @classmethod
    def parse(cls, recipe: str | Recipe) -> Recipe:
        """Read recipe text; a `Recipe` is returned as it is."""
        if isinstance(recipe, Recipe):
            return recipe
        if not isinstance(recipe, str):
            raise RecipeError(f"a recipe is text or a Recipe, not {type(recipe).__name__}")
        reader = _Reader("recipe", recipe)
        return cls(reader.whole(reader.terms, "'+' or the end"))

    @property
    def brief(self) -> str:
        """As str, without what is long."""
        return "+".join(term.brief for term in self.terms)

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))


def parse_term(text: str) -> Term:
    """Read one term, such as ``int(bits=2, axis=channel)``; ``parse_term(str(t)) == t``."""
    reader = _Reader("term", text)
    return reader.whole(reader.term, "the end")


def _bare(text: str) -> bool:
    """Whether `text` needs no quotes: a name that reads as neither a bool nor a number."""
    return bool(_NAME.fullmatch(text)) and text not in _BOOLS and text.lower() not in _NOT_FINITE


def _writable(value: Value) -> bool:
    if type(value) is tuple:
        return all(map(_writable, value))
    if type(value) is float:
        return math.isfinite(value)
    return type(value) in (bool, int, str, Slice, Term)


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _bare(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, Term):
        return f"{value.name}({', '.join(f'{k}={_written(v)}' for k, v in value.args)})"
    return str(value)


class _Reader:
    """Recursive descent over one text; `at` is the next character."""

    def __init__(self, what: str, text: str) -> None:
        self.what, self.text, self.at = what, text, 0

    def fail(self, reason: str, at: int | None = None) -> NoReturn:
        column = (self.skip() if at is None else at) + 1
        raise RecipeError(f"{self.what} {self.text!r}: column {column}: {reason}")

    def skip(self) -> int:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.at

    def take(self, token: str) -> bool:
        found = self.text.startswith(token, self.skip())
        self.at += len(token) if found else 0
        return found

    def match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.skip())
        self.at = found.end() if found else self.at
        return found.group() if found else ""

    def listed(self, item: Callable[[], _T], close: str) -> tuple[_T, ...]:
        items: list[_T] = []
        while items or not self.take(close):
            items.append(item())
            if self.take(close):
                break
            if not self.take(","):
                self.fail(f"expected ',' or '{close}'")
        return tuple(items)

    def whole(self, rule: Callable[[], _T], expected: str) -> _T:
        try:
            result = rule()
        except RecursionError:
            self.fail("nested too deeply")
        if self.skip() < len(self.text):
            self.fail(f"expected {expected}")
        return result

    def terms(self) -> tuple[Term, ...]:
        terms = [self.term()]
        while self.take("+"):
            terms.append(self.term())
        return tuple(terms)

    def term(self) -> Term:
        start = self.skip()
        name = self.match(_NAME)
        if not _bare(name):
            self.fail("expected a name", start)
        return self.arguments(name, start) if self.take("(") else Term(name, (), start + 1)

    def arguments(self, name: str, start: int) -> Term:
        columns: dict[str, int] = {}

        def argument() -> tuple[str, Value]:
            at = self.skip()
            key = self.match(_NAME)
            if not key:
                self.fail("expected a parameter name")
            if key in columns:
                self.fail(f"{key} is given twice to {name}", at)
            if not self.take("="):
                self.fail(f"expected '=' after {key}")
            columns[key] = at + 1
            return key, self.value()

        args = self.listed(argument, ")")
        return Term(name, args, start + 1, tuple(columns.values()))

    def value(self) -> Value:
        start = self.skip()
        if self.text.startswith('"', start):
            return self.string()
        if self.take("["):
            return self.listed(self.value, "]")
        word = self.match(_NAME)
        if not word:
            return self.number_or_slice()
        if word in _BOOLS:
            return _BOOLS[word]
        if not _bare(word):
            self.fail("expected a finite number", start)
        return self.arguments(word, start) if self.take("(") else word

    def string(self) -> str:
        try:
            text, self.at = json.JSONDecoder(strict=False).raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self.fail("expected a string closed by '\"', with JSON's escapes", error.pos)
        return str(text)

    def number(self) -> int | float | None:
        start = self.skip()
        digits = self.match(_NUMBER)
        tail = _WORD.match(self.text, self.at)
        if digits and tail:
            self.fail(f"'{digits}{tail.group()}' is neither a number nor a name", start)
        if not digits:
            return None
        try:
            number = float(digits) if set(digits) & set(".eE") else int(digits)
        except ValueError:  # more digits than Python reads into an int
            number = math.inf
        if number in (math.inf, -math.inf):
            self.fail("expected a finite number", start)
        return number

    def number_or_slice(self) -> Value:
        start = self.skip()
        first = self.number()
        if not self.take(":"):
            return self.fail("expected a value", start) if first is None else first
        parts = first, self.number(), self.number() if self.take(":") else None
        try:
            return Slice(*parts)  # type: ignore[arg-type]  # Slice refuses floats
        except RecipeError as error:
            self.fail(str(error), start)
