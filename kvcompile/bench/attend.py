"""kvc.attend alone, compiled, over distinct data that no cache holds, beside torch's SDPA."""

import operator
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvcompile.backend.inductor import compile_graph
from kvcompile.bench.row import Row, Target
from kvcompile.bench.settings import Settings
from kvcompile.bench.timing import in_turn, seconds
from kvcompile.errors import KVCompileError
from kvcompile.ir import APPEND, ATTEND
from kvcompile.plan import plan
from kvcompile.planes import Group
from kvcompile.registry import module
from kvcompile.site import Site
from kvcompile.store import Store

HEADS = {"9/3 heads of 64": (9, 3, 64), "32/8 heads of 128": (32, 8, 128)}
RECIPES = {"int4, groups of 32": ("kivi(bits=4)", 8), "int4, groups of 64":
           ("kivi(bits=4, group=64)", 8), "int8": ("int8", 4), "int2": ("kivi(bits=2)", 10),
           "bf16": ("full", 1.8)}
DTYPE = torch.bfloat16
LAYERS = 8  # layers that one compiled call attends in, as a decode step does in all of its own
SHARE = 0.6  # of the streaming bandwidth


class Attend:
    """Layers of one recipe's cache, filled with `tokens` tokens each, and a query to all of them.

    At least `mib` MiB of distinct memory: one layer's K and V are encoded, and the codes copied.
    With `pages` all tokens lie in so many pages of each tier, which caches hold.
    """

    def __init__(self, recipe: str, heads: tuple[int, int, int], tokens: int, mib: int,
                 pages: int = 0) -> None:
        q_heads, kv_heads, dim = heads
        store = Store.of(plan(recipe, 1)[0].values)
        site = Site(0, q_heads, kv_heads, (dim, dim), DTYPE, 0, store)
        self.run = compiled(site)
        self.nbytes = store.nbytes(site.dims, DTYPE, kv_heads, [tokens])  # of a layer
        self.specs, first = store.planes(site.dims, DTYPE), _filled(site, tokens)
        if pages:
            for spec, plane in zip(self.specs, first, strict=True):
                if spec.name.endswith(".table"):
                    plane.remainder_(pages)
        self.copies = [first]
        self.copies += [[x.clone() for x in first]
                        for _ in range(1, _times(mib, LAYERS * self.nbytes))]
        self.layers = LAYERS * len(self.copies)
        self.new = [torch.randn(1, h, 1, dim).to(DTYPE) for h in (q_heads, kv_heads, kv_heads)]
        self.at = [torch.tensor([[tokens]]), torch.ones(1, 1, dtype=torch.bool)]

    def __call__(self) -> None:
        for planes in self.copies:
            self.run(*self.new, *planes, *self.at)


