"""A layer's cache with random tokens, to compare Triton's kernels with the plain bodies."""

import torch

from kvcompile.ir import APPEND, ATTEND
from kvcompile.kernels import evict, triton_attend, triton_launch
from kvcompile.kernels.triton_source import interpreted
from kvcompile.planes import Group
from kvcompile.site import Site
from kvcompile.store import Store

TABLE = ("[-0.95, -0.8, -0.65, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, "
         "0.95]")
STORES = {  # what the recipes make, and the corners of the formats
    "full": "store",
    "fp16": "store(k=dense(dtype=fp16), v=dense(dtype=fp16))",
    "window": "store(sinks=4, window=140)",
    "kivi2": "store(k=int(bits=2, axis=channel, group=32), k_block=128, v=int(bits=2), v_lag=128)",
    "kivi4": "store(k=int(bits=4, axis=channel, group=16), k_block=32, v=int(bits=4), v_lag=20)",
    "kivi8": "store(k=int(bits=8, axis=channel, group=32), k_block=32, v=int, v_lag=32, sinks=3, "
             "window=170)",
    "int8": "store(k=int, v=int)",
    "symmetric": "store(k=int(bits=4, symmetric=true), k_lag=5, v=int(bits=4, symmetric=true, "
                 "axis=channel), v_block=32)",
    "clip": "store(k=int(bits=4, clip=0.9), v=int(bits=2, clip=0.8))",
    "fp8": "store(k=fp8, v=fp8(kind=e5m2))",
    "nf4": "store(k=nf4(axis=channel, group=32), k_block=32, k_lag=32, v=nf4, v_lag=32)",
    "nuq": f"store(k=nuq(table={TABLE}, axis=channel, group=128), v=nuq(table={TABLE}), sinks=1)",
    "quarot": "store(k=hadamard(of=int(bits=4)), k_lag=16, v=hadamard(of=int(bits=4)), v_lag=16)",
    "centered": "store(k=centered(of=int(bits=4, symmetric=true), block=32), "
                "v=centered(of=fp8, block=16))",
    "zipcache": "store(k=int(bits=4, axis=channel), k_block=32, v=scaled(of=int(bits=4), block=64),"
                " v_block=64)",
    "nested": "store(k=centered(of=hadamard(of=int(bits=8)), block=16), v=scaled(of=centered("
              "of=hadamard(of=int(bits=8)), block=16), block=64), v_block=64)",
    "mixed": "store(k=mixed(high=dense, low=int(bits=2, axis=channel, group=32)), k_block=128, v="
             "scaled(of=mixed(high=scaled(of=int(bits=4, axis=channel, group=16), block=16), low="
             "nf4(axis=channel, group=16), salient=96), block=128), v_block=128)",
    "gear": "store(k=lowrank(of=outliers(of=int(bits=2, axis=channel), fraction=0.05)), "
            "v=lowrank(of=outliers(of=int(bits=2)), rank=2))",
    "outliers": f"store(k=outliers(of=nuq(table={TABLE}, axis=channel, group=64), fraction=0.03), "
                f"v=outliers(of=nuq(table={TABLE}, group=32), fraction=0.05), sinks=1)",
    "latent": "store(k=int(bits=4, axis=channel), k_block=32, k_lag=8, v_in_k=true, sinks=2)",
    "latent-turned": "store(k=hadamard(of=int(bits=4)), k_lag=16, v_in_k=true)",
    "slots": "store(k=int(bits=2, axis=channel), k_block=128, v=int(bits=2), v_lag=128, "
             "slots=true)",
    "minicache+kivi": "store(k=direction(of=int(bits=2, axis=channel)), k_block=128, "
                      "v=direction(of=int(bits=2)), v_block=128, members=2)",
    "minicache": "store(k=direction(kept=3), k_block=128, v=direction(of=int(bits=4)), v_block=128,"
                 " members=2)",
    "channels": "store(k=channels(drop=0.3, of=int(bits=4, axis=channel), block=32), k_lag=9)",
    "subspace": "store(k=subspace(rank=16), k_lag=64, v=subspace(of=int(bits=8), basis=same), "
                "members=2)",
    "tail": "store(k=tail(of=int(bits=4, axis=channel), drop=9), k_block=64, k_lag=32, "
            "v=tail(of=int(bits=2, group=16)))",
    "rest": "store(v=int, slots=true, rest=true)",
}
APPENDED = [name for name in STORES if name not in ("channels", "subspace")]  # no writers

MOVED = ("store(slots=true)", "store(k=int, v=int(bits=2), slots=true)",
         "store(k=nf4, v=hadamard(of=int(bits=4, symmetric=true)), slots=true)",
         "store(k=fp8, v=outliers(of=int(bits=4), fraction=0.1), slots=true)")


