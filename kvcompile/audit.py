"""The laws on a run of a model itself: each layer's attention against the oracle in fp64.

A prompt is stored by the recipe but for its last tokens, which are decoded one by one. Every graph
of the run also gives the q, K, V and output of every layer (`tapped`), so that the exact cache is
known beside the compressed one; what the planes show is read back before each step (`view.slots`).
Three laws are checked in every layer, row and step:

    the view keeps the contract of the layer's store          what was stored
    |o - oracle(view)| <= rounding of the kernel              how it was read
    |o - oracle(exact)| <= bound + rounding                   the theorem
"""

import copy
import operator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule, Node

from kvcompile.engine import Engine
from kvcompile.errors import KVCompileError, LawError, RecipeError
from kvcompile.ir import ATTEND, ATTENTION, argument, attention_nodes
from kvcompile.laws import How, View, bound, fault, oracle
from kvcompile.own_cache import OwnCache
from kvcompile.program import Program
from kvcompile.registry import module
from kvcompile.rewrite import copy_graph
from kvcompile.rounding import Arithmetic, rounding
from kvcompile.rows import fused
from kvcompile.rule import Rule
from kvcompile.show import as_text
from kvcompile.site import Site, sites
from kvcompile.view import contract, see, selected, slots

STEPS = 8  # tokens that are decoded


@dataclass(frozen=True)
class LayerAudit:
    """The worst of a layer's steps: error and bound of the output's largest deviation relative to
    the bound, the exact softmax mass of dropped tokens, and the layer's share of the cache."""

    layer: int
    kernel: str
    error: float
    bound: float
    mass: float
    bytes: int


@dataclass(frozen=True)
class Audit:
    """What `audit` found, layer by layer; `str()` is a table."""

    recipe: str
    tokens: int
    steps: int
    layers: tuple[LayerAudit, ...]

    def __str__(self) -> str:
        table = Table("layer", "kernel", "|o' - o|", "bound", "dropped mass", "bytes",
                      box=box.SIMPLE, pad_edge=False)
        for x in self.layers:
            table.add_row(str(x.layer), x.kernel, f"{x.error:.2e}", f"{x.bound:.2e}",
                          f"{x.mass:.1e}", f"{x.bytes:,}")
        return "\n".join([f"recipe {self.recipe}: {self.steps} steps after {self.tokens} tokens",
                          "", as_text(table)])

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        return asdict(self)


def tapped(gm: GraphModule) -> GraphModule:
    """`gm`, a graph with a cache, whose outputs go on with q, k, v, o of every layer, and with the
    sinks of those that have some."""
    gm = copy_graph(gm)
    output, taps = gm.graph.output_node(), list[Node]()
    for node in gm.graph.nodes:
        if node.target in (ATTENTION, ATTEND):
            o = node if node.target is ATTENTION else next(
                n for n in node.users if n.target is operator.getitem and n.args[1] == 0)
            sinks = argument(node, "sinks")
            taps += [*(argument(node, name) for name in "qkv"), o, *([sinks] if sinks else [])]
    output.args = ((*output.args[0], *taps),)  # type: ignore[misc]
    gm.recompile()
    return gm