class Dense:
    """torch's SDPA of one query to several layers of dense K and V, in one layout and type."""

    def __init__(self, layout: str, dtype: torch.dtype, heads: tuple[int, int, int], tokens: int,
                 mib: int) -> None:
        q_heads, kv_heads, dim = heads
        self.share = q_heads // kv_heads
        one = torch.randn(2, 1, kv_heads, tokens, dim).to(dtype)
        self.layers = _times(mib, one.nbytes, least=2)
        self.kv = [one.clone() for _ in range(self.layers)]
        self.q = torch.randn(1, q_heads, 1, dim).to(dtype)
        self.attend: Callable[[Tensor, Tensor], Tensor] = getattr(self, layout)

    def gqa(self, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(self.q, k, v, enable_gqa=True)

    def folded(self, k: Tensor, v: Tensor) -> Tensor:
        """The query heads of a kv head as its queries."""
        return sdpa(self.q.unflatten(1, (-1, self.share)).squeeze(3), k, v)

    def expanded(self, k: Tensor, v: Tensor) -> Tensor:
        """K and V repeated for every query head, as transformers does."""
        k, v = (x.repeat_interleave(self.share, 1) for x in (k, v))
        return sdpa(self.q, k, v)

    def __call__(self) -> None:
        for k, v in self.kv:
            self.attend(k, v)


LAYOUTS = tuple(f"{layout} {dtype}" for dtype in ("float32", "bfloat16", "float16")
                for layout in ("gqa", "folded", "expanded"))


def rows(settings: Settings) -> Iterator[Row]:
    """Time and bandwidth of every recipe's kernel at one length, for both head shapes."""
    tokens = settings.tokens or (8192 if settings.quick else 32768)
    rounds = 5 if settings.quick else 9
    for i, (shape, heads) in enumerate(HEADS.items()):
        fast = _fastest(heads, tokens, settings.mib)
        chosen = list(RECIPES.items())[: 1 if settings.quick and i else None]
        for name, (recipe, factor) in chosen:
            what = f"attend {name}, {shape}, {tokens:,} tokens"
            try:
                ours = Attend(recipe, heads, tokens, settings.mib)
            except KVCompileError as error:
                yield Row("attend", what, "ms", note=str(error))
                continue
            probed = len(settings.bandwidth.samples)
            times = in_turn({"ours": ours, **fast}, rounds, between=settings.bandwidth)
            each = {peer: [1e3 * t / fast[peer].layers for t in times[peer]] for peer in fast}
            peer = min(each, key=lambda name: median(each[name]))
            took = [1e3 * t / ours.layers for t in times["ours"]]
            yield Row("attend", what, "ms a layer", took, f"SDPA {peer}", each[peer],
                      target=Target(">=", factor))
            yield Row("attend", f"{what}: bytes read", "GB/s",
                      [ours.nbytes / t / 1e6 for t in took], "streaming",
                      settings.bandwidth.since(probed), inverse=True, target=Target(">=", SHARE))


def _fastest(heads: tuple[int, int, int], tokens: int, mib: int) -> dict[str, Dense]:
    """The two fastest of torch's layouts and types; the others are freed again."""
    took = {}
    for name in LAYOUTS:
        layout, dtype = name.split()
        call = Dense(layout, getattr(torch, dtype), heads, tokens, 0)
        call()
        took[name] = min(seconds(call) for _ in range(2))
    best = sorted(took, key=took.__getitem__)[:2]
    return {name: Dense(name.split()[0], getattr(torch, name.split()[1]), heads, tokens, mib)
            for name in best}


@cache
def compiled(site: Site) -> Callable:
    """One query's attention in each of LAYERS layers like `site`, for any number of tokens.

    Raises KVCompileError where there is no kernel and the plain body would be timed.
    """
    cpp = module("kernels", "cpp_attend")
    scale = site.dims[0] ** -0.5
    why = cpp.unsupported(site.layout, cpp.Shape(site.heads, site.q_heads // site.heads, site.dims,
                                                site.dtype, scale))
    if why:
        raise KVCompileError(f"no kernel: {why}")
    group, sizes = Group([site] * LAYERS, 1, torch.device("cpu")), count(2)
    pages: dict[str, int] = {}
    inputs = [torch.empty(1, h, 1, site.dims[0], dtype=DTYPE)
              for h in (site.q_heads, site.heads, site.heads)]
    dynamic: list[list[int]] = [[], [], []]
    for spec, plane in zip(group.specs, group.planes, strict=True):
        tier, name = spec.name.rpartition(".")[::2]
        key = f"{tier} table" if name == "table" else tier
        if tier and key not in pages:
            pages[key] = next(sizes)  # of its own for whatever may vary by itself
        inputs.append(plane.new_empty(pages[key], *spec.shape) if spec.shape else
                      plane.new_empty(*plane.shape[:3], pages[key]) if tier else plane)
        dynamic.append([0] if spec.shape else [3] if tier else [])
    inputs += [torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)]
    graph = torch.fx.Graph()
    q, k, v, *planes, positions, valid = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    outputs = [graph.call_function(operator.getitem, (graph.call_function(
        ATTEND, (q, k, v, planes, positions, valid, None),
        {"scale": scale, "store": str(site.layout), "slot": slot}), 0)) for slot in range(LAYERS)]
    graph.output(tuple(outputs))
    return compile_graph(torch.fx.GraphModule({}, graph), inputs, [*dynamic, [], []])


def _filled(site: Site, tokens: int) -> list[Tensor]:
    """Planes of LAYERS layers with the same content in memory of their own."""
    group = Group([site] * LAYERS, 1, torch.device("cpu"))
    group.reserve([tokens])
    k, v = (torch.randn(1, site.heads, tokens, dim).to(site.dtype) for dim in site.dims)
    at = torch.arange(tokens)[None]
    APPEND(group.planes, [k], [v], at, torch.ones_like(at, dtype=torch.bool),
           store=str(site.layout), slots=[0])
    for spec, plane in zip(group.specs, group.planes, strict=True):
        if spec.shape or spec.name == "count":
            layers = plane.unflatten(0, (LAYERS, -1))
            layers[1:] = layers[:1].clone()
    return group.planes


def _times(mib: int, nbytes: int, least: int = 1) -> int:
    """How often `nbytes` make `mib` MiB, rounded up."""
    return max(least, -(-mib * 2**20 // nbytes))