class Case:
    """`lengths` tokens in the rows of one layer of two, and `tokens` queries more for each.

    `step` is where the kernels run: the CPU by the interpreter, or a GPU.
    """

    def __init__(self, store, lengths=(0, 17, 300), heads=1, group=3, dims=(32, 32),
                 dtype=torch.float32, tokens=1, padding=False, sinks=False, device="cpu",
                 **options):
        self.store, self.dtype, self.options = Store.parse(store), dtype, options
        self.heads, self.group, self.dims = heads, group, dims
        site = Site(0, heads * group, heads, dims, dtype, options.get("window", 0), self.store)
        rows, most = len(lengths), max(lengths)
        g = torch.Generator().manual_seed(0)
        members = self.store.members
        k, v = (torch.randn(members, rows, heads, most, d, generator=g).to(dtype) for d in dims)
        k[..., 5] *= 8                                              # an outlier channel
        v = k[..., : dims[1]] if self.store.v_in_k else v
        self.planes = Group([site, site], rows, torch.device("cpu"))
        self.planes.reserve([n + tokens for n in lengths])
        valid = torch.arange(most)[None] < torch.tensor(lengths)[:, None]
        APPEND(self.planes.planes, [*k], [*v], valid.long(), valid, store=str(self.store),
               slots=[1])
        self.q = torch.randn(rows, heads * group, tokens, dims[0], generator=g).to(dtype)
        self.k, self.v = (torch.randn(rows, heads, tokens, d, generator=g).to(dtype) for d in dims)
        self.v = self.k[..., : dims[1]] if self.store.v_in_k else self.v
        self.seen_k, self.seen_v = torch.cat([k[-1], self.k], 2), torch.cat([v[-1], self.v], 2)
        if members > 1:
            self.options["member"] = members - 1
        self.valid = torch.ones(rows, tokens, dtype=torch.bool)
        if padding:                                                 # holes; a row of padding
            self.valid = torch.rand(rows, tokens, generator=g) > 0.3
            self.valid[-1] = tokens > 1
        self.sinks = torch.randn(heads * group, generator=g) if sinks else None
        self.device = device

    def arguments(self, wide=False, device="cpu"):
        """The op's arguments; `wide`: in fp32, whose decoded numbers are not rounded."""
        q, k, v = (x.float() if wide else x for x in (self.q, self.k, self.v))
        given = (q, k, v, self.planes.planes, self.valid.long(), self.valid, self.sinks)
        return tuple(_to(x, device) for x in given), dict(
            scale=self.dims[0] ** -0.5, store=str(self.store), slot=1, **self.options)

    def check(self):
        given, options = self.arguments(wide=True)
        want, want_lse, want_mass = ATTEND(*given, **options)
        given, options = self.arguments(device=self.device)
        got, lse, mass = (x.cpu() for x in triton_launch.attend(*given, **options))
        assert got.dtype == self.dtype and got.shape == want.shape
        off = ~self.valid[:, None, :].expand_as(lse)
        assert (got[off] == 0).all() and (lse[off] == -torch.inf).all()
        logit, bound = self.bounds(want)
        error = (got.float() - want).abs().max()
        assert error <= bound, (float(error), float(bound))
        both = torch.isfinite(want_lse)
        error = (lse - want_lse)[both].abs().max() if both.any() else 0.0
        assert error <= logit + 1e-6, (float(error), float(logit))
        assert mass.shape == want_mass.shape
        if mass.numel():  # a weight is right to twice a logit's error, and its queries add up
            error, most = (mass - want_mass).abs().max(), want_mass.max()
            assert error <= 4 * (logit + 1e-6) * most, (float(error), float(logit))

    def bounds(self, want):
        """Rounding of a logit, and of an output.

        gamma(D) of sum |q||k| twice, tokens' worth of sums; for 16-bit models K, V and the weights
        (and q where a format turns it) are rounded once to the model's dtype. The interpreter cuts
        bf16 off where a GPU rounds: a whole step, eps, instead of half. Softcaps below 2^-18.
        """
        eps, (dk, _) = 2.0**-24, self.dims
        q = self.q.float().unflatten(1, (self.heads, self.group)).abs()
        reach = torch.einsum("bhgsd,bhtd->bhgst", q, self.seen_k.float().abs()).max()
        reach = 2 * float(reach) * dk**-0.5                         # stored keys may be larger
        step = 0.0 if self.dtype is torch.float32 else torch.finfo(self.dtype).eps
        turned = sum(bool(triton_attend.turns(self.store, s, d))
                     for s, d in zip("kv", self.dims, strict=True))
        logit = reach * (2 * (dk + 4) * eps + (1 + turned) * step)
        logit += self.options.get("softcap", 0.0) * 2.0**-18
        peak = 2 * float(self.seen_v.float().abs().max())
        tokens = self.seen_k.shape[2]
        share = torch.expm1(torch.tensor(2 * logit)) + 2 * tokens * eps + 8e-7 + (2 + turned) * step
        return logit, float(share) * peak + step * float(want.abs().max())


