"""The laws on a run of a model itself: each layer's attention against the oracle in fp64.

A prompt is stored by the recipe but for its last tokens, which are decoded one by one. Every graph
of the run also gives the q, K, V and output of every layer (`kvcompile.tapped`), so that the exact
cache is known beside the compressed one; what the planes show is read back before each step
(`view.slots`). Three laws are checked in every layer, row and step:

    the view keeps the contract of the layer's store          what was stored
    |o - oracle(view)| <= rounding of the kernel              how it was read
    |o - oracle(exact)| <= bound + rounding                   the theorem

The whole model's logits are compared with those of the stateless graph: measured, not bounded.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.checks.audit_report import Audit, LayerAudit, LogitsAudit
from kvcompile.checks.promise import contract, declared, selected, turned
from kvcompile.checks.rounding import Arithmetic, rounding
from kvcompile.checks.tapped import Taps, read, tapped
from kvcompile.checks.view import see, slots
from kvcompile.engine import Engine
from kvcompile.errors import LawError
from kvcompile.ir import attention_nodes
from kvcompile.laws import Contract, View, bound, fault, oracle
from kvcompile.own_cache import OwnCache
from kvcompile.program import Program
from kvcompile.registry import module
from kvcompile.rows import fused
from kvcompile.rule import Rule
from kvcompile.site import Site, sites
from kvcompile.store import SIDES

STEPS = 8  # tokens that are decoded


class Prompt(NamedTuple):
    """What a layer's store was given of one row's prompt, where that is not its K and V: k and v
    [H, T, D], and how far they are from these."""

    k: Tensor
    v: Tensor
    off: Contract


class Run:
    """A tapped engine and its cache; `call` keeps the exact K and V of every layer and row."""

    def __init__(self, program: Program, compile: bool) -> None:
        self.program, self.sites = program, program.sites
        self.rules = [Rule.parse(text) if (text := self.sites[s.place[0]].rule) else None
                      for s in self.sites]
        turn = [i for i, r in enumerate(self.rules) if r and r.positions != "original"]
        both = {p: tapped(gm, turn) for p, gm in program.phases.items()}
        self.names = {p: names for p, (_, names) in both.items()}
        self.engine = Engine(replace(program, phases={p: gm for p, (gm, _) in both.items()}),
                             compile)
        self.cache = OwnCache(self.sites, str(program.recipe), "audit")
        self.seen: list[list[tuple[Tensor, Tensor]]] = []   # [layer][row] (k, v) [H, T, D]
        self.ids: list[Tensor] = []                         # [row] position ids [T]
        self.prompts: dict[tuple[int, int], Prompt] = {}    # (layer, row)
        self.nodes = attention_nodes(program.graph_module.graph)

    def call(self, ids: Tensor, positions: Tensor, valid: Tensor, whole: Sequence[int] = ()
             ) -> tuple[list[LayerAudit], Tensor]:
        """Run one call; what its queries saw, unless it is the first one, and logits [B, V].
        `whole` as for `Engine.run`."""
        before = copy.deepcopy(self.cache)
        keep = torch.arange(ids.shape[1], device=ids.device)[-1:]
        with torch.no_grad():
            logits = self.engine.run(self.cache, ids, positions, valid, keep, whole=whole)
        first, rows = not self.seen, range(len(ids))
        layers = read(self.engine.taps, self.names["prefill" if first else "extend"], self.nodes)
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
        for layer, every in enumerate(layers):  # layers stored together are checked together
            for b in rows:
                own, (k, v) = every.row(b, valid[b]), self.seen[layer][b]
                self.seen[layer][b] = torch.cat([k, own.k], 1), torch.cat([v, own.v], 1)
                if first and len(self.ids[b]):
                    self._given(layer, b, own)
        return found, logits[:, -1].detach().cpu()

    def _given(self, layer: int, row: int, own: Taps) -> None:
        """Note what a rule that turns, merges or prunes gave the layer's store of the prompt."""
        rule, ids, (k, v) = self.rules[layer], self.ids[row], self.seen[layer][row]
        changes = rule is not None and (rule.merge and not rule.apart or rule.channels)
        if rule is None or not changes and rule.positions == "original":
            return
        held, off = slots(self.cache, layer, row), Contract.exact(k, v)
        if rule.positions != "original":      # exact attention is over keys that are turned as well
            assert own.angles is not None
            k, slack = turned(k, held[0], ids, own.angles, own.style)
            off, self.seen[layer][row] = replace(off, k=slack), (k, v)
        new = declared(see(held, ids, k[:, :0], v[:, :0]), k, v) if changes else (k, v)
        k_off, v_off = ((a - b).abs() for a, b in zip(new, (k, v), strict=True))
        self.prompts[layer, row] = Prompt(*new, off + replace(off, k=k_off, v=v_off))

    def _promise(self, layer: int, row: int, held: Tensor) -> Contract:
        """How far what the cache holds may be from the exact K and V."""
        site, past = self.sites[layer], self.seen[layer][row][0].shape[1]
        together = [self.seen[i][row] for i in site.members or (layer,)]
        k, v = (torch.cat(side, -1) for side in zip(*together, strict=True))
        given = self.prompts.get((layer, row))
        if given:
            k, v = (torch.cat([new.to(x.dtype), x[:, new.shape[1]:]], 1)
                    for new, x in zip(given[:2], (k, v), strict=True))
        k, v, lent = self._borrowed(site, row, k, v) if site.lent else (k, v, None)
        if self.rules[layer]:
            own = selected(site.store, held, self.ids[row][:past], k, v)
        else:
            own = contract(site.store, k, v, member=site.place[1])
            own = own + lent if lent else own
        return own + given.off.extended(past - given.k.shape[1]) if given else own

    def _borrowed(self, site: Site, row: int, k: Tensor, v: Tensor
                  ) -> tuple[Tensor, Tensor, Contract]:
        """K and V with what other layers' pages hold of them, and how far that is from these."""
        both = {"k": k.clone(), "v": v.clone()}
        for key, lender in site.lent:
            side, tier = key.split(".")
            start, end = site.store.spans(side, k.shape[1])[tier]
            first = 0 if tier == "sinks" else site.store.sinks
            at, other = slice(first + start, first + end), self.seen[lender][row]
            both[side][:, at] = other[side == "v"][:, at]
        off = [(both[s].double() - x.double()).abs() for s, x in zip(SIDES, (k, v), strict=True)]
        return both["k"], both["v"], replace(Contract.exact(k, v), k=off[0], v=off[1])

    def _check(self, layer: int, row: int, cache: OwnCache, new: Taps) -> LayerAudit:
        """A row's queries, the first, middle and last, over the cache and their own tokens."""
        site, old, tokens = self.sites[layer], self.seen[layer][row], new.q.shape[1]
        held, past = slots(cache, layer, row), old[0].shape[1]
        promise, arithmetic = self._promise(layer, row, held[0]), self.arithmetic(site, tokens)
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
            rough_keys, keys = None, new.rebuilt
            if not keys.idle:
                numbers = torch.arange(end)    # exact attention is over keys as they are turned
                numbers[site.store.numbers(past)] = torch.tensor(
                    site.store.turned_by(past), dtype=torch.long)
                numbers = numbers[seen].expand(k.shape[:2])
                rough_keys = keys.rough(view.k, site.dtype)
                k, v = keys.keys(k, numbers), keys.each(v)
                view, allowed = keys.view(view, numbers), keys.contract(allowed)
            rough = rounding(q, view, new.how, arithmetic, rough_keys)
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
        name = many if self.fused(site) and (tokens == 1 or not site.rebuilt) else "eager"
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
        return site.own.nbytes(site.dims, site.dtype, site.heads, counts)


