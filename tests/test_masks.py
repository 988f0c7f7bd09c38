"""What masks computed in a graph are taken for, and why others are refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from kvcompile.structure.concrete import Inputs, Miss, kind
from kvcompile.structure.masks import LARGE, Mask, Masks, Term

Found = Callable[..., Mask | str]


class Table(nn.Module):
    """Makes every mask of this file at once, with buffers and a weight that masks may read."""

    def __init__(self, makes: dict[str, Callable[..., Tensor]]) -> None:
        super().__init__()
        self.makes = makes
        self.weight = nn.Parameter(torch.zeros(4))
        at = torch.arange(64)
        self.register_buffer("causal", (at <= at[:, None])[None, None])
        self.register_buffer("local", (at <= at[:, None]) & (at > at[:, None] - 50))

    def forward(self, ids: Tensor, positions: Tensor, padding: Tensor) -> dict[str, Tensor]:
        return {name: make(self, ids, positions, padding) for name, make in self.makes.items()}


@pytest.fixture(scope="module")
def found() -> Callable[..., Mask | str]:
    """found(name, how) -> the mask, or the op of the node and the reason of a refusal."""
    makes = {name: make for table in (SEEN, REFUSED, OTHERS) for name, (make, *_) in table.items()}
    size = torch.export.Dim.DYNAMIC(min=1)
    example = (torch.full((2, 16), 3), torch.arange(16).expand(2, -1).contiguous(),
               torch.ones(2, 16, dtype=torch.long))
    program = torch.export.export(Table(makes), example, dynamic_shapes=({0: size, 1: size},) * 3,
                                  strict=False)
    gm = program.module(check_guards=False)
    made = dict(zip(makes, gm.graph.output_node().args[0], strict=True))
    masks = Masks(gm, Inputs(*(n for n in gm.graph.nodes if n.op == "placeholder")))

    def classify(name: str, how: str, **options: bool) -> Mask | str:
        try:
            return masks.classify(made[name], [Term(made[name], how)], **options)  # type: ignore
        except Miss as miss:
            assert isinstance(miss.node, Node)
            return f"{kind(miss.node) or miss.node.target}: {miss.reason}"

    return classify


def is_mask(mask: Mask | str, window: int = 0, padding: bool = False) -> Mask:
    assert isinstance(mask, Mask), mask
    assert mask.window == window
    assert (mask.padding is not None) == padding
    if mask.padding is not None:
        assert mask.padding.name == "padding"
    return mask


def token(ids: Tensor) -> Tensor:
    """Numbers of the tokens, [S]."""
    return torch.arange(ids.shape[1])


def age(ids: Tensor) -> Tensor:
    """How many tokens the query is later than the token, [S, S]."""
    return token(ids)[:, None] - token(ids)


def tril(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1]).tril().bool()


def additive(seen: Tensor, fill: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, fill)


def key(padding: Tensor) -> Tensor:
    return padding[:, None, None].bool()


# name: (mask of (module, ids, positions, padding), window, whether it hides padding)
SEEN: dict[str, tuple[Callable[..., Tensor], int, bool]] = {
    "tril": (lambda t, i, p, m: tril(i), 0, False),
    "le": (lambda t, i, p, m: token(i) <= token(i)[:, None], 0, False),
    "buffer": (lambda t, i, p, m: t.causal[:, :, : i.shape[1], : i.shape[1]], 0, False),
    "positions": (lambda t, i, p, m: (p[:, None] <= p[:, :, None])[:, None], 0, False),
    "padding": (lambda t, i, p, m: tril(i) & key(m), 0, True),
    "padding of queries": (lambda t, i, p, m: tril(i) & key(m) & key(m).mT, 0, True),
    "weight's shape": (
        lambda t, i, p, m: tril(i) | torch.zeros_like(t.weight[:1]).bool(), 0, False),
    "ids' shape": (lambda t, i, p, m: tril(i) & torch.ones_like(i)[:, None, None].bool(), 0, False),
    "window": (lambda t, i, p, m: tril(i) & (token(i) > token(i)[:, None] - 8), 8, False),
    "window by triu": (lambda t, i, p, m: tril(i).triu(-8), 9, False),
    "window of positions": (
        lambda t, i, p, m: ((p[:, None] <= p[:, :, None])
                            & (p[:, :, None] - p[:, None] < 5))[:, None] & key(m), 5, True),
    "window and padding": (lambda t, i, p, m: tril(i) & (age(i) < 8) & key(m), 8, True),
    "window of 200": (lambda t, i, p, m: tril(i) & (age(i) < 200), 200, False),
    "window in a buffer": (lambda t, i, p, m: t.local[: i.shape[1], : i.shape[1]], 50, False),
    "window of one": (lambda t, i, p, m: age(i) == 0, 1, False),
}

OTHERS: dict[str, tuple[Callable[..., Tensor]]] = {
    **{f"tril {fill}": (lambda t, i, p, m, fill=fill: additive(tril(i), fill),)
       for fill in (-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4)},
    "triu": (lambda t, i, p, m: ~tril(i),),
    "padding only": (lambda t, i, p, m: key(m),),
    "window only": (lambda t, i, p, m: additive(age(i) < 8),),
    "window of 2047": (lambda t, i, p, m: age(i) < 2047,),
}


@pytest.mark.parametrize("name", SEEN)
def test_masks_are_known_in_every_form(name: str, found: Found) -> None:
    _, window, padding = SEEN[name]
    assert is_mask(found(name, "see"), window, padding)


def test_booleans_and_additive_masks(found: Found) -> None:
    assert is_mask(found("triu", "hide"))
    for name in OTHERS:
        if name.startswith("tril"):
            assert is_mask(found(name, "add"))


def test_is_causal_with_another_mask(found: Found) -> None:
    assert is_mask(found("padding only", "see", causal=True), 0, True)
    assert is_mask(found("window only", "add", causal=True), 8)
    assert is_mask(found("window of 2047", "see", causal=True), 2047)


def alibi(ids: Tensor) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, 5)
    return additive(tril(ids)) - slopes[:, None, None] * age(ids)


# name: (mask, how it is applied, the op of the node that is named, the reason)
REFUSED: dict[str, tuple[Callable[..., Tensor], str, str, str]] = {
    "nothing hidden": (
        lambda t, i, p, m: torch.zeros(i.shape[1], i.shape[1]), "add", "zeros",
        "lets query 0 of 5 see the later token 1: not causal"),
    "padding alone": (
        lambda t, i, p, m: key(m), "see", "to",
        "lets query 0 of 5 see the later token 1: not causal"),
    "prefix": (
        lambda t, i, p, m: tril(i) | (token(i) < 3), "see", "__or__",
        "lets query 0 of 5 see the later token 1: not causal"),
    "far prefix": (
        lambda t, i, p, m: tril(i) | (token(i) == 30), "see", "__or__",
        "lets query 0 of 40 see the later token 30: not causal"),
    "strictly causal": (
        lambda t, i, p, m: age(i) > 0, "see", "gt",
        "hides token 0 from query 0 of 5: neither causal nor a window"),
    "chunks": (
        lambda t, i, p, m: tril(i) & (token(i) // 16 == token(i)[:, None] // 16), "see", "__and__",
        "hides token 31 from query 39 of 40 but lets query 8 of 17 see token 0: not a window"),
    "long chunks": (
        lambda t, i, p, m: tril(i) & (token(i) // 4096 == token(i)[:, None] // 4096), "see",
        "__and__", "hides token 4095 from query 4100 of 4101 but lets query 5 of 17 see token 0: "
        "not a window"),
    "dilated": (
        lambda t, i, p, m: tril(i) & (age(i) % 2 == 0), "see", "__and__",
        "hides token 0 from query 1 of 5: neither causal nor a window"),
    "attention sink": (
        lambda t, i, p, m: tril(i) & ((age(i) < 8) | (token(i) == 0)), "see", "__and__",
        "hides token 30 from query 39 of 40 but lets query 9 of 17 see token 0: not a window"),
    "alibi": (
        lambda t, i, p, m: alibi(i), "add", "sub",
        "adds -0.5 for query 1 of 5 and token 0: a bias, not a mask"),
    "weak": (
        lambda t, i, p, m: additive(tril(i), -100.0), "add", "masked_fill",
        "adds -100 for query 0 of 5 and token 1: a bias, not a mask"),
    "learned": (
        lambda t, i, p, m: additive(tril(i)) + t.weight[:1], "add", "add",
        "depends on the weight 'weight'"),
    "some ids": (
        lambda t, i, p, m: tril(i) & (i[:, None, None] != 0), "see", "__and__",
        "depends on the values of 'ids'"),
    "padding inverted": (
        lambda t, i, p, m: tril(i) & ~key(m), "see", "__and__",
        "hides token 0 from query 0 of 5: neither causal nor a window"),
    "too far": (
        lambda t, i, p, m: tril(i) & (token(i) > token(i)[:, None] - 100_000), "see", "sub",
        f"counts 100000 tokens: masks are judged on up to {LARGE}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_are_refused(name: str, found: Found) -> None:
    _, how, op, reason = REFUSED[name]
    assert found(name, how) == f"{op}: {reason}"


def test_equal_subgraphs_are_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd gives every layer its own copy of the mask's last nodes."""
    class Twice(nn.Module):
        def forward(self, ids: Tensor) -> list[Tensor]:
            return [additive(age(ids) >= least) for least in (0, 0, 1)]

    size = torch.export.Dim.DYNAMIC(min=1)
    gm = torch.export.export(Twice(), (torch.full((2, 16), 3),), strict=False,
                             dynamic_shapes=({0: size, 1: size},)).module(check_guards=False)
    judged = []
    judge = Masks._judge
    monkeypatch.setattr(Masks, "_judge", lambda *args: judged.append(args[1]) or judge(*args))
    masks = Masks(gm, Inputs(next(n for n in gm.graph.nodes if n.op == "placeholder")))
    first, second, third = gm.graph.output_node().args[0]
    assert first is not second
    for mask in (first, second):
        is_mask(masks.classify(mask, [Term(mask, "add")]))
    with pytest.raises(Miss, match="hides token 0 from query 0"):
        masks.classify(third, [Term(third, "add")])
    assert judged == [first, third]


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
