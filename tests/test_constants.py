"""Layers whose formats differ in their numbers alone share planes and kernels."""

import operator

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import kvcompile
from kvcompile.backend.inductor import compile_graph
from kvcompile.errors import KVCompileError
from kvcompile.ir import APPEND, ATTEND
from kvcompile.models.tiny import tiny
from kvcompile.planes import Group
from kvcompile.site import Site
from kvcompile.store import Store

TABLES = ([-0.9, -0.2, 0.3, 0.8], [-0.5, -0.1, 0.35, 0.95], [-1, 0, 0.05, 0.1])
SIXTEEN = [[round(x + 0.011 * (i + j) % 0.05, 4) for j, x in enumerate(
    (-0.95, -0.8, -0.65, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95))]
    for i in range(3)]
TEXTS = [
    "store(k=outliers(of=nuq(table={0}, axis=channel, group=128)), k_block=128, v=outliers(of=nuq("
    "table={1})), sinks=1)",
    "store(k=hadamard(of=nuq(table={1}, group=32)), k_lag=20, v=lowrank(of=nuq(table={1}, "
    "axis=channel, group=32), rank=2))",
]


def stores(text):
    """The store of each of three layers."""
    return [Store.parse(text.format(a, b)) for a, b in zip(TABLES, SIXTEEN, strict=True)]


def layers(text, heads=2, dims=(64, 64), dtype=torch.float32):
    """Sites as they stand in a program: three layers, almost alike."""
    own = stores(text)
    return [Site(i, heads * 2, heads, dims, dtype, 0, s, common=s.common)
            for i, s in enumerate(own)]


@pytest.mark.parametrize("text", TEXTS)
def test_what_layers_have_in_common(text):
    own = stores(text)
    common = own[0].common
    assert {s.common for s in own} == {common} and common.common == common
    assert Store.parse(str(common)) == common and "table=0:" in str(common)
    assert common.constants == len(own[0].numbers_apart) and not own[0].constants
    assert own[0].numbers_apart[-16:] == tuple(SIXTEEN[0])
    plain = Store.parse("store(k=int, v=nf4)")
    assert plain.common == plain and plain.numbers_apart == ()


@pytest.mark.parametrize("text", TEXTS)
def test_each_layer_stores_and_reads_by_its_own_numbers(text):
    """The plain bodies, on three layers at once, against each layer by itself."""
    sites, g = layers(text), torch.Generator().manual_seed(0)
    together = Group(sites, 2, torch.device("cpu"))
    x = torch.randn(2, 3, 2, 2, 200, 64, generator=g)
    q = torch.randn(2, 4, 1, 64, generator=g)
    calls = [slice(0, 190), *(slice(t, t + 1) for t in range(190, 200))]
    valid = torch.ones(2, 200, dtype=torch.bool)
    at = torch.arange(200).expand(2, -1)
    together.reserve([200, 200])
    for part in calls:
        APPEND(together.planes, [*x[0, ..., part, :]], [*x[1, ..., part, :]], at[:, part],
               valid[:, part], store=str(together.store), slots=[0, 1, 2])
    for slot, site in enumerate(sites):
        alone = Group([Site(0, 4, 2, (64, 64), torch.float32, 0, site.store)], 2,
                      torch.device("cpu"))
        alone.reserve([200, 200])
        for part in calls:
            APPEND(alone.planes, [x[0, slot, ..., part, :]], [x[1, slot, ..., part, :]],
                   at[:, part], valid[:, part], store=str(site.store), slots=[0])
        got, want = (ATTEND(q, q[:, :2], q[:, 2:], group.planes, at[:, :1] + 200, valid[:, :1],
                            None, scale=0.125, store=str(group.store), slot=number)[0]
                     for group, number in ((together, slot), (alone, 0)))
        assert torch.equal(got, want)


