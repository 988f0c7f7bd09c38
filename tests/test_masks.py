"""What masks computed in a graph are taken for, and why others are refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from kvcompile.concrete import Inputs, Miss
from kvcompile.masks import LARGE, Mask, Masks, Term

Make = Callable[[Tensor, Tensor, Tensor], Tensor]  # (ids, positions, padding) [B, S] -> mask


class Table(nn.Module):
    """A module that makes a mask, with buffers that a mask may read."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        super().__init__()
        self.make = make
        self.weight = nn.Parameter(torch.zeros(4))
        at = torch.arange(64)
        self.register_buffer("causal", (at <= at[:, None])[None, None])
        self.register_buffer("local", (at <= at[:, None]) & (at > at[:, None] - 50))

    def forward(self, ids: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        return self.make(self, ids, positions, padding)


def found(make: Callable[..., Tensor], how: str = "add", **options: bool) -> Mask | str:
    """The mask, or the reason and the node's op for a refusal."""
    size = torch.export.Dim.DYNAMIC(min=1)
    example = (torch.full((2, 16), 3), torch.arange(16).expand(2, -1).contiguous(),
               torch.ones(2, 16, dtype=torch.long))
    program = torch.export.export(Table(make), example, dynamic_shapes=({0: size, 1: size},) * 3,
                                  strict=False)
    gm = program.module(check_guards=False)
    holders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    mask = gm.graph.output_node().args[0][0]
    rank = max(4, mask.meta["val"].dim())
    try:
        return Masks(gm, Inputs(*holders)).classify(
            mask, [Term(mask, how, rank=rank)], **options)  # type: ignore[arg-type]
    except Miss as miss:
        assert isinstance(miss.node, Node)
        return f"{miss.node.target}: {miss.reason}"


def is_mask(mask: Mask | str, window: int = 0, padding: bool = False) -> None:
    assert isinstance(mask, Mask), mask
    assert mask.window == window
    assert (mask.padding is not None) == padding
    if mask.padding is not None:
        assert mask.padding.name == "padding"


def tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of queries [S, 1] and of tokens [1, S]."""
    at = torch.arange(x.shape[1])
    return at[:, None], at[None]


def tril(t: Table, ids: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1]).tril().bool()


def additive(seen: Tensor, fill: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, fill)


SEEN: dict[str, tuple[Callable[..., Tensor], int, bool]] = {
    "tril": (tril, 0, False),
    "le": (lambda t, i, p, m: tokens(i)[1] <= tokens(i)[0], 0, False),
    "buffer": (lambda t, i, p, m: t.causal[:, :, : i.shape[1], : i.shape[1]], 0, False),
    "positions": (lambda t, i, p, m: (p[:, None] <= p[:, :, None])[:, None], 0, False),
    "padding": (lambda t, i, p, m: tril(t, i, p, m) & m[:, None, None].bool(), 0, True),
    "padding of queries too": (
        lambda t, i, p, m: tril(t, i, p, m) & (m[:, None, None] * m[:, None, :, None]).bool(),
        0, True),
    "shape of a weight": (
        lambda t, i, p, m: tril(t, i, p, m) | torch.zeros_like(t.weight[:1]).bool(), 0, False),
    "ones like ids": (lambda t, i, p, m: tril(t, i, p, m) & torch.ones_like(i)[:, None, None].bool(),
                      0, False),
    "window": (lambda t, i, p, m: tril(t, i, p, m) & (tokens(i)[1] > tokens(i)[0] - 8), 8, False),
    "window by triu": (lambda t, i, p, m: tril(t, i, p, m).triu(-8), 9, False),
    "window of positions": (
        lambda t, i, p, m: ((p[:, None] <= p[:, :, None]) & (p[:, :, None] - p[:, None] < 5)
                            & m[:, None].bool())[:, None], 5, True),
    "window and padding": (
        lambda t, i, p, m: tril(t, i, p, m) & (tokens(i)[1] > tokens(i)[0] - 8)
        & m[:, None, None].bool(), 8, True),
    "window beyond small counts": (
        lambda t, i, p, m: tril(t, i, p, m) & (tokens(i)[0] - tokens(i)[1] < 200), 200, False),
    "window in a buffer": (lambda t, i, p, m: t.local[: i.shape[1], : i.shape[1]], 50, False),
    "window of one": (lambda t, i, p, m: tokens(i)[0] == tokens(i)[1], 1, False),
}


@pytest.mark.parametrize("name", SEEN)
def test_masks_are_known_in_every_form(name: str) -> None:
    make, window, padding = SEEN[name]
    is_mask(found(make, "see"), window, padding)
    if name in ("tril", "window and padding"):
        is_mask(found(lambda *a: ~make(*a), "hide"), window, padding)
        for fill in (-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4):
            is_mask(found(lambda *a, fill=fill: additive(make(*a), fill)), window, padding)


def test_a_window_of_thousands_is_measured() -> None:
    is_mask(found(lambda t, i, p, m: tril(t, i, p, m) & (tokens(i)[1] > tokens(i)[0] - 2047),
                  "see"), 2047)


def alibi(t: Table, ids: Tensor, *_: Tensor) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, 5)
    query, token = tokens(ids)
    return additive(token <= query) + slopes[:, None, None] * (token - query)


REFUSED: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "all seen": (lambda t, i, p, m: torch.zeros(i.shape[1], i.shape[1]), "add",
                 "aten.zeros.default: lets query 0 of 5 see the later token 1: not causal"),
    "padding alone": (lambda t, i, p, m: m[:, None, None].bool(), "see",
                      "aten.to.dtype: lets query 0 of 5 see the later token 1: not causal"),
    "prefix": (lambda t, i, p, m: (tokens(i)[1] <= tokens(i)[0]) | (tokens(i)[1] < 3), "see",
               "aten.__or__.Tensor: lets query 0 of 5 see the later token 1: not causal"),
    "prefix of 30": (
        lambda t, i, p, m: (tokens(i)[1] <= tokens(i)[0]) | (tokens(i)[1] == 30), "see",
        "aten.__or__.Tensor: lets query 0 of 40 see the later token 30: not causal"),
    "strictly causal": (
        lambda t, i, p, m: tokens(i)[1] < tokens(i)[0], "see",
        "aten.lt.Tensor: hides token 1 from query 1 of 5: neither a causal mask nor a window of 39"),
    "chunks": (lambda t, i, p, m: (tokens(i)[1] <= tokens(i)[0])
               & (tokens(i)[1] // 16 == tokens(i)[0] // 16), "see",
               "aten.__and__.Tensor: hides token 9 from query 16 of 17: neither a causal mask nor a "
               "window of 8"),
    "chunks of 4096": (lambda t, i, p, m: (tokens(i)[1] <= tokens(i)[0])
                       & (tokens(i)[1] // 4096 == tokens(i)[0] // 4096), "see",
                       "aten.__and__.Tensor: lets query 5 of 17 see token 0, outside a window of 5"),
    "dilated": (lambda t, i, p, m: (tokens(i)[1] <= tokens(i)[0])
                & ((tokens(i)[0] - tokens(i)[1]) % 2 == 0), "see",
                "aten.__and__.Tensor: hides token 0 from query 1 of 5: neither a causal mask nor a "
                "window of 20"),
    "alibi": (alibi, "add", "aten.add.Tensor: adds -0.5 for query 1 of 5 and token 0: a bias, not a "
              "mask"),
    "weak": (lambda t, i, p, m: additive(tril(t, i, p, m), -100.0), "add",
             "aten.masked_fill.Scalar: adds -100 for query 0 of 5 and token 1: a bias, not a mask"),
    "weight": (lambda t, i, p, m: additive(tril(t, i, p, m)) + t.weight[:1], "add",
               "weight: depends on the weight 'weight'"),
    "ids": (lambda t, i, p, m: tril(t, i, p, m) & (i[:, None, None] != 0), "see",
            "aten.__and__.Tensor: depends on the values of 'ids'"),
    "padding inverted": (
        lambda t, i, p, m: tril(t, i, p, m) & (m[:, None, None] == 0), "see",
        "aten.__and__.Tensor: hides token 0 from query 0 of 5: neither a causal mask nor a window "
        "of 0"),
    "first token always": (
        lambda t, i, p, m: tril(t, i, p, m)
        & ((tokens(i)[1] > tokens(i)[0] - 8) | (tokens(i)[1] == 0)), "see",
        "aten.__and__.Tensor: lets query 9 of 17 see token 0, outside a window of 9"),
    "far": (lambda t, i, p, m: tril(t, i, p, m) & (tokens(i)[1] > tokens(i)[0] - 100_000), "see",
            f"aten.sub.Tensor: counts 100000 tokens: masks are judged on up to {LARGE}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_are_refused(name: str) -> None:
    make, how, reason = REFUSED[name]
    assert found(make, how) == reason


def test_is_causal_and_a_padding_mask() -> None:
    is_mask(found(lambda t, i, p, m: m[:, None, None].bool(), "see", causal=True), 0, True)
    is_mask(found(lambda t, i, p, m: additive(tokens(i)[1] > tokens(i)[0] - 8), causal=True), 8)


def test_terms_act_together() -> None:
    """Neither mask alone is causal with padding; the two are."""
    size = torch.export.Dim.DYNAMIC(min=1)

    class Two(nn.Module):
        def forward(self, ids: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
            return (torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(),
                    (1.0 - padding[:, None, None]) * -1e4)

    example = torch.full((2, 16), 3), torch.ones(2, 16)
    gm = torch.export.export(Two(), example, dynamic_shapes=({0: size, 1: size},) * 2,
                             strict=False).module(check_guards=False)
    ids, padding = (n for n in gm.graph.nodes if n.op == "placeholder")
    hide, add = gm.graph.output_node().args[0]
    masks = Masks(gm, Inputs(ids, padding=padding))
    is_mask(masks.classify(add, [Term(hide, "hide"), Term(add, "add")]), 0, True)
    is_mask(masks.classify(add, [Term(hide, "hide")]))
    with pytest.raises(Miss, match=re.escape("lets query 0 of 5 see the later token 1")) as miss:
        masks.classify(add, [Term(add, "add")])
    assert miss.value.node is add
