"""How one layer's K and V are stored: tiers of formats over pages, in closed form of the count.

The tokens that a (batch, kv head) has been given are numbered 0, 1, 2, ... in order of arrival,
padding left out. The first `sinks` of them stay for ever in the model's dtype. The others form a
queue: they enter the **recent** tier in full precision, leave it for the **body** tier in blocks
of `block` tokens once `lag` newer ones have followed, are encoded exactly once on that occasion,
and are dropped from the far end when `window` newer ones have followed (0: never). Where every
token is in which tier is therefore a function of the count alone (`Store.spans`).

K and V have their own format, block and lag (KIVI: K leaves in blocks of 128, V token by token).
A tier is a pool of pages of 128 tokens of one kv head, and an int32 page table
[layers, batch, kv heads, pages]: layers that are stored alike share it. A tier that is bounded is a
ring over its pages.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import lcm
from typing import Any, NamedTuple

import torch

from kvcompile import constants
from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, Format, format_of, step_bytes, term_of
from kvcompile.format import Side as SideName
from kvcompile.recipe import Term, parse_term

DENSE = Term("dense")
SLOTS = "slots"  # beside K and V: what is known of the token in each place
SIDES: tuple[SideName, ...] = ("k", "v")
AXES = (*(f"{axis}.{side}" for side in SIDES for axis in ("format", "block", "lag")), "sinks",
        "window")  # what `Store.of` reads


class Span(NamedTuple):
    """Token numbers [start, end) that a tier holds."""

    start: int
    end: int


class Plane(NamedTuple):
    """One tensor of a store: `shape` of a page for pools; tables and the count have none. Of what
    has no pages each (layer, row, head) has `each` numbers, one if there is no such number."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    each: int = 0


@dataclass(frozen=True)
class Side:
    """How K (or V) is stored: body format, tokens that move together, newest tokens left out."""

    format: Format
    block: int = 1
    lag: int = 0

    def __post_init__(self) -> None:
        if self.block < 1 or self.block % self.format.step:
            raise RecipeError(f"block={self.block}: must be a multiple of {self.format.step}, "
                              f"the tokens that {term_of(self.format)} encodes together")
        if self.lag < 0:
            raise RecipeError(f"lag={self.lag}: must not be negative")

    @property
    def delayed(self) -> bool:
        """Whether tokens wait in the recent tier before they enter the body."""
        return self.block + self.lag > 1