@pytest.mark.parametrize("text", [TEXTS[0], pytest.param(TEXTS[1], marks=pytest.mark.slow)])
def test_the_kernels_read_the_numbers_of_each_layer(text):
    """One text for all layers: attend within rounding, append bit by bit."""
    sites, g = layers(text)[:2], torch.Generator().manual_seed(0)
    body, kernel = (Group(sites, 2, torch.device("cpu")) for _ in range(2))
    every, options = 300, dict(store=str(body.store))
    x = torch.randn(2, 2, 2, 2, every, 64, generator=g)
    q = torch.randn(2, 2, 4, 1, 64, generator=g)
    at, valid = torch.arange(every).expand(2, -1), torch.ones(2, every, dtype=torch.bool)
    for group in (body, kernel):
        group.reserve([every] * 2)
        APPEND(group.planes, [*x[0, ..., :100, :]], [*x[1, ..., :100, :]], at[:, :100],
               valid[:, :100], **options, slots=[0, 1])
    one = [*x[0, ..., :1, :].contiguous(), *x[1, ..., :1, :].contiguous(), *q]
    flat = [*one, *kernel.planes, at[:, :1], valid[:, :1]]
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(flat))]
    planes, *given = nodes[6:-2], nodes[:2], nodes[2:4], nodes[4:6]
    outs = [graph.call_function(operator.getitem, (graph.call_function(
        ATTEND, (given[2][i], given[0][i], given[1][i], planes, *nodes[-2:], None),
        {**options, "scale": 0.125, "slot": i}), 0)) for i in range(2)]
    graph.call_function(APPEND, (planes, given[0], given[1], *nodes[-2:]),
                        {**options, "slots": [0, 1]})
    graph.output(tuple(outs))
    gm = torch.fx.GraphModule({}, graph)
    with torch.no_grad(), config.patch(force_disable_caches=True):
        run, texts = run_and_get_code(lambda: compile_graph(gm, flat, [[]] * len(flat)))
    written = "".join(texts)
    assert "kvc::append_one" in written and "kvc::attend<" in written
    assert "Given<2, 0>" in written or "Given<4, 0>" in written
    reach = 2 * float(q.abs().max() * x.abs().max()) * 64**0.5       # stored keys may be larger
    logit = 2 * (64 + 4) * 2.0**-24 * reach                          # gamma(D) of sum |q||k|, twice
    share = 2 * logit + 2 * every * 2.0**-24 + 4 * 8e-8
    for t in range(100, every):
        k, v = ([*y[..., t : t + 1, :].contiguous()] for y in x)
        APPEND(body.planes, k, v, at[:, t : t + 1], valid[:, :1], **options, slots=[0, 1])
        got = run(*k, *v, *q, *kernel.planes, at[:, t : t + 1], valid[:, :1])
        if t in (101, 254, every - 1):
            held = [p.clone() for p in body.planes]
            held[0] -= 1                                         # before this token
            for i in range(2):
                want = ATTEND(q[i], k[i], v[i], held, at[:, t : t + 1], valid[:, :1], None,
                              **options, scale=0.125, slot=i)[0]
                assert (got[i] - want).abs().max() <= 2 * share * x.abs().max()
    for spec, a, b in zip(body.specs, body.planes, kernel.planes, strict=True):
        assert torch.equal(a, b), spec.name


def test_a_recipe_of_codebooks_has_one_group():
    """One group of planes for all layers, whose bytes are told, and whose rows change places."""
    model, tables = tiny("llama"), [TABLES[i % 3] for i in range(4)]
    ids = torch.randint(3, 100, (2, 150), generator=torch.Generator().manual_seed(0))
    own = kvcompile.optimize(model, f"kvquant(bits=2, k={tables}, v={tables})", compile=False)
    cache = own(ids, use_cache=True).past_key_values
    assert len(cache.groups) == 1 and cache.groups[0].store.constants == 8
    assert cache.nbytes == kvcompile.explain(own).kv_bytes(150, batch=2)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-10)
    want = own(ids[[1, 1], :140], use_cache=True).past_key_values
    step = torch.tensor([[5], [5]])
    got, want = (own(step, past_key_values=c).logits for c in (cache, want))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()       # batches are summed otherwise
    equal = own.kvcompile.program.lower(f"kvquant(bits=2, k={[TABLES[0]] * 4}, v={tables[:1] * 4})")
    assert {site.layout for site in equal.sites} == {equal.sites[0].store}


def test_numbers_that_are_not_known_are_not_guessed():
    fmt = layers(TEXTS[0])[0].common.v.format
    with pytest.raises(KVCompileError, match="numbers of the layer are not known"):
        fmt.decode(fmt.encode(torch.zeros(1, 1, 64), "v"), 64, torch.float32, "v")
