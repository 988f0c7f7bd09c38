"""kvc.attend's kernel against its plain body, on random caches, through Inductor."""

import operator

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from kvcompile.backend import template
from kvcompile.backend.inductor import compile_graph
from kvcompile.ir import APPEND, ATTEND
from kvcompile.kernels import cpp_append, cpp_attend, pages
from kvcompile.planes import Group
from kvcompile.site import Site
from kvcompile.store import Store

KIVI = ("store(k=int(bits={0}, axis=channel, group={1}), k_block=128, "
        "v=int(bits={0}, group={1}), v_lag=128)")
MERGED = ("store(k=direction(of=int(bits={0}, axis=channel)), v=direction(of=int(bits={0})), "
          "v_lag=128, members=2)")
LENGTHS = (0, 1, 15, 127, 128, 129, 255, 256, 300, 517)


class Case:
    """A layer with random tokens in rows of different lengths, and one query more for each."""

    def __init__(self, store, heads=2, group=3, dims=(64, 64), dtype=torch.float32,
                 lengths=LENGTHS, **options):
        self.store, self.dtype, self.options = Store.parse(store), dtype, options
        site = Site(0, heads * group, heads, dims, dtype, options.get("window", 0), self.store)
        rows, most = len(lengths), max(lengths)
        g = torch.Generator().manual_seed(0)
        members = self.store.members
        every = [[torch.randn(rows, heads, most, d, generator=g).to(dtype) for d in dims]
                 for _ in range(members)]
        for both in every:
            both[0][..., 5] *= 8                                    # an outlier channel
            if self.store.v_in_k:
                both[1] = both[0][..., : dims[1]]
        self.layers = Group([site, site], rows, torch.device("cpu"))
        self.layers.reserve(list(lengths))
        valid = torch.arange(most)[None] < torch.tensor(lengths)[:, None]
        at = torch.arange(most).expand(rows, -1)
        keys, values = (list(x) for x in zip(*every, strict=True))
        APPEND(self.layers.planes, keys, values, at, valid, store=str(self.store), slots=[1])
        self.q = torch.randn(rows, heads * group, 1, dims[0], generator=g).to(dtype)
        self.k, self.v = (torch.randn(rows, heads, 1, d, generator=g).to(dtype) for d in dims)
        if self.store.v_in_k:
            self.v = self.k[..., : dims[1]]
        size = torch.norm if members > 1 else torch.amax  # a direction's largest number is 1
        self.k_peak, v_peak = (max(float(size(x.float().abs(), dim=-1).max()) for x in side)
                               for side in (keys, values))
        self.v_peak = max(v_peak, 4.0)
        self.valid = torch.ones(rows, 1, dtype=torch.bool)
        self.positions = torch.tensor(lengths)[:, None]
        self.sinks = torch.randn(heads * group, generator=g) if options.pop("sinks", 0) else None
        self.shape = cpp_attend.Shape(heads, group, dims, dtype, dims[0]**-0.5,
                                      options.get("window", 0), options.get("softcap", 0.0),
                                      self.sinks is not None, options.get("mass", False))

    def arguments(self, q, k, v):
        options = dict(scale=self.shape.scale, store=str(self.store), slot=1, **self.options)
        return (q, k, v, self.layers.planes, self.positions, self.valid, self.sinks), options

    def fused(self):
        """What Inductor makes of the op, for any pages and batch, and its C++ texts."""
        graph = torch.fx.Graph()
        flat = [self.q, self.k, self.v, *self.layers.planes, self.positions, self.valid]
        flat += [] if self.sinks is None else [self.sinks]
        nodes = [graph.placeholder(f"x{i}") for i in range(len(flat))]
        planes = nodes[3 : 3 + len(self.layers.planes)]
        positions, valid, *sinks = nodes[3 + len(planes):]
        _, options = self.arguments(self.q, self.k, self.v)
        both = graph.call_function(
            ATTEND, (*nodes[:3], planes, positions, valid, sinks[0] if sinks else None), options)
        graph.output(tuple(graph.call_function(operator.getitem, (both, i))
                           for i in ((0, 2) if self.shape.mass else (0,))))
        rows = [[0]] * 3 + [[1]] + [[0] if s.shape else [1, 3] for s in self.layers.specs[1:]]
        rows += [[0], [0]] + [[]] * len(sinks)
        dynamic = [[d for d in dims if x.shape[d] > 1] for x, dims in zip(flat, rows, strict=True)]
        gm = torch.fx.GraphModule({}, graph)
        with torch.no_grad(), config.patch(force_disable_caches=True):
            run, texts = run_and_get_code(lambda: compile_graph(gm, flat, dynamic))
            self.run = lambda: run(self.q, *flat[1:])
            o, *self.mass = self.run()
            return o, "".join(texts)

    def check(self):
        got, texts = self.fused()
        assert "kvc::attend<" in texts, "the plain body was run"
        self.compare(got)
        return got

    def compare(self, got):
        given, options = self.arguments(*(x.float() for x in (self.q, self.k, self.v)))
        want, *_ = ATTEND(*given, **options)
        error = (got.float() - want).abs().max()
        assert error <= self.tolerance(want), (error, self.tolerance(want))

    def aim(self, edge):
        """Queries that see little but one token: the first, at an edge of a tier, or the last."""
        counts = self.layers.planes[0][1].tolist()
        for row, own in enumerate(counts):
            for head, n in enumerate(own):
                tiers = self.store.spans("k", n) | {"v": self.store.spans("v", n)["body"]}
                ends = sorted({m + self.store.sinks for span in tiers.values() for m in span})
                k = self.read(row, head, n)
                if not len(k):
                    continue
                wanted = {"first": 0, "last": n - 1}.get(edge) if isinstance(edge, str) else (
                    ends[edge % len(ends)] - edge // len(ends) % 2)
                kept = self.store.numbers(n)
                at = kept.index(wanted) if wanted in kept else 0
                group = slice(head * self.shape.queries, (head + 1) * self.shape.queries)
                far = 12 / self.shape.scale / k[at].square().sum().clamp_min(1e-6)
                self.q[row, group, 0] = (k[at] * far).to(self.dtype)

    def read(self, row, head, n):
        """[kept, Dk] in fp32: K of a head as the plain body reads it."""
        named = pages.named(self.layers.specs, self.layers.planes, [1])
        tiers = pages.tiers(self.store, "k", named, self.shape.dims[0], torch.float32)
        every = pages.stored(self.store, "k", tiers, row, slice(head, head + 1), n)[0]
        return every.narrow(-1, self.options.get("member", 0) * self.shape.dims[0],
                            self.shape.dims[0])

    def tolerance(self, want):
        """Rounding of both sides: 2 gamma(D + 2) scale sum |q||k| in a logit, gamma(T) Vmax.

        16-bit models round q and the weights to 16-bit integers of the largest in a step or block,
        2^x to 3e-6, and the output to their own type.
        """
        eps, (dk, _) = 2.0**-24, self.shape.dims
        peak = float(self.q.abs().amax()) * self.k_peak * dk * self.shape.scale
        tokens = int(self.positions.max()) + 1
        logit, weights = 2 * (dk + 4) * eps * peak, 2 * tokens * eps + 4 * 8e-8
        if self.dtype is not torch.float32:
            logit += 2 * peak / 65534                # |error of q| <= unit / 2, codes span 2 peaks
            weights += 2 * 128 / 65534 + 4 * 3e-6    # sum of block peaks <= sum of weights
        last = float(want.abs().max()) * torch.finfo(self.dtype).eps / 2
        return (2.718281828**(2 * logit) - 1 + weights) * self.v_peak + last


QUICK = {
    "kivi4": dict(store=KIVI.format(4, 32)),
    "kivi2-80": dict(store=KIVI.format(2, 16), dims=(80, 80), group=1),
    "dense": dict(store="store", group=8),
    "sinks-window": dict(store="store(k=int(bits=4, axis=channel), k_block=128, v=int(bits=4), "
                               "v_lag=128, sinks=4, window=300)", group=2),
    "int8-softcap": dict(store="store(k=int, v=int)", window=77, softcap=20.0, sinks=True),
    "fp8": dict(store="store(k=fp8, v=fp8(kind=e5m2))", dims=(32, 96), group=4),
    "nf4": dict(store="store(k=nf4(axis=channel), v=nf4)", group=5),
    "bf16": dict(store=KIVI.format(4, 64), dtype=torch.bfloat16, dims=(128, 128), group=4),
    "bf16-symmetric": dict(store="store(k=int(bits=4, symmetric=true), k_lag=5, "
                                 "v=int(bits=2, symmetric=true, axis=channel))",
                           dtype=torch.bfloat16, dims=(64, 96), window=200),
    "hadamard": dict(store="store(k=hadamard(of=int(bits=4)), v=hadamard(of=int(bits=4)), v_lag=9)",
                     dims=(64, 96)),
    "centered": dict(store="store(k=centered(of=int(bits=4, symmetric=true), block=32), "
                           "v=centered(of=fp8, block=16))", group=1),
    "scaled": dict(store="store(k=scaled(of=int(bits=4)), v=scaled(of=nf4(axis=channel)))"),
    "gear": dict(store="store(k=lowrank(of=outliers(of=int(bits=2, axis=channel), fraction=0.05)), "
                       "v=lowrank(of=outliers(of=int(bits=2)), rank=2))", dtype=torch.bfloat16),
    "kvquant": dict(store="store(k=outliers(of=nuq(table=[-0.9, -0.2, 0.3, 0.8], axis=channel, "
                          "group=128)), v=outliers(of=nuq(table=[-0.9, -0.2, 0.3, 0.8])), "
                          "sinks=1)"),
    "fp16": dict(store=KIVI.format(2, 32), dtype=torch.float16, group=9),
    "latent": dict(store="store(v_in_k=true)", heads=1, group=16, dims=(48, 32)),
    "latent-coded": dict(store="store(k=int(bits=4, axis=channel, group=32), k_block=128, "
                         "v_in_k=true)", heads=1, group=4, dims=(96, 48), dtype=torch.bfloat16),
    "latent-int8": dict(store="store(k=int(group=16), k_lag=9, sinks=3, v_in_k=true)", heads=2,
                        group=5, dims=(80, 64)),
    "direction": dict(store=MERGED.format(4), member=1, dims=(64, 96)),
    "direction-bf16": dict(store=MERGED.format(2), dtype=torch.bfloat16, group=4, member=1),
    "channels": dict(store="store(k=channels(drop=0.5), v=channels(drop=0.25))"),
    "direction-window": dict(store="store(k=direction(of=dense, kept=0), v=direction(t=0.2), "
                                   "sinks=3, window=300, members=2)", member=0, group=1),
}


LAWS = {"fp8", "nf4", "hadamard", "centered", "scaled", "gear", "kvquant", "latent", "latent-int8",
        "direction", "direction-bf16", "direction-window", "channels", "bf16-symmetric", "fp16",
        "latent-coded"}
#       alike in test_registered_kernels.py


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LAWS else n
                                  for n in QUICK])