class Taps(NamedTuple):
    """One layer of one call: q [B, Hq, S, Dk], k, v [B, H, S, D], o [B, Hq, S, Dv]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    how: How

    def row(self, row: int, valid: Tensor) -> "Taps":
        """Of one row, its tokens only: q [Hq, S, Dk] and so on."""
        q, k, v, o = (x[row, :, valid] for x in self[:4])
        return Taps(q, k, v, o, self.how)


class Run:
    """A tapped engine and its cache; `call` keeps the exact K and V of every layer and row."""

    def __init__(self, program: Program, compile: bool) -> None:
        own = replace(program, phases={p: tapped(gm) for p, gm in program.phases.items()})
        self.engine, self.program = Engine(own, compile), program
        self.sites = program.sites
        rebuilt = [site.layer for site in self.sites if site.rebuilt]
        if rebuilt:
            raise KVCompileError(f"layer {rebuilt[0]} computes its keys anew at every read, which "
                                 "the laws do not cover: verify=False")
        self.cache = OwnCache(self.sites, str(program.recipe), "audit")
        self.seen: list[list[tuple[Tensor, Tensor]]] = []   # [layer][row] (k, v) [H, T, D]
        self.ids: list[Tensor] = []                         # [row] position ids [T]
        self.nodes = attention_nodes(program.graph_module.graph)

    def call(self, ids: Tensor, positions: Tensor, valid: Tensor) -> list["LayerAudit"]:
        """Run one call; what its queries saw, unless it is the first one."""
        before = copy.deepcopy(self.cache)
        keep = torch.arange(ids.shape[1], device=ids.device)[-1:]
        with torch.no_grad():
            self.engine.run(self.cache, ids, positions, valid, keep)
        taps = iter([x.detach().cpu() for x in self.engine.taps])
        layers = [Taps(next(taps), next(taps), next(taps), next(taps), How(
            argument(n, "scale"), argument(n, "softcap"),
            next(taps) if argument(n, "sinks") else None)) for n in self.nodes]
        first, rows = not self.seen, range(len(ids))
        if first:
            self.seen = [[(x.k[b, :, :0], x.v[b, :, :0]) for b in rows] for x in layers]
            self.ids = [positions[b, :0].cpu() for b in rows]
        valid = valid.cpu()
        self.ids = [torch.cat([own, positions[b, valid[b]].cpu()])
                    for b, own in enumerate(self.ids)]
        found = []
        for layer, every in enumerate(layers):
            for b in rows:
                own = every.row(b, valid[b])
                if not first and own.k.shape[1]:
                    found.append(self._check(layer, b, before, own))
                k, v = self.seen[layer][b]
                self.seen[layer][b] = torch.cat([k, own.k], 1), torch.cat([v, own.v], 1)
        return found

    def _check(self, layer: int, row: int, cache: OwnCache, new: Taps) -> LayerAudit:
        """A row's queries, the first, middle and last, over the cache and their own tokens."""
        site, old, tokens = self.sites[layer], self.seen[layer][row], new.q.shape[1]
        held, past = slots(cache, layer, row), old[0].shape[1]
        together = [self.seen[i][row] for i in site.members or (layer,)]
        k, v = (torch.cat([x[:, :past] for x in side], -1) for side in zip(*together, strict=True))
        if self.sites[site.place[0]].rule:
            promise = selected(site.store, held[0], self.ids[row][:past], k, v)
        else:
            promise = contract(site.store, k, v, member=site.place[1])
        where = f"row {row}, {past} tokens stored"
        told = []
        for i in sorted({0, tokens // 2, tokens - 1}):
            end, q, o = past + i + 1, new.q[:, i], new.o[:, i].double()
            own = new.k[:, : i + 1], new.v[:, : i + 1]
            seen = slice(max(0, end - site.window) if site.window else 0, end)
            k, v = (torch.cat(x, 1)[:, seen] for x in zip(old, own, strict=True))
            allowed = promise.extended(i + 1)[seen]
            view = see(held, self.ids[row][:end], *own)[seen]
            if what := fault(view, allowed, k, v):
                raise LawError(f"{self._name(layer)}: the cache breaks its contract: "
                               f"{what} ({where}; passes: {', '.join(self._passes(layer))})")
            rough = rounding(q, view, new.how, self.arithmetic(site, tokens))
            limit = bound(q, k, v, allowed, new.how)
            for wanted, most, law in (
                    (oracle(q, view, new.how), rough, "what the cache shows"),
                    (oracle(q, View.exact(k, v), new.how), limit.total + rough, "exact attention")):
                off = (o - wanted).abs().nan_to_num(torch.inf)
                at = int((off / most.clamp_min(2.0**-140)).argmax())
                error, highest = float(off.flatten()[at]), float(most.flatten()[at])
                if error > highest:
                    raise LawError(f"{self._name(layer)}: the output of query head "
                                   f"{at // o.shape[-1]} is off by {error:.3g} from {law}, allowed "
                                   f"{highest:.3g} ({where})")
            told.append(LayerAudit(layer, self.kernel(site), error, highest,
                                   float(limit.mass.max()), self._bytes(site)))
        return max(told, key=_share)

    def fused(self, site: Site) -> bool:
        return self.engine.compile and "attend" not in fused(site)

    def kernel(self, site: Site) -> str:
        return "fused C++" if self.fused(site) else "eager body"

    def arithmetic(self, site: Site, tokens: int) -> Arithmetic:
        many = "cpp_attend" if tokens == 1 else "cpp_blockwise"
        name = many if self.fused(site) else "eager"
        own: Arithmetic = module("kernels", name).arithmetic(site.dtype)
        return own

    def _passes(self, layer: int) -> list[str]:
        """The passes that changed how the layer is stored."""
        known = {name: sites(gm.graph) for name, gm in self.program.snapshots.items()}
        stores = [(name, own[layer].store) for name, own in known.items() if own]
        return [name for (name, now), (_, before) in zip(stores[1:], stores) if now != before]

    def _name(self, layer: int) -> str:
        site = self.sites[layer]
        return f"layer {layer}, {site.store}, kvc.attend ({self.kernel(site)})"

    def _bytes(self, site: Site) -> int:
        if not site.leads:
            return 0
        counts = self.cache.rows if not site.rule else (
            self.cache.stored_tokens(site.layer).amax(1).tolist())
        return site.store.nbytes(site.dims, site.dtype, site.heads, counts)


def _share(x: LayerAudit) -> float:
    return x.error / max(x.bound, 1e-300)


def audit(program: Program, ids: Tensor, positions: Tensor | None = None,
          valid: Tensor | None = None, *, steps: int = STEPS, chunk: int | None = None,
          compile: bool = True) -> Audit:
    """Check the laws on `ids` [B, T]: all but the last `steps` tokens are a prompt, in pieces of
    `chunk` tokens; the others are decoded. Raises LawError naming layer, store, pass and kernel.
    """
    for rule in (Rule.parse(s.rule) for s in program.sites if s.rule):
        if rule.merge or rule.positions != "original" or "probe" in rule.needs:
            raise RecipeError(f"verify: {program.recipe} merges or turns what it keeps, or "
                              "reads the prompt twice; the laws do not cover that")
    positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
    positions = positions.expand(ids.shape)
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    start = max(1, ids.shape[1] - steps)
    edges = [*range(0, start, chunk or start), *range(start, ids.shape[1] + 1)]
    run, worst = Run(program, compile), dict[int, LayerAudit]()
    for a, b in zip(edges, edges[1:]):
        for found in run.call(ids[:, a:b], positions[:, a:b], valid[:, a:b]):
            worst[found.layer] = max(found, worst.get(found.layer, found), key=_share)
    layers = tuple(replace(x, bytes=run._bytes(run.sites[x.layer])) for x in worst.values())
    return Audit(str(program.recipe), start, ids.shape[1] - start, layers)
