"""What an attention mask computed in a graph is: causal, with a window, with key padding, or else.

The mask's own nodes run on real tensors for several token counts and paddings (`concrete.py`), and
the result is compared with the masks that `kvc.attention` knows. A graph with a fixed token count
is judged at that count. Position ids count up from 0; rows of padding queries may be anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from kvcompile.structure.concrete import (
    SYMBOLIC,
    Concrete,
    Failed,
    Inputs,
    Miss,
    ancestors,
    kind,
    value,
)

HIDDEN = -9900.0  # exp of it is 0 in every dtype; models use -1e4, -1e9, finfo.min and -inf
SMALL, LARGE = (5, 17, 40), 8192  # token counts that are tried; the most that can be
COUNTING = {"add", "sub", "rsub", "lt", "le", "gt", "ge", "eq", "ne", "div", "floor_divide",
            "remainder", "fmod", "arange", "tril", "triu", "tril_", "triu_"}


class Term(NamedTuple):
    """A tensor that takes part in masking the scores.

    `add`: factor * tensor is added; `hide` (`see`): what is true in it is hidden (seen). The scores
    [.., S, S] have `rank` dimensions, the leading ones are, flattened, batch and heads.
    """

    node: Node
    how: Literal["add", "hide", "see"]
    factor: float = 1.0
    rank: int = 4


@dataclass(frozen=True)
class Mask:
    """Causal; the last `window` tokens only (0: all); tokens whose `padding` is 0 are not seen."""

    window: int = 0
    padding: Node | None = None


class Masks:
    """The masks of one graph; what is found is remembered for all nodes that compute the same."""

    def __init__(self, gm: GraphModule, inputs: Inputs) -> None:
        self.gm, self.inputs = gm, inputs
        self._found: dict[Any, Mask | Miss] = {}
        self._computation: dict[Node, str] = {}
        self._first: dict[str, Node] = {}

    def classify(self, site: Node, terms: Sequence[Term], causal: bool = False) -> Mask:
        """What `terms` and, if `causal`, a causal mask hide from the queries of `site`.

        Raises Miss, naming the node, a query and a token, for everything that is not a `Mask`.
        """
        key = (*(t._replace(node=self._same(t.node)) for t in terms), causal)
        if key not in self._found:
            try:
                self._found[key] = self._judge(site, terms, causal)
            except Miss as miss:
                self._found[key] = miss
        found = self._found[key]
        if isinstance(found, Miss):
            raise found
        return found

    def _same(self, node: Node) -> Node:
        """The first node that computes what `node` does: the same calls on the same leaves."""
        for n in ancestors([node]):
            if n not in self._computation:
                used = map_arg((n.args, dict(n.kwargs)), self._name)
                leaf = n.name if n.op != "call_function" else ""
                self._computation[n] = f"{n.target} {used} {leaf}"
                self._first.setdefault(self._computation[n], n)
        return self._first[self._computation[node]]

    def _name(self, node: Node) -> str:
        """Of the first node that computes what `node`, a size or one that was seen, does."""
        return self._first[self._computation[node]].name if node in self._computation else node.name

    def _judge(self, site: Node, terms: Sequence[Term], causal: bool) -> Mask:
        nodes = ancestors(t.node for t in terms)
        padding = self.inputs.padding if self.inputs.padding in nodes else None
        evaluate = _Evaluation(self.gm, self.inputs, terms, causal, nodes)
        counts = evaluate.counts()
        while not evaluate.fits(counts[-1]):
            counts.pop()
        row = evaluate(counts[-1], None)[0, 0, -1] == 0
        window = 0 if bool(row.all()) else int(row.sum())
        for tokens in counts:
            for valid in _paddings(tokens) if padding else (None,):
                wrong = _difference(evaluate(tokens, valid), valid, window)
                if wrong:
                    raise self._miss(site, evaluate, wrong, tokens, valid, window, counts[-1])
        return Mask(window, padding)

    def _miss(self, site: Node, evaluate: "_Evaluation", wrong: tuple[int, ...], tokens: int,
              valid: Tensor | None, window: int, last: int) -> Miss:
        """Why the mask differs at (row, head, query, token), and by which term."""
        each = evaluate.terms_at(tokens, valid, wrong)
        guilty = next((t.node for t, x in zip(evaluate.terms, each, strict=True) if x != 0),
                      evaluate.terms[-1].node if evaluate.terms else site)
        _, _, query, token = wrong
        where = f"query {query} of {tokens}"
        bias = sum(each)
        if bias and bias > HIDDEN:
            what = f"adds {bias:.4g} for {where} and token {token}"
            return Miss(f"{what}: a bias, not a mask", guilty)
        if bias == 0 and token > query:
            return Miss(f"lets {where} see the later token {token}: not causal", guilty)
        if bias == 0 and valid is not None and not valid[token]:
            return Miss(f"lets {where} see token {token}, which is padding", guilty)
        if bias == 0:
            far = f"hides token {last - window - 1} from query {last - 1} of {last}"
            return Miss(f"{far} but lets {where} see token {token}: not a window", guilty)
        return Miss(f"hides token {token} from {where}: neither causal nor a window", guilty)


@dataclass
class _Evaluation:
    """The sum that a group of terms adds to the scores, on real tensors."""

    gm: GraphModule
    inputs: Inputs
    terms: Sequence[Term]
    causal: bool
    nodes: list[Node]  # the terms' and all that they depend on

    def __call__(self, tokens: int, valid: Tensor | None) -> Tensor:
        """[batch, heads or 1, tokens, tokens]; `valid` [tokens] is the first row's padding."""
        parts = self._parts(tokens, valid)
        total = torch.zeros(1, 1, tokens, tokens)
        if self.causal:
            total = total.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
        for part in parts:
            total = total + part
        return total

    def terms_at(self, tokens: int, valid: Tensor | None, at: tuple[int, ...]) -> list[float]:
        """What each term adds at (row, head, query, token)."""
        return [float(x[tuple(min(i, n - 1) for i, n in zip(at, x.shape, strict=True))])
                for x in self._parts(tokens, valid)]

    def _parts(self, tokens: int, valid: Tensor | None) -> list[Tensor]:
        at = Concrete(self.gm, self.inputs, tokens, batch=2 if tokens <= max(SMALL) else 1)
        rows = torch.ones(at.batch, tokens, dtype=torch.bool)
        if valid is not None:
            rows[0] = valid
        others = [n for n in self.nodes if n.op == "placeholder" and isinstance(value(n), Tensor)
                  and n not in (self.inputs.positions, self.inputs.padding)
                  and n.name not in self.inputs.values]
        wanted = [t.node for t in self.terms]
        try:
            runs = [at.evaluate(wanted, partial(self._leaf, at, rows, noise))
                    for noise in range(2 if others else 1)
                    if not any(value(n).is_floating_point() for n in others)]
        except Failed:
            raise
        except Miss as miss:
            guilty = (n for n in wanted if miss.node in ancestors([n]))
            raise Miss(miss.reason, next(guilty, miss.node)) from None
        if not runs or not all(torch.equal(*pair) for pair in zip(runs[0], runs[-1], strict=True)):
            raise Miss(f"depends on the values of '{others[0].name}'", wanted[0])
        parts = [_addend(t, x.cpu(), at.batch) for t, x in zip(self.terms, runs[0], strict=True)]
        for term, part in zip(self.terms, parts, strict=True):
            if not set(part.shape[-2:]) <= {1, tokens}:
                sizes = " x ".join(map(str, part.shape[-2:]))
                raise Failed(f"is {sizes} for {tokens} tokens", term.node)
        return parts

    def _leaf(self, at: Concrete, rows: Tensor, noise: int, node: Node) -> Tensor:
        """What the placeholder `node` holds: padding, positions, or values that mean nothing."""
        val, shape = value(node), at.shape(node)
        if node is self.inputs.padding:
            return rows.to(val.device, val.dtype)
        if node is self.inputs.positions:
            positions = (rows.long().cumsum(-1) - 1).clamp(min=0).to(val.device, val.dtype)
            return positions if shape == positions.shape else positions[-1].expand(shape)
        draw = torch.Generator().manual_seed(noise)
        return torch.randint(0, 9, shape, generator=draw).to(val.device, val.dtype)

    def counts(self) -> list[int]:
        """Token counts, ascending, at which masks that the nodes could make would differ."""
        fixed = Concrete(self.gm, self.inputs, 0).tokens
        if fixed:
            return [fixed]
        numbers = dict(_numbers(self.nodes))
        for number, node in numbers.items():
            if number > LARGE:
                raise Miss(f"counts {number} tokens: masks are judged on up to {LARGE}", node)
        edges = {n + 5 for n in numbers if n + 5 > max(SMALL)} | self._tables()
        return sorted({*SMALL, *(n for n in edges if min(SMALL) < n <= LARGE + 5)})

    def _tables(self) -> set[int]:
        """Lengths of the buffers that the mask reads."""
        buffers = [value(n) for n in self.nodes if n.op == "get_attr"
                   or n.op == "placeholder" and n.name in self.inputs.values]
        return {int(s) for b in buffers if isinstance(b, Tensor) for s in b.shape
                if not isinstance(s, SYMBOLIC)}

    def fits(self, tokens: int) -> bool:
        """Whether the buffers are long enough for so many tokens."""
        try:
            self(tokens, None)
        except Failed:
            if tokens > min(SMALL) and any(1 < n < tokens for n in self._tables()):
                return False
            raise
        return True


