"""The C++ kernel of kvc.evict leaves bit for bit what its plain body leaves."""

import pytest
import torch
from support import optimized
from torch.fx import Graph, GraphModule

import kvcompile
from kvcompile.backend.inductor import compile_graph
from kvcompile.format import PAGE
from kvcompile.ir import APPEND, EVICT
from kvcompile.kernels import cpp_evict
from kvcompile.passes.select import rule_of
from kvcompile.plan import plan
from kvcompile.planes import Group
from kvcompile.site import Site
from kvcompile.store import Store
from kvcompile.testing.kernels import Ran

BATCH, HEADS, GROUP, DIM, LIMIT = 2, 3, 2, 32, 140
RECIPES = ("h2o(budget=140)", "h2o(budget=140, recent=0.25)", "tova(budget=140)",
           "tova(budget=140)", "scissorhands(budget=140, every=9, recent=5)",
           "simlayerkv(sinks=3, recent=130)")
RULES = [str(rule_of(plan(recipe, 1)[0].values, 0, 1)) for recipe in RECIPES]
OBSERVE = sum("simlayerkv" not in recipe for recipe in RECIPES)


def compiled(given: list[list], options: dict):
    """kvc.evict of planes, mass, k, v, positions and valid, by the kernel."""
    flat, graph = [x for xs in given for x in xs], Graph()
    nodes = iter([graph.placeholder(f"x{i}") for i in range(len(flat))])
    planes, mass, k, v, (at, valid) = [[next(nodes) for _ in xs] for xs in given]
    graph.call_function(EVICT, (planes, mass, k, v, at, valid), options)
    graph.output((valid,))
    run = compile_graph(GraphModule({}, graph), flat, [[]] * len(flat))
    return lambda given: run(*(x for xs in given for x in xs))


@pytest.mark.parametrize("text", ["store(k=int, v=int(bits=4), slots=true)", *(
    pytest.param(text, marks=pytest.mark.slow)
    for text in ("store(slots=true)", "store(k=fp8, v=nf4, slots=true)"))])
def test_the_kernel_leaves_what_the_body_leaves(text):
    """Layers of all rules in one group; padding, ties, heads that lose many tokens at once."""
    store, g, ran = Store.parse(text), torch.Generator().manual_seed(0), Ran()
    assert not cpp_evict.unsupported(store, RULES)
    slots, dims = [*range(len(RULES))], (DIM, DIM)
    site = Site(0, HEADS * GROUP, HEADS, dims, torch.float32, 0, store)
    both = [Group([site] * len(RULES), BATCH, torch.device("cpu")) for _ in range(2)]
    for group in both:
        group.reserve([2 * PAGE + 1] * BATCH)
        group.plane("limit").fill_(LIMIT)
    places = store.places(dims, torch.float32, [p.shape for p in both[0].planes]) + 1
    run, most = None, 0
    for step in range(220):
        if step == 190:  # some heads hold many more than they may; those of tova hold the same
            limit = torch.randint(90, LIMIT, both[0].planes[0].shape, generator=g)
            limit[2:4] = 120
            for group in both:
                group.plane("limit").copy_(limit)
        k, v = (list(torch.randn(len(RULES), BATCH, HEADS, 1, DIM, generator=g)) for _ in "kv")
        at = torch.tensor([[step], [step + 7]])
        valid = torch.tensor([[step % 7 != 3], [step % 11 != 5]])
        for group in both:
            APPEND(group.planes, k, v, at, valid, store=text, slots=slots)
        held = torch.arange(places) < both[0].planes[0][:OBSERVE, ..., None]
        mass = torch.randint(0, 5, (OBSERVE, BATCH, HEADS, places), generator=g) / 400 * held
        options = dict(store=text, rules=RULES, slots=slots, group=GROUP)
        given = [[group.planes, [*mass], k, v, [at, valid]] for group in both]
        before, run = both[0].counts, run or compiled(given[1], options)
        EVICT(*given[0][:4], at, valid, **options)
        with ran:
            run(given[1])
        most = max(most, int((before - both[0].counts).max()))
        held = torch.arange(places - 1) < both[0].planes[0][..., None]
        for spec, a, b in zip(both[0].specs, *(group.planes for group in both), strict=True):
            if spec.name == "slots.all.score":  # of what is held: the others are not the same
                table = both[0].plane("slots.all.table").long()
                a, b = (x[table].flatten(-2)[held] for x in (a, b))
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (step, spec.name)
    assert most > 20 and not ran.ops


WITHOUT = {"r-kv(budget=24)": "scorer redundant is not told in C++",
           "dms(scorer=knorm, threshold=-5)": "threshold says token by token what leaves",
           "h2o(budget=300)+kivi": "whole pages leave, by their page tables"}


@pytest.mark.parametrize("recipe", WITHOUT)
def test_rules_without_a_kernel_are_said(recipe):
    rows = kvcompile.explain(optimized("llama"), recipe).rows
    assert any(r.why.startswith(f"kvc.evict runs its plain body: {WITHOUT[recipe]}") for r in rows)
