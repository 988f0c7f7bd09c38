"""Tiers by score: which tokens are salient, what each tier loses, and what cannot be combined.

`Head` states ZipCache (arXiv:2405.14256) for one kv head as lists of tokens, in fp64.
"""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from support import greedy, optimized, plain, prompt
from torch import Tensor

import kvcompile
from kvcompile.checks.audit import Run, audit
from kvcompile.checks.tapped import read
from kvcompile.checks.view import slots
from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.rule import named

BLOCK = 128


@dataclass
class Token:
    id: int
    k: Tensor
    v: Tensor
    got: float = 0.0        # weight, summed over the queries that looked
    looked: int = 0         # how many of them saw it


@dataclass
class Head:
    salient: int
    blocks: list[tuple[list[Token], list[Token]]] = field(default_factory=list)
    waiting: list[Token] = field(default_factory=list)

    def call(self, q: Tensor, new: list[Token], seen: Tensor, scale: float, looking: list[int]
             ) -> None:
        """Queries q [G, S, D] see `seen` [N, D], stored keys, and those of their own call."""
        keys = torch.cat([seen, *(t.k[None] for t in new)])
        for i in looking:
            logits = q[:, i] @ keys[: len(seen) + i + 1].T * scale
            weights = logits.softmax(-1).mean(0).tolist()
            tokens = [*self.waiting, *new[: i + 1]]
            for token, weight in zip(tokens, weights[len(weights) - len(tokens):], strict=True):
                token.got, token.looked = token.got + weight, token.looked + 1
        tokens = self.waiting + new
        full = len(tokens) // BLOCK * BLOCK
        best = sorted(tokens[:full], key=lambda t: -t.got / t.looked)
        chosen = {t.id for t in best[: full // BLOCK * self.salient]}
        both = [[t for t in tokens[:full] if (t.id in chosen) == own] for own in (True, False)]
        for b in range(full // BLOCK):
            self.blocks.append(tuple(x[b * n : (b + 1) * n] for x, n in  # type: ignore[arg-type]
                                     zip(both, (self.salient, BLOCK - self.salient), strict=True)))
        self.waiting = tokens[full:]

    def ids(self) -> list[int]:
        return [t.id for block in (*(h + l for h, l in self.blocks), self.waiting) for t in block]


def steps(x: Tensor, bits: int, dim: int) -> Tensor:
    """The distance of neighbouring codes, a group along `dim`."""
    return (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)).expand_as(x) / (2**bits - 1)


def within(got: Tensor, want: Tensor, step: Tensor) -> None:
    assert ((got - want).abs() <= 0.502 * step + 2e-3 * want.abs().max()).all()


def check(head: Head, ids: Tensor, k: Tensor, v: Tensor, bits: tuple[int, int]) -> None:
    """What the cache holds of a head is what the lists say."""
    assert ids.tolist() == head.ids()
    at = 0
    for block in head.blocks:
        every = torch.stack([t.v for part in block for t in part])
        c = every.abs().amax(0).sqrt()
        for tokens, b in zip(block, bits, strict=True):
            end = at + len(tokens)
            keys, values = (torch.stack([getattr(t, s) for t in tokens]) for s in "kv")
            within(k[at:end], keys, steps(keys, b, 0))
            within(v[at:end], values, steps(values / c, b, 1) * c)
            for x in k[at:end].T:
                assert len(x.unique()) <= 2**b
            at = end
    for i, token in enumerate(head.waiting, at):
        assert torch.equal(k[i].double(), token.k) and torch.equal(v[i].double(), token.v)


@pytest.mark.parametrize("recipe, cut, calls", [
    ("zipcache", 64, (300, *[1] * 90)),
    ("zipcache(bits=8, low=4, salient=0.25)", 32, (100, 60, 300, 1))], ids=["steps", "turns"])
def test_it_is_zipcache(recipe, cut, calls):
    """A prompt, later turns and steps, rows of unequal length: the same tokens in each tier."""
    program = optimized("llama:2", recipe).kvcompile.program
    bits = (8, 4) if "bits=8" in recipe else (4, 2)
    run, total = Run(program, compile=False), sum(calls)
    ids = prompt(total, 2)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :37] = False
    positions = (valid.cumsum(1) - 1).clamp_min(0)
    heads, start = {}, 0
    for tokens in calls:
        at, before = slice(start, start + tokens), copy.deepcopy(run.cache)
        run.call(ids[:, at], positions[:, at], valid[:, at])
        layers = read(run.engine.taps, run.names["extend" if start else "prefill"], run.nodes)
        for (layer, row) in [(i, b) for i in range(len(layers)) for b in range(2)]:
            x = layers[layer].row(row, valid[row, at])
            where = positions[row, at][valid[row, at]].tolist()
            looking = range(len(where)) if start else named("scorer", "normalized").probes(
                len(where)).tolist()
            held = slots(before, layer, row) if start else (None, x.k[:, :0], None)
            for h in range(x.k.shape[0]):
                head = heads.setdefault((layer, row, h), Head(cut))
                new = [Token(i, x.k[h, n].double(), x.v[h, n].double())
                       for n, i in enumerate(where)]
                group = x.q.shape[0] // x.k.shape[0]
                seen = held[1][h]
                count = len(head.ids())
                head.call(x.q[h * group : (h + 1) * group].double(), new, seen[:count].double(),
                          x.how.scale, looking)
        start += tokens
    for (layer, row, h), head in heads.items():
        held, k, v = slots(run.cache, layer, row)
        count = len(head.ids())
        assert head.blocks and count == int(valid[row].sum())
        check(head, held[h, :count], k[h, :count].double(), v[h, :count].double(), bits)