def _share(x: LayerAudit) -> float:
    return x.error / max(x.bound, 1e-300)


def unchecked(device: torch.device) -> str:
    """What an audit on this device leaves out: kernels whose rounding no law here derives."""
    return "" if device.type == "cpu" else (
        f"NOT CHECKED: kernels on {device.type}; the plain bodies ran in their place")


def audit(program: Program, ids: Tensor, positions: Tensor | None = None,
          valid: Tensor | None = None, *, steps: int = STEPS, chunk: int | None = None,
          compile: bool = True) -> Audit:
    """Check the laws on `ids` [B, T]: all but the last `steps` tokens are a prompt, in pieces of
    `chunk` tokens; the others are decoded. Raises LawError naming layer, store, pass and kernel.
    """
    positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
    positions = positions.expand(ids.shape)
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    start = max(1, ids.shape[1] - steps)
    edges = [*range(0, start, chunk or start), *range(start, ids.shape[1] + 1)]
    missing = unchecked(ids.device) if compile else ""
    run, worst = Run(program, compile and not missing), dict[int, LayerAudit]()
    logits = []
    pieces = chunk and chunk < start and not any(rule and rule.whole for rule in run.rules)
    whole = valid[:, :start].sum(1).tolist() if pieces else ()
    for a, b in zip(edges, edges[1:]):
        told, own = run.call(ids[:, a:b], positions[:, a:b], valid[:, a:b], whole)
        logits += [own] if a >= start else []
        for found in told:
            worst[found.layer] = max(found, worst.get(found.layer, found), key=_share)
    layers = tuple(replace(x, bytes=run._bytes(run.sites[x.layer])) for x in worst.values())
    decoded = torch.arange(start, ids.shape[1], device=ids.device)
    with torch.no_grad():
        exact = run.engine.stateless(ids, positions, valid, decoded).cpu()
    there = valid[:, start:].cpu()
    off = LogitsAudit.of(exact[there], torch.stack(logits, 1)[there])
    return Audit(str(program.recipe), start, ids.shape[1] - start, layers, off, missing)