@dataclass(frozen=True)
class Store:
    """The storage of one layer. Its text is a term: `store(k=int(bits=4), k_block=128, ...)`.

    `members` layers may share a store: formats are then given their channels side by side.
    `v_in_k`: V is the first channels of K, as in multi-head latent attention, and has no planes.
    `slots`: what is known of every token is stored, too; `rest`: one more slot of every head stands
    for all that it has dropped. `side_by_side`: keys that are turned at read are given the
    positions right before the call's own, as if nothing stood between those that are kept.
    `lent`: tiers, such as `k.body`, whose pages are another slot's: read, and never written.
    """

    k: Side
    v: Side
    sinks: int = 0
    window: int = 0
    members: int = 1
    v_in_k: bool = False
    slots: bool = False
    rest: bool = False
    side_by_side: bool = False
    lent: tuple[str, ...] = ()

    @staticmethod
    @cache
    def parse(text: str) -> "Store":
        """The store that `text` spells; what is left out is dense, undelayed and unbounded."""
        term = parse_term(text)
        axes = {f"{axis}.{s}": term.get(name) for s in SIDES
                for axis, name in (("format", s), ("block", f"{s}_block"), ("lag", f"{s}_lag"))}
        axes |= {name: term.get(name) for name in ("sinks", "window", "v_in_k")}
        store = Store.of({a: v for a, v in axes.items() if v is not None})
        return replace(store, members=term.get("members", 1),  # type: ignore[arg-type]
                       slots=bool(term.get("slots")), rest=bool(term.get("rest")),
                       side_by_side=bool(term.get("side_by_side")),
                       lent=tuple(str(x).replace("_", ".") for x in term.get("lent", ())))  # type: ignore[union-attr]

    @staticmethod
    def of(axes: Mapping[str, object], own: int = 0) -> "Store":
        """The store for a layer's axes: format.k, block.k, lag.k, the same of v, sinks, window.

        With `v_in_k` those of v are not read.

        A layer whose own attention window is `own` sees own - 1 earlier tokens, so no more are
        kept: that is exact. There a recipe's sinks would be out of sight; its budget is spent on
        recent tokens.
        """
        def side(s: str) -> Side:
            fmt = _format(axes.get(f"format.{s}", DENSE))
            block = axes.get(f"block.{s}", fmt.step)
            return Side(fmt, block, axes.get(f"lag.{s}", 0))  # type: ignore[arg-type]

        sinks, window = (int(axes.get(a, 0)) for a in ("sinks", "window"))  # type: ignore[call-overload]
        if own:
            window = min(max(own - 1, 1), sinks + window if window else own)
            sinks = 0
        inside = bool(axes.get("v_in_k", False))
        return Store(side("k"), side("k" if inside else "v"), sinks, window, v_in_k=inside)

    def __str__(self) -> str:
        args: list[tuple[str, object]] = []
        for name in self.sides:
            side = self.side(name)
            if term_of(side.format) != DENSE:
                args.append((name, term_of(side.format)))
            if side.block != 1:
                args.append((f"{name}_block", side.block))
            if side.lag:
                args.append((f"{name}_lag", side.lag))
        args += [(n, getattr(self, n)) for n in ("sinks", "window", "v_in_k") if getattr(self, n)]
        if self.members > 1:
            args.append(("members", self.members))
        args += [(n, True) for n in ("slots", "rest", "side_by_side") if getattr(self, n)]
        if self.lent:  # names hold no dots
            args.append(("lent", tuple(key.replace(".", "_") for key in self.lent)))
        return str(Term("store", tuple(args)))  # type: ignore[arg-type]

    def side(self, name: str) -> Side:
        return self.k if name == "k" else self.v

    def with_v_in_k(self) -> "Store":
        """The same, V being the first channels of K."""
        return replace(self, v=self.k, v_in_k=True)

    @cached_property
    def common(self) -> "Store":
        """What the store has in common with others that differ in `numbers` alone."""
        return self._apart[0]

    @cached_property
    def numbers_apart(self) -> tuple[float, ...]:
        """What its formats have layer by layer, in the order in which `common` names them."""
        return self._apart[1]

    @cached_property
    def _apart(self) -> tuple["Store", tuple[float, ...]]:
        found: list[float] = []
        k, v = (replace(side, format=constants.take(side.format, found))
                for side in (self.k, self.v))
        v = k if self.v_in_k else v
        return replace(self, k=k, v=v), tuple(found)

    @cached_property
    def constants(self) -> int:
        """How many numbers a layer's row of the plane `constants` has."""
        return max(constants.many(self.side(side).format) for side in self.sides)

    @property
    def sides(self) -> tuple[SideName, ...]:
        """What has planes of its own."""
        return SIDES[:1] if self.v_in_k else SIDES

    @property
    def exact(self) -> bool:
        """Whether every token is kept as it is."""
        return self.plain and not self.window

    @property
    def plain(self) -> bool:
        """Whether tokens are kept as they are until the window drops them."""
        return replace(self, window=0, v_in_k=False) == Store.parse("store")

    @cached_property
    def grain(self) -> int:
        """Tokens that are dropped together: whole steps of both formats."""
        return lcm(self.k.format.step, self.v.format.step)

    def first(self, count: int) -> int:
        """The oldest number after the sinks that is kept once `count` tokens have arrived."""
        if not self.window:
            return 0
        return max(0, count - self.sinks - self.window) // self.grain * self.grain

    def spans(self, name: str, count: int) -> dict[str, Span]:
        """tier -> token numbers, after `count` tokens; body and recent count from the sinks on."""
        side, queued = self.side(name), max(0, count - self.sinks)
        first = self.first(count)
        end = max(0, queued - side.lag) // side.block * side.block
        return {
            "sinks": Span(0, min(count, self.sinks)),
            "body": Span(min(first, end), end),
            "recent": Span(max(first, end), queued),
        }

    def stored(self, count: int) -> int:
        """How many of `count` tokens are kept."""
        return min(count, self.sinks) + max(0, count - self.sinks) - self.first(count)

    def numbers(self, count: int) -> list[int]:
        """The numbers of the kept tokens, oldest first."""
        sinks = min(count, self.sinks)
        return [*range(sinks), *range(self.sinks + self.first(count), count)]

    def turned_by(self, count: int) -> list[int]:
        """The numbers whose positions the kept tokens' keys are given, if they are turned at read.
        """
        kept = self.numbers(count)
        return [*range(count - len(kept), count)] if self.side_by_side else kept

    def format(self, name: str, tier: str) -> Format:
        return self.side(name).format if tier == "body" else format_of(DENSE)

    def tiers(self, name: str) -> tuple[str, ...]:
        """The tiers of K or of V that can hold tokens."""
        if name not in self.sides:
            return ()
        tiers = ["sinks"] if self.sinks else []
        if self.ring(name, "body") != 0:
            tiers.append("body")
        return (*tiers, "recent") if self.side(name).delayed else tuple(tiers)

    def written(self, name: str) -> tuple[str, ...]:
        """The tiers of K or of V that have pages of their own."""
        return tuple(tier for tier in self.tiers(name) if f"{name}.{tier}" not in self.lent)

    def ring(self, name: str, tier: str) -> int | None:
        """Tokens that the tier's pages hold at most, in whole pages; None: unbounded."""
        if name == SLOTS:
            return None
        side = self.side(name)
        if tier == "sinks":
            return _pages(self.sinks) * PAGE
        live = self.window + self.grain - 1 if self.window else None
        if tier == "recent":
            most = side.lag + side.block - 1
            return _pages(most if live is None else min(most, live)) * PAGE
        return None if live is None else _pages(live - side.lag) * PAGE

    def pages(self, name: str, tier: str, count: int) -> int:
        """Pages that the tier takes in one (batch, kv head) once `count` tokens have arrived."""
        if name == SLOTS:
            return _pages(count)
        pages = _pages(self.spans(name, count)[tier].end)
        ring = self.ring(name, tier)
        return pages if ring is None else min(pages, ring // PAGE)

    @cache  # noqa: B019 (stores are few and small)
    def planes(self, dims: tuple[int, int], dtype: torch.dtype) -> tuple[Plane, ...]:
        """The tensors of the store in order, for head dimensions (Dk, Dv) of a layer.

        `count` is int32 [layers, batch, kv heads]; for each tier a `table`, int32 [layers, batch,
        kv heads, pages], and the format's planes, pools [pages, PAGE // step, *shape]. Where
        formats have numbers of each layer there are `constants`, fp32 [layers, batch, kv heads,
        n], the same for all rows and heads. With `slots` there follow, paged alike, the position
        id and the score of every token, by its number, and the number of tokens that a head may
        hold, `limit`; with `rest` the mean K and V, in fp32, of the tokens that a head has dropped,
        and their number.
        """
        planes = [Plane("count", torch.int32, ())]
        for name, dim in zip(SIDES, dims, strict=True):
            for tier in self.tiers(name):
                fmt = self.format(name, tier)
                planes.append(Plane(f"{name}.{tier}.table", torch.int32, ()))
                for plane, spec in fmt.planes(dim * self.members, dtype, name).items():
                    planes.append(
                        Plane(f"{name}.{tier}.{plane}", spec.dtype, spec.page(fmt.step)))
        if self.constants:
            planes.append(Plane("constants", torch.float32, (), self.constants))
        if self.slots:
            planes += [Plane("slots.all.table", torch.int32, ()),
                       Plane("slots.all.position", torch.int32, (PAGE,)),
                       Plane("slots.all.score", torch.float32, (PAGE,)),
                       Plane("limit", torch.int32, ())]
        if self.rest:
            planes += [*(Plane(f"rest_{name}", torch.float32, (), dim)
                         for name, dim in zip(SIDES, dims, strict=True)),
                       Plane("rest_count", torch.int32, ())]
        return tuple(planes)

    def nbytes(self, dims: tuple[int, int], dtype: torch.dtype, heads: int, counts: list[int],
               reserve: int = 0) -> int:
        """Bytes of pages and tables that the members take in a cache for rows of these counts.

        `reserve` is a count that every row has pages for in advance (`max_length`).
        """
        most = [max(n, reserve) for n in counts]
        return sum(self.pieces(dims, dtype, heads, len(counts), lambda side, tier: (
            heads * sum(self.pages(side, tier, n) for n in most),
            max((self.pages(side, tier, n) for n in most), default=0))))

    def at_most(self, dims: tuple[int, int], dtype: torch.dtype, heads: int, each: int, total: int,
                widest: int) -> int:
        """Bytes that a row of a layer takes at most whose heads hold `each` tokens at most, and
        `total` together; `widest` tokens are in the fullest head of the layers that share planes.
        """
        def pages(side: str, tier: str) -> tuple[int, int]:
            full = heads * self.pages(side, tier, each)
            return min(full, total // PAGE + heads), self.pages(side, tier, widest)

        return sum(self.pieces(dims, dtype, heads, 1, pages))

    def pieces(self, dims: tuple[int, int], dtype: torch.dtype, heads: int, rows: int,
               pages: Callable[[str, str], tuple[int, int]]) -> Iterator[int]:
        """Bytes of a layer's planes, where pages(side, tier) gives the tier's pages of all heads,
        and those of the fullest."""
        rest = self.rest * (1 + sum(dims))
        yield 4 * heads * rows * (1 + self.constants + self.slots + rest)
        bits = {SLOTS: 8 * PAGE}
        for name, dim in zip(SIDES, dims, strict=True):
            for tier in self.tiers(name):
                fmt = self.format(name, tier)
                bits[f"{name}.{tier}"] = PAGE // fmt.step * step_bytes(
                    fmt, dim * self.members, dtype, name)
        for key, size in bits.items():
            if key == SLOTS and not self.slots:
                continue
            every, most = pages(*(key.split(".") if key != SLOTS else (SLOTS, "all")))
            every = 0 if key in self.lent else every
            yield every * size + 4 * heads * rows * most

    def places(self, dims: tuple[int, int], dtype: torch.dtype, sizes: Sequence[Sequence[Any]]
               ) -> Any:
        """Token numbers that fit into K's pages, for planes of these sizes; none is dropped."""
        if self.window:
            raise RecipeError(f"{self}: attention mass is told by token number, of which a window "
                              "keeps only the last")
        return PAGE * sum(size[3] for spec, size in
                          zip(self.planes(dims, dtype), sizes, strict=True)
                          if spec.name.startswith("k.") and spec.name.endswith(".table"))

    def limit(self, name: str, dtype: torch.dtype) -> float:
        """The largest magnitude that K (or V) may have."""
        formats = (self.format(name, tier) for tier in self.tiers(name))
        return min((f.limit(dtype) for f in formats), default=torch.finfo(dtype).max)


def _pages(tokens: int) -> int:
    return max(0, -(-tokens // PAGE))


def _format(value: object) -> Format:
    return format_of(value if isinstance(value, Term) else parse_term(str(value)))