def stored_alike(store, steps=(171, 1, 7), dims=(32, 32), dtype=torch.float32, heads=1, rows=1,
                 slots=(0,), device="cpu", own=False):
    """Append random tokens, some of them padding, by the body and by the kernel; compare bits.
    Returns how many bytes were compared.

    `own`: each head stores tokens of its own. The factors of a low-rank correction are compared by
    their product: signs are free, and each number of both is rounded to fp16.
    """
    parsed = Store.parse(store)
    site = Site(0, heads, heads, dims, dtype, 0, parsed)
    g = torch.Generator().manual_seed(1)
    body, kernel = (Group([site, site], rows, torch.device("cpu")) for _ in range(2))
    for group in (body, kernel):
        group.reserve([sum(steps)] * rows)
    ours, compared = _to(kernel.planes, device), 0
    for tokens in steps:
        k, v = ([torch.randn(rows, heads, tokens, d, generator=g).to(dtype)
                 for _ in range(len(slots) * parsed.members)] for d in dims)
        for i, x in enumerate([*k, *v]):  # zeros, of one of two members and of both
            x[..., 3 + i % 2 :: 7, :] = 0
            x[..., 5::7, :] = 0
        v = [x[..., : dims[1]] for x in k] if parsed.v_in_k else v
        valid = torch.rand(rows, *[heads] * own, tokens, generator=g) > 0.2
        if tokens == 1:
            valid[0] = True
        options = dict(store=str(parsed), slots=[*slots])
        APPEND(body.planes, k, v, valid.long(), valid, **options)
        triton_launch.append(ours, *_to((k, v, valid.long(), valid), device), **options)
        for spec, want, got in zip(body.specs, body.planes, ours, strict=True):
            if spec.name.endswith(("body.a", "body.b")):
                continue
            same = want.contiguous().view(torch.uint8) == got.cpu().contiguous().view(torch.uint8)
            assert same.all(), f"{spec.name}: {int((~same).sum())} bytes of {same.numel()} differ"
            compared += same.numel()
    for i in (i for i, spec in enumerate(body.specs) if spec.name.endswith("body.a")):
        want, got = (x[i].float().mT @ x[i + 1].float()
                     for x in (body.planes, [p.cpu() for p in ours]))
        each = body.planes[i].float().abs().mT @ body.planes[i + 1].float().abs()
        assert (want - got).abs().max() <= 2.0**-9 * each.max() and want.any()
    return compared


def moved_alike(store, dims=(32, 32), dtype=torch.bfloat16, device="cpu"):
    """Tokens of some heads move to places of others, by the body and by the kernel; bits. Returns
    how many planes changed, all that hold tokens."""
    parsed, slots = Store.parse(store), 256
    g = torch.Generator().manual_seed(2)
    group = Group([Site(0, 4, 2, dims, dtype, 0, parsed)] * 2, 2, torch.device("cpu"))
    group.reserve([slots] * 2)
    for plane, spec in zip(group.planes, group.specs, strict=True):
        if spec.shape:
            raw = plane.view(torch.uint8)
            raw.copy_(torch.randint(0, 256, raw.shape, generator=g, dtype=torch.uint8))
    sources = torch.full((2 * 2, slots), -1, dtype=torch.int32)
    for row in sources[1:]:                                        # nothing moves in the first
        many = int(torch.randint(1, 40, (), generator=g))
        order = torch.randperm(slots, generator=g)
        row[order[:many]] = order[many : 2 * many].int()
    ours = [p.to(device) if device != "cpu" else p.clone() for p in group.planes]
    before = [p.clone() for p in group.planes]
    evict.move(evict.heads_of(parsed, dims, dtype, group.planes, slice(1, 2)), dims, dtype, sources)
    triton_launch.move(evict.heads_of(parsed, dims, dtype, ours, slice(1, 2)), dims, dtype,
                       sources.to(device))
    changed = 0
    for spec, want, got, old in zip(group.specs, group.planes, ours, before, strict=True):
        assert torch.equal(want.view(torch.uint8), got.cpu().view(torch.uint8)), spec.name
        changed += not torch.equal(want.view(torch.uint8), old.view(torch.uint8))
    assert changed == sum(bool(spec.shape) for spec in group.specs)
    return changed


def _to(x, device):
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return type(x)(_to(y, device) for y in x) if isinstance(x, list | tuple) else x


assert interpreted() or torch.cuda.is_available(), "neither the interpreter nor a GPU"
