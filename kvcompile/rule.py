"""What a layer keeps of its tokens, as data: one value per axis, each found by name in a registry.

    rule(score=window(window=64), budget=uniform(ratio=0.25), sinks=4, recent=0.5, every=1, ...)

A scorer gives every token of every kv head a number, higher is kept longer. A budget turns scores
into numbers of tokens, per head. A merge says what becomes of what is not kept; channels are what
a head keeps of its keys. They are frozen dataclasses in `SCORERS`, `BUDGETS`, `MERGES` and
`CHANNELS` of the modules in `passes/`, or in other packages behind the entry points
`kvcompile.scorers`, `.budgets`, `.merges` and `.channels`; their fields are their options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any, ClassVar, Protocol

from torch import Tensor

from kvcompile.errors import RecipeError, nearest
from kvcompile.prompt import Prompt
from kvcompile.recipe import Term, Value, parse_term
from kvcompile.registry import plugins

FAR = 2**30  # tokens, more than any prompt has


class Scorer(Protocol):
    """How much a token matters. `needs` names what it reads beside q, K and V: "weight" (of the
    linear after attention), "angles" (rotary), "ids" (of tokens) or "probe" (the prompt a second
    time). Attributes that it may have: `sinks` first and `window` newest tokens of a prompt it
    always scores as infinite, and at most `rest` more of the newest; a true `asks`, if the window
    is a prompt's question where its length is known; a true `weighs`, if scores are weights of
    attention, 0 or more; `waits`, why it must see a prompt at once. It may have, as a budget may,
    `unfit(heads, dim)`: why it is not for a layer of so many kv heads with keys of `dim` channels.

    One that scores the tokens that follow a prompt has `arrive(keys, positions, ids)`, or
    `observe` where scores change with what each step attends to; an attribute `looks` says of how
    many of several queries, the last ones, the weights are added up first (0: of all), and without
    it they cannot come together; with a true `low` it is not weights that are, but how often a
    token got less than its share. With `final(score, held)` a head's tokens are scored when some
    have to leave: score [T] of all that it holds, in order (`Held`); with `settle(score, held)`
    they then get other scores for good (the same tensor: none does). Where tokens are put
    in order and none leaves (`salient`), `averaged(score, mass, seen, queries)` is told of how many
    queries each token has been seen, and of how many in this call. `cpp`, if there is
    one, is the same in C++: a token's score of `position` where it arrives, or of `score`, `mass`,
    `fresh` (it is the step's own) and `held` (how many tokens got some of the mass, a float), for
    the kernel of kvc.evict.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]

    def prompt(self, x: Prompt) -> Tensor:
        """[H, T] in fp32; infinite where a token must stay."""
        ...


class Budget(Protocol):
    """How many tokens each head keeps. `across`: decided over all layers of the rule at once. With
    `told(tokens)`, which is the same budget for a prompt of so many, the limit while decoding does
    not depend on what the prompt is. With `least(tokens)`, what the head that keeps least keeps,
    that is what always stays has to fit."""

    name: ClassVar[str]
    across: ClassVar[bool]

    def measure(self, x: Prompt) -> float | Tensor:
        """What the layer's attention says of it; handed to `counts`. Or of its heads, [H]; handed
        to `limit`, for what each remembers while decoding."""
        ...

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        """Tokens that each head of these layers keeps, from their scores [H, T]."""
        ...

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        """At most how many tokens a head keeps of so many, and all heads of a layer together (of
        budgets that span layers: on average)."""
        ...


class Merge(Protocol):
    """What becomes of the tokens that are not kept. With a true attribute `apart` they are one
    slot more of their head, which stands for so many tokens, and `into` is not called."""

    name: ClassVar[str]

    def into(self, k: Tensor, v: Tensor, scores: Tensor, kept: Sequence[Tensor]
             ) -> tuple[Tensor, Tensor]:
        """K [H, T, Dk] and V [H, T, Dv], changed where a token is kept: `kept[head]` are numbers,
        ascending."""
        ...


