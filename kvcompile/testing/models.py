"""Laws of methods and passes on whole models: recipes, rewriting, and every layer's attention."""

from functools import lru_cache
from math import ceil, log10
from typing import Any

import torch
from hypothesis import event, reject
from hypothesis import strategies as st

from kvcompile.calibration.samples import calibrated
from kvcompile.checks.audit import audit
from kvcompile.checks.audit_report import Audit
from kvcompile.errors import RecipeError
from kvcompile.ir import attention_nodes
from kvcompile.method import Method
from kvcompile.plan import plan
from kvcompile.program import Program, capture
from kvcompile.recipe import Recipe
from kvcompile.registry import module
from kvcompile.rewrite import Pass, Refused, copy_graph, passes, run_passes
from kvcompile.site import sites
from kvcompile.testing.law import law
from kvcompile.testing.stores import LAYERS, base, drawn_term, sites_of, text
from kvcompile.testing.strategies import recipes


@lru_cache(64)
def lowered(recipe: str) -> Program:
    return base().lower(recipe, calibration=text())


@law("method", cost=10)
def recipes_round_trip(method: Method, data: Any) -> None:
    """Recipe.parse(str(r)) == r, and the text with what calibration found gives the same layers."""
    recipe = Recipe((drawn_term(method, data, LAYERS),))
    assert Recipe.parse(str(recipe)) == recipe
    found = calibrated(recipe, base(), text())
    assert Recipe.parse(str(found)) == found
    assert sites_of(str(recipe)) == sites_of(str(found))


@law("method", cost=10)
def full_beside_it_vanishes(method: Method, data: Any) -> None:
    """full + x == x == x + full: what keeps everything changes nothing."""
    recipe = str(drawn_term(method, data, LAYERS))
    assert sites_of(f"full+{recipe}") == sites_of(recipe) == sites_of(f"{recipe}+full")


@law("method", cost=10)
def attention_is_within_its_bound(method: Method, data: Any) -> None:
    """Padded rows, in chunks and steps: view, kernel and theorem hold in every layer."""
    tokens = data.draw(st.sampled_from((20, 140, 270)))
    ids = torch.randint(0, 128, (2, tokens),
                        generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, : data.draw(st.integers(0, tokens - 5))] = False
    program = lowered(str(drawn_term(method, data, LAYERS)))
    audit(program, ids, valid=valid, steps=2, chunk=data.draw(st.sampled_from((None, 100))),
          compile=False)


def drawn_recipe(data: Any) -> Recipe:
    """A composition whose parameters have been calibrated. Terms that turn out to exclude each
    other only then are refused in one line."""
    try:
        found = calibrated(data.draw(recipes(LAYERS)), base(), text())
        sites_of(str(found))
    except RecipeError as error:
        assert "\n" not in str(error)
        reject()
    return found


@law("pass", cost=10)
def passes_run_once(p: Pass, data: Any) -> None:
    """A second run of a pass changes nothing."""
    recipe = drawn_recipe(data)
    gm, settings = copy_graph(base().snapshots["capture"]), plan(recipe, LAYERS)
    run_passes([x for x in passes() if x.order <= p.order], gm, settings)
    before = [str(node.format_node()) for node in gm.graph.nodes]
    run_passes([p], gm, settings)
    assert [str(node.format_node()) for node in gm.graph.nodes] == before


@law("pass", cost=10)
def layers_are_rewritten_or_refused(p: Pass, data: Any) -> None:
    """Whatever changes a layer says so, once; what refuses says why, in one line."""
    recipe = drawn_recipe(data)
    gm, settings = copy_graph(base().snapshots["capture"]), plan(recipe, LAYERS)
    run_passes([x for x in passes() if x.order < p.order], gm, settings)
    before, told = sites(gm.graph), list[Any]()
    run_passes([p], gm, settings, lambda _, __, outcomes, ___: told.extend(outcomes))
    after = sites(gm.graph)
    assert len(after) == len(attention_nodes(gm.graph)) == LAYERS
    for layer, (a, b) in enumerate(zip(before, after, strict=True)):
        own = [x for x in told if x.layer == layer]
        by = own + [x for x in told if x.layer == b.owner]  # what it reads is stored by another
        assert a == b or any(not isinstance(x, Refused) for x in by), layer
        assert all(x.reason and "\n" not in x.reason for x in own if isinstance(x, Refused))
    assert {x.layer for x in told} <= set(range(LAYERS))


def check_decoder(options: dict[str, Any], recipe: Recipe, seed: int) -> Audit:
    """The laws on a decoder of its own: capture, a recipe, chunks and steps, padded rows. How far
    the logits are off is in the result, and an event of hypothesis's statistics."""
    model = module("models", "decoder").Decoder.tiny(seed, **options)
    program = capture(model)
    ids = torch.randint(0, 128, (2, 150), generator=torch.Generator().manual_seed(seed))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :seed % 100] = False
    try:
        found = program.lower(recipe, calibration=ids)
        told = audit(found, ids, valid=valid, steps=2, chunk=90, compile=False)
    except RecipeError:  # terms that exclude each other, or that the laws do not cover
        reject()
    event(f"logits off by at most 1e{ceil(log10(max(told.logits.error, 1e-9)))}")
    return told
