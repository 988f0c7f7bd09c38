"""What the passes did to each layer of a program, and what became of its storage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from kvcompile.errors import KVCompileError
from kvcompile.format import PAGE, step_bytes, term_of
from kvcompile.ir import attention_nodes
from kvcompile.plan import plan
from kvcompile.program import Program
from kvcompile.recipe import Recipe
from kvcompile.registry import module
from kvcompile.rewrite import Outcome, Pass, Refused, Rewritten, copy_graph, passes, run_passes
from kvcompile.rule import Rule
from kvcompile.site import Site
from kvcompile.store import Store


@dataclass(frozen=True)
class Row:
    """What one pass did to one layer.

    `status` is rewritten, refused, or warning (a term that changes nothing there); `what` says it
    in words, and `node` is the one in the way of a refusal. `storage` is how the layer is stored
    after the pass, `before` and `after` are bytes per stored token. `kernel` is what runs the
    layer's ops in the end, `why` the reason if that is no fused kernel.
    """

    layer: int
    name: str
    status: str
    what: str
    node: str
    storage: str
    before: float
    after: float
    kernel: str
    why: str


def layer_rows(program: Program, before: Sequence[float]) -> list[Row]:
    """One row per layer and pass, layer by layer; `before` are bytes per token at the start."""
    found = [*_rewrites(program, list(before)), *_idle(program)]
    return sorted(found, key=lambda row: row.layer)


def kernel_of(site: Site) -> tuple[str, str]:
    """What runs the kvc ops of a compiled step on the CPU, and why that is no fused kernel, if so.

    Prompts and later turns attend and store by the same readers' kernels (`kvcompile.alone`), but
    for the later turns that `several` names; what is not compiled runs the plain bodies.
    """
    why = fused(site)
    if not why:
        return "fused C++", several(site)
    which = "eager body" if {"attend", "append"} <= why.keys() else f"eager {' '.join(why)}"
    lines = [f"kvc.{op} runs its plain body: {reason}" for op, reason in why.items()]
    return which, "; ".join(filter(None, [*lines, "" if "attend" in why else several(site)]))


def fused(site: Site) -> dict[str, str]:
    """For the ops of `site` that have no fused kernel on the CPU, the reason."""
    attend, append, evict = (module("kernels", f"cpp_{op}") for op in ("attend", "append", "evict"))
    shape = attend.Shape(site.heads, site.q_heads // site.heads, site.dims, site.dtype, 1.0,
                         site.window)
    found = {"attend": attend.unsupported(site.layout, shape),
             "append": append.unsupported(site.layout, site.dims, site.dtype)}
    if site.salient:
        found["rank"] = f"it notes scores, and orders {PAGE} tokens at a time"
    elif site.rule and site.store.slots:
        found["evict"] = evict.unsupported(site.layout, [site.rule])
    return {op: reason for op, reason in found.items() if reason}


def several(site: Site) -> str:
    """Why calls of several tokens attend to what is stored by the plain body, if they do."""
    reasons = {"rebuild keys": site.rebuilt, "read a compensation token": site.layout.rest,
               "add up what each token is given": site.rule and Rule.parse(site.rule).observes}
    found = " and ".join(reason for reason, holds in reasons.items() if holds)
    return found and f"calls of several tokens {found} in the plain body of kvc.attend"


def stored(site: Site) -> str:
    """`storage` of a layer, and which others lie in it, or whose it reads."""
    if site.owner is not None:
        return f"that of layer {site.owner}"
    others = [str(layer) for layer in site.members if layer != site.layer]
    lines = [storage(site.store), f"with layer {', '.join(others)}" if others else ""]
    for side in site.store.sides:
        tiers = {key: lender for key, lender in site.lent if key.startswith(side)}
        older = "" if len(tiers) == len(site.store.tiers(side)) else "older "
        lines += dict.fromkeys(f"{older}{side.upper()} of layer {j}" for j in tiers.values())
    return "\n".join(filter(None, lines))


def storage(store: Store) -> str:
    """A store in short: a line for K and one for V (one if alike), and one for what is kept."""
    lines = []
    for side in map(store.side, store.sides):
        block = f", {side.block} at a time" if side.block > side.format.step else ""
        lag = f", last {side.lag} exact" if side.lag else ""
        lines.append(f"{term_of(side.format)}{block}{lag}")
    if store.v_in_k:
        lines = [f"K {lines[0]}, V is part of K"]
    elif lines[0] == lines[1]:
        lines = [f"K, V {lines[0]}"]
    else:
        lines = [f"K {lines[0]}", f"V {lines[1]}"]
    kept = [f"{word} {n}" for word, n in (("first", store.sinks), ("last", store.window)) if n]
    if kept:
        lines.append(f"{' and '.join(kept)} tokens" + ("" if store.window else " exact")
                     + ", side by side" * store.side_by_side)
    return "\n".join(lines)


def bytes_per_token(site: Site) -> float:
    """Bytes of one token's K and V in the tier where tokens end up; pages are not rounded up."""
    total, members = 0.0, site.store.members
    if site.owner is not None:
        return total
    for side, dim in zip(site.store.sides, site.dims, strict=False):
        tier = "body" if "body" in site.store.tiers(side) else "recent"
        if f"{side}.{tier}" in dict(site.lent):
            continue
        fmt = site.store.format(side, tier)
        total += site.heads * step_bytes(fmt, dim * members, site.dtype, side) / fmt.step
    return total / members