def test_the_kernel_is_the_body(name):
    """On random queries, and on such as see little but one token, at every edge of a tier."""
    case = Case(**QUICK[name])
    case.check()
    for edge in ("first", "last", *range(12)):
        case.aim(edge)
        case.compare(case.run()[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_head_sizes_and_ratios(bits, dim, group, dtype):
    Case(KIVI.format(bits, 16 if dim % 32 else 32), 2, group, (dim, dim), dtype).check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("axes", [(k, v) for k in ("channel", "token")
                                  for v in ("channel", "token")], ids="-".join)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_axes_and_groups(bits, axes, group, dtype):
    k, v = (f"int(bits={bits}, axis={axis}, group={group})" for axis in axes)
    Case(f"store(k={k}, v={v})", dims=(128, 128), dtype=dtype).check()


@pytest.mark.slow
@pytest.mark.parametrize("queries", [16, 128])
@pytest.mark.parametrize("store", ["store(v_in_k=true)", "store(k=int(group=64), v_in_k=true)"])
def test_latents_of_real_models(store, queries):
    """DeepSeek-V2-Lite's and V3's: rank 512 and 64 rotary channels."""
    Case(store, 1, queries, (576, 512), torch.bfloat16, lengths=(300,)).check()


@pytest.mark.parametrize("store", ["store", "store(k=int, v=int(bits=4))"])
def test_heads_may_hold_different_numbers_of_tokens(store):
    case = Case(store, lengths=(300, 130))
    case.layers.planes[0][1, 0, 1] = 17
    case.layers.planes[0][1, 1, 0] = 0
    case.check()


def test_padding_gets_zeros_and_a_batch_is_its_rows():
    case = Case(**QUICK["kivi4"])
    case.valid[3] = False
    got = case.check()
    assert not got[3].any()
    alone = Case(**QUICK["kivi4"], lengths=(517,))
    every = Case(**QUICK["kivi4"], lengths=(517, 517))
    assert torch.isfinite(alone.check()).all() and torch.isfinite(every.check()).all()


@pytest.mark.parametrize("name", ["kivi4", *(
    pytest.param(n, marks=pytest.mark.slow) for n in ("dense", "bf16"))])
def test_the_attention_mass_of_each_token(name):
    """What each number gets of the weights of its kv head's queries, the query's own included."""
    case = Case(**QUICK[name], mass=True)
    case.layers.planes[0][1, 3, 1] = 17
    case.valid[5] = False
    got = case.check()
    assert not got[5].any() and not case.mass[0][5].any()
    given, options = case.arguments(*(x.float() for x in (case.q, case.k, case.v)))
    want = ATTEND(*given, **options)[2]
    assert case.mass[0].shape == want.shape
    assert (case.mass[0] - want).abs().max() <= case.tolerance(torch.ones(1)) * case.shape.queries
    held = case.layers.planes[0][1] + 1
    places = torch.arange(want.shape[2])
    assert not case.mass[0][places.expand_as(want) >= held[..., None]].any()
    total = case.mass[0].sum(2)[case.valid[:, 0]]
    assert (total - case.shape.queries).abs().max() <= 1e-4 * case.shape.queries


@pytest.mark.parametrize("held_back", ["KVC_HALVES", "KVC_PORTABLE"])
@pytest.mark.parametrize("name", [
    pytest.param(n, marks=() if n in ("kivi4", "bf16-symmetric") else pytest.mark.slow)
    for n in QUICK])
def test_other_machines(name, held_back, monkeypatch):
    """The texts for machines with AVX2 alone, and for any other, give the same."""
    text = (f"#define {held_back}\n", *cpp_attend.headers())
    monkeypatch.setattr(cpp_attend, "headers", lambda: text)
    monkeypatch.setattr(template, "digest", lambda: held_back)  # a key of its own
    Case(**QUICK[name]).check()


@pytest.mark.parametrize("store, dims, names", [
    ("store", (24, 24), "head dimension 24 is not a multiple of 16"),
    ("store(v=int(bits=2, group=16))", (64, 48), "12 channels abreast cut a group"),
])
def test_what_has_no_kernel_says_why(store, dims, names):
    shape = cpp_attend.Shape(2, 3, dims, torch.float32, 0.125)
    assert names in cpp_attend.unsupported(Store.parse(store), shape)
    case = Case(store, dims=dims)
    given, options = case.arguments(case.q, case.k, case.v)
    want, *_ = ATTEND(*given, **options)
    got, texts = case.fused()
    assert "kvc::attend<" not in texts
    assert torch.equal(got, want)


APPENDED = (KIVI.format(4, 32), "store(k=int, v=int(bits=4), v_lag=3)",
            "store(k=int(bits=4, axis=channel), k_block=128, v=int(bits=4), v_lag=128, sinks=4, "
            "window=100)", "store(sinks=3, window=20)", MERGED.format(2),
            "store(k=direction(of=dense, kept=9), v=direction(of=fp8, t=0, kept=0), sinks=3, "
            "members=2)",
            "store(k=outliers(of=nuq(table=[-0.9, -0.2, 0.3, 0.8], axis=channel, group=128)), "
            "v=hadamard(of=centered(of=scaled(of=outliers(of=int(bits=4, clip=0.9))))), sinks=1)",
            *(pytest.param(text, marks=pytest.mark.slow) for text in (
                "store", KIVI.format(2, 32), "store(k=fp8, v=fp8(kind=e5m2))",
                "store(k=nf4(axis=channel), v=nf4)",
                "store(k=int(bits=4, symmetric=true), v=hadamard(of=int(bits=4, symmetric=true)))",
                "store(k=hadamard(of=int(bits=4, axis=channel, clip=0.95)), v=int(clip=0.9))",
                "store(k=scaled(of=int(bits=4, group=64)), v=scaled(of=nf4(axis=channel), "
                "block=32), v_block=64)",
                "store(k=centered(of=int(bits=4), block=64), v=hadamard(of=centered(of=scaled("
                "of=fp8))), sinks=1)",
                "store(k=outliers(of=nf4(axis=channel, group=128)), v=outliers(of=nuq(table=[-0.9, "
                "-0.2, 0.3, 0.8]), fraction=0.05), sinks=1)",
                "store(k=outliers(of=int(bits=2, axis=channel), fraction=0.1), k_block=64, "
                "v=scaled(of=outliers(of=fp8), block=16))")))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow),
                                   torch.bfloat16], ids=str)  # the laws draw float32 first