class Channels(Protocol):
    """Which channels of K a head stores of a prompt, but of the newest `recent` tokens all."""

    name: ClassVar[str]
    recent: int

    def prompt(self, x: Prompt) -> Tensor:
        """bool [H, Dk]."""
        ...


class Around:
    """Mixin of scorers around a scorer: they need what `of` needs, and its window stays."""

    of: Term
    also: ClassVar[tuple[str, ...]] = ()

    @property
    def base(self) -> Any:
        return named("scorer", self.of)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.base.needs, *self.also)

    @property
    def sinks(self) -> int:
        return getattr(self.base, "sinks", 0)

    @property
    def window(self) -> int:
        return getattr(self.base, "window", 0)

    @property
    def asks(self) -> bool:
        return getattr(self.base, "asks", False)

    def unfit(self, heads: int, dim: int) -> str:
        check = getattr(self.base, "unfit", None)
        return check(heads, dim) if check else ""


@dataclass(frozen=True)
class Rule:
    """The rule of one layer.

    sinks      first tokens that are never dropped
    recent     newest tokens that are never dropped: a number, or a share (float) of the budget
    every      while decoding, tokens are dropped when a head holds this many more than its budget;
               0: never, what follows the prompt is all kept
    merge      what becomes of the others; None: they are dropped
    positions  original, or rerotated: kept keys are turned to lie side by side before the prompt's
               end
    channels   of K that are stored; None: all of them
    salient    of every 128 tokens, so many, by score, are stored first, where the format takes more
               bits for them (`kernels/mixed.py`); nothing is dropped. 0: tokens stay in order
    """

    score: Term = Term("recency")
    budget: Term = Term("uniform")
    sinks: int = 0
    recent: int | float = 0
    every: int = 0
    merge: Term | None = None
    positions: str = "original"
    channels: Term | None = None
    salient: int = 0
    layer: int = 0
    layers: int = 1

    @staticmethod
    @cache
    def parse(text: str) -> Rule:
        """The rule that `text` spells; `Rule.parse(str(r)) == r`."""
        given: dict[str, Any] = dict(parse_term(text).args)
        for name in ("score", "budget", "merge", "channels"):
            if isinstance(given.get(name), str):
                given[name] = Term(given[name])
        return Rule(**given)

    def __str__(self) -> str:
        args: list[tuple[str, Value]] = [
            (f.name, getattr(self, f.name)) for f in fields(self)
            if f.name in ("score", "budget") or getattr(self, f.name) != f.default]
        return str(Term("rule", tuple(args)))

    @cached_property
    def scorer(self) -> Any:
        return named("scorer", self.score)

    @cached_property
    def budgeter(self) -> Any:
        return named("budget", self.budget)

    @cached_property
    def merger(self) -> Any:
        return None if self.merge is None else named("merge", self.merge)

    @cached_property
    def pruner(self) -> Any:
        return None if self.channels is None else named("channel", self.channels)

    @property
    def apart(self) -> bool:
        """Whether dropped tokens are one slot more."""
        return bool(getattr(self.merger, "apart", False))

    @property
    def needs(self) -> set[str]:
        """What is read beside q, K and V."""
        turned = {"angles"} if self.positions != "original" else set()
        return {*self.scorer.needs, *turned}

    @property
    def whole(self) -> str:
        """Why a prompt must be seen at once; ``""`` where it may come in pieces, after each of
        which heads go back to their budgets."""
        if not self.every:
            return getattr(self.scorer, "waits", "chooses once, among all of a prompt's tokens, "
                           "which it must see at once")
        if self.observes and not hasattr(self.scorer, "looks"):
            return f"{self.score.name} looks from single queries, not from several at once"
        if not hasattr(self.budgeter, "told"):
            return f"its budget, {self.budget}, is not known before a prompt's end"
        return ""

    @property
    def observes(self) -> bool:
        """Whether scores change with what each step attends to."""
        how = ("observe", "averaged") if self.salient else ("observe",)
        return self.every > 0 and any(hasattr(self.scorer, name) for name in how)

    def protected(self, budget: int) -> int:
        """Newest tokens that stay where a head keeps `budget`."""
        return int(self.recent * budget) if isinstance(self.recent, float) else self.recent

    @property
    def asks(self) -> bool:
        """Whether scores look from a prompt's question, where its length is known."""
        return bool(getattr(self.scorer, "asks", False))

    def stays(self, budget: int, question: int = 0) -> tuple[int, int]:
        """First and newest tokens of a prompt that always stay where a head keeps `budget`; of
        the prompt the last `question` tokens are its question, if that is not 0."""
        first, newest = (getattr(self.scorer, name, 0) for name in ("sinks", "window"))
        newest = question if question and self.asks else newest
        return max(self.sinks, first), max(self.protected(budget), newest)

    def unfit(self, heads: int, dim: int) -> str:
        """Why what was found for some layer is not for one of so many kv heads with keys of `dim`
        channels; ``""`` if all of it is."""
        every = (getattr(part, "unfit", None) for part in (self.scorer, self.budgeter))
        return next((why for check in every if check and (why := check(heads, dim))), "")

    def short(self, heads: int, tokens: int = FAR, question: int = 0) -> str:
        """Why the budget of a prompt of so many tokens cannot be kept; ``""`` if it can be. Of any
        prompt (the default) one in tokens may be short and a share of it, of which what always
        stays is the floor, is not. `question` as of `stays`."""
        budget = self.budgeter.most(tokens, heads)[1] // heads
        if hasattr(self.budgeter, "least"):
            budget = self.budgeter.least(tokens)
        first, newest = self.stays(budget, question)
        if budget >= min(tokens, first + newest):
            return ""
        less = "a shorter question" if question and self.asks else "a smaller window"
        or_ = " and ".join(["fewer sinks"] * (first > 0) + [less] * (newest > 0))
        return (f"a budget of {budget} tokens a head, but {words(first, newest)} always stay: give "
                f"at least {first + newest}, or {or_}")

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        """At most how many of `tokens` a head holds after the prompt, and a layer's heads all."""
        each, total = self.budgeter.most(tokens, heads)
        least = sum(self.stays(total // heads)) + getattr(self.scorer, "rest", 0)
        each = min(tokens, max(each, least, 1))
        return each, min(heads * each, max(total, heads * least))


def words(first: int, newest: int) -> str:
    """What stays, such as "4 first and 32 newest tokens"; ``""`` if nothing does."""
    both = [f"{n} {word}" for n, word in ((first, "first"), (newest, "newest")) if n]
    return f"{' and '.join(both)} token{'s' * (first + newest > 1)}" if both else ""


@cache
def known(kind: str) -> dict[str, Any]:
    """name -> class of what the axis `kind` (scorer, budget, merge, channel) may be."""
    found = plugins("passes", f"{kind.upper()}S", f"kvcompile.{kind}s")
    every = [c for loaded in found for c in (loaded if isinstance(loaded, tuple) else (loaded,))]
    return {c.name: c for c in every}


@cache
def named(kind: str, term: Term | str) -> Any:
    """The scorer, budget, merge or choice of channels that `term` spells."""
    term, table = Term(term) if isinstance(term, str) else term, known(kind)
    if term.name not in table:
        raise RecipeError(f"unknown {kind} {term.name!r}{nearest(term.name, table)}; known: "
                          f"{', '.join(table)}")
    cls = table[term.name]
    legal = [f.name for f in fields(cls)]
    for key, _ in term.args:
        if key not in legal:
            raise RecipeError(f"unknown option {key!r} of {kind} {term.name}{nearest(key, legal)}; "
                              f"known: {', '.join(legal)}")
    return cls(**dict(term.args))


def options(kind: str, name: str) -> set[str]:
    """The options of a scorer, budget or merge; none if there is no such one."""
    table = known(kind)
    return {f.name for f in fields(table[name])} if name in table else set()