def _addend(term: Term, x: Tensor, batch: int) -> Tensor:
    """What the term's tensor x adds to scores [batch, heads, S, S]."""
    x = x[(None,) * (max(term.rank, 3) - x.dim())]
    if x.dim() == 3:
        x = x.unflatten(0, (batch, -1)) if x.shape[0] % batch == 0 else x[None]
    x = x.flatten(1, -3)
    if term.how == "add":
        return x.float() * term.factor
    return torch.zeros(x.shape).masked_fill(x.bool() == (term.how == "hide"), -torch.inf)


def _numbers(nodes: list[Node]) -> Iterator[tuple[int, Node]]:
    """The integers with which positions are compared, shifted or divided."""
    for node in nodes:
        if node.op == "call_function" and (kind(node) in COUNTING or not kind(node)):
            for x in (*node.args, *node.kwargs.values()):
                if isinstance(x, int | float) and not isinstance(x, bool) and x == x // 1:
                    if 1 < abs(x) < 2**31:
                        yield abs(int(x)), node


def _paddings(tokens: int) -> Iterator[Tensor]:
    """[tokens] bool: none, on the left, on the right, and with holes."""
    at = torch.arange(tokens)
    yield torch.ones(tokens, dtype=torch.bool)
    yield at >= tokens // 3
    if tokens <= max(SMALL):
        yield at < tokens - tokens // 3
        yield (at % 3 != 1)


def _difference(total: Tensor, valid: Tensor | None, window: int) -> tuple[int, ...] | None:
    """The first (row, head, query, token) where `total` is not that mask; None: it is.

    A window counts columns or, where padding lies between tokens, tokens.
    """
    tokens = total.shape[-1]
    rows = torch.ones(total.shape[0], tokens, dtype=torch.bool)
    if valid is not None:
        rows[0] = valid
    at = torch.arange(tokens, dtype=torch.int32)
    first = None
    for number in (at.expand(rows.shape), rows.cumsum(-1, dtype=torch.int32)):
        want = (at <= at[:, None]) & rows[:, None]
        if window:
            want = want & (number[:, :, None] - number[:, None] < window)
        wrong = torch.where(want[:, None], total != 0, ~(total <= HIDDEN)) & rows[:, None, :, None]
        if not bool(wrong.any()):
            return None
        first = first or tuple(wrong.nonzero()[0].tolist())
    return first