@pytest.mark.parametrize("text", APPENDED)
def test_appending_stores_the_same_bits(text, dtype):
    assert "kvc::append_one" in appended_alike(text, dtype)


def appended_alike(text, dtype):
    """Token by token over several blocks, the kernel stores what the body does; a row of padding
    stays as it is. The kernel's text."""
    store, rows, dims = Store.parse(text), 3, (64, 64)
    if cpp_append.unsupported(store, dims, dtype):
        pytest.fail(cpp_append.unsupported(store, dims, dtype))
    site, g = Site(0, 2, 2, dims, dtype, 0, store), torch.Generator().manual_seed(0)
    both = [Group([site, site], rows, torch.device("cpu")) for _ in range(2)]
    start = torch.tensor([0, 100, 37])
    first = torch.arange(100)[None] < start[:, None]
    each = 2 * store.members
    x = torch.randn(2, each, rows, 2, 300, 64, generator=g)
    x[..., 5] *= 40
    x = torch.where(torch.rand(x.shape, generator=g) < 0.01, 0.0, x).to(dtype)
    options = dict(store=text, slots=[1, 0])
    for group in both:
        group.reserve([300] * rows)
        APPEND(group.planes, [*x[0, ..., :100, :]], [*x[1, ..., :100, :]],
               torch.arange(100).expand(rows, -1), first, **options)
    graph = torch.fx.Graph()
    flat = [*x[..., :1, :].flatten(0, 1).contiguous(), *both[0].planes, start.view(rows, 1),
            torch.ones(rows, 1, dtype=torch.bool)]
    nodes = [graph.placeholder(f"x{i}") for i in range(len(flat))]
    graph.call_function(APPEND, (nodes[2 * each : -2], nodes[:each], nodes[each : 2 * each],
                                 *nodes[-2:]), options)
    graph.output((nodes[-1],))
    gm = torch.fx.GraphModule({}, graph)
    with torch.no_grad(), config.patch(force_disable_caches=True):
        run, texts = run_and_get_code(lambda: compile_graph(gm, flat, [[]] * len(flat)))
    valid = torch.tensor([[True], [True], [False]])
    for t in range(100, 300):
        at = slice(t, t + 1)
        given = [*x[0, ..., at, :].contiguous()], [*x[1, ..., at, :].contiguous()]
        where = torch.full((rows, 1), t)
        APPEND(both[0].planes, *given, where, valid, **options)
        run(*given[0], *given[1], *both[1].planes, where, valid)
    for spec, a, b in zip(both[0].specs, both[0].planes, both[1].planes, strict=True):
        assert torch.equal(a, b), spec.name
    assert both[0].planes[0][0, :, 0].tolist() == [200, 300, 37]
    return "".join(texts)


@pytest.mark.parametrize("held_back, text", [
    pytest.param(held_back, text, marks=() if text == APPENDED[0] else pytest.mark.slow)
    for held_back in ("KVC_HALVES", "KVC_PORTABLE") for text in APPENDED if isinstance(text, str)])
def test_other_machines_store_the_same_bits(held_back, text, monkeypatch):
    own = (f"#define {held_back}\n", *cpp_append.headers())
    monkeypatch.setattr(cpp_append, "headers", lambda: own)
    written = appended_alike(text, torch.bfloat16)
    assert f"#define {held_back}\n" in written and "kvc::append_one" in written