def _rewrites(program: Program, before: list[float]) -> Iterator[Row]:
    last = program.sites
    for name, outcomes in program.outcomes.items():
        sites = program.after(name).sites or last  # a graph with a cache has no attention left
        for layer in sorted({outcome.layer for outcome in outcomes}):
            own = [outcome for outcome in outcomes if outcome.layer == layer]
            refused = next((o for o in own if isinstance(o, Refused)), None)
            if refused:
                told = ("refused", refused.reason, refused.node)
            else:
                told = ("rewritten", ", ".join(o.what for o in own if isinstance(o, Rewritten)), "")
            after = bytes_per_token(sites[layer])
            yield Row(layer, name, *told, stored(sites[layer]), before[layer], after,
                      *kernel_of(last[layer]))
            before[layer] = after


def _idle(program: Program) -> Iterator[Row]:
    """A warning wherever a term claims a layer and the passes do the same without it."""
    terms, sites = program.recipe.terms, program.sites
    now, every = _effects(program, program.recipe), plan(program.recipe, len(sites))
    for i, term in enumerate(terms):
        claimed = [any(whole.get(a) == v for a, v in own.values.items()) for own, whole in
                   zip(plan(Recipe((term,)), len(sites)), every, strict=True)]
        others = terms[:i] + terms[i + 1 :]
        if not any(claimed):
            continue
        try:
            without = _effects(program, Recipe(others) if others else Recipe.parse("full"))
        except KVCompileError:  # the others cannot stand without it
            continue
        for site in sites:
            if claimed[site.layer] and now[site.layer] == without[site.layer]:
                size = bytes_per_token(site)
                yield Row(site.layer, "recipe", "warning", f"{term} changes nothing here", "",
                          stored(site), size, size, *kernel_of(site))


def _effects(program: Program, recipe: Recipe) -> list[list[str]]:
    """Per layer, what each pass says of it under `recipe`, and its storage at the end."""
    start = program.snapshots["capture"]
    gm = copy_graph(start)
    gm.meta.update(program.graph_module.meta)
    told: list[list[str]] = [[] for _ in attention_nodes(gm.graph)]

    def note(p: Pass, _: GraphModule, outcomes: list[Outcome], __: float) -> None:
        for outcome in outcomes:
            told[outcome.layer].append(f"{p.name} {outcome}")

    run_passes(passes(), gm, plan(recipe, len(told)), note)
    for site in Program(program.name, gm, recipe).sites:
        told[site.layer].append(stored(site))
    return told
