"""select: which tokens stay. attention(store) -> attention(store with sinks and window, rule)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE
from kvcompile.ir import ROPE, argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.recipe import Term
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.rule import Rule, options, words
from kvcompile.site import halves, owners
from kvcompile.store import Store
from kvcompile.structure.beside import output_weight, rotary

KEEP = "keep."


@dataclass(frozen=True)
class Select:
    """Keep the first `sinks` and the last `window` tokens; drop the others when one more arrives.

    Without a window none are dropped: the first ones are stored exactly, whatever the format.
    Layers with an attention window of their own keep no more than it shows (`Store.of`). With
    `positions=slot` keys are turned at read to lie side by side.

    The axes `keep.*` are the fields of a `Rule`: scores decide which of a prompt's tokens are
    stored, head by head, and with `keep.every` which stay while decoding; `keep.channels` which
    channels of its keys are. Layers with a window of
    their own are left as they are.
    """

    name: ClassVar[str] = "select"
    order: ClassVar[int] = 50
    axes: ClassVar[tuple[str, ...]] = ("sinks", "window", "positions", *(KEEP + name for name in (
        "score", "budget", "sinks", "recent", "every", "merge", "positions", "channels",
        "salient")))

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        nodes = attention_nodes(gm.graph)
        shared = owners(nodes)
        told = "both would have to keep the same tokens"
        bound = {lender: f"layer {i} reads its {side.upper()} too: {told}"
                 for i, side, lender in reversed(halves(nodes))}
        bound |= {i: f"its {side.upper()} is layer {lender}'s: {told}"
                  for i, side, lender in halves(nodes)}
        ruled = [i for i, own in enumerate(plan) if said(own) and i not in shared and i not in bound
                 and not any(argument(nodes[i], n) for n in ("window", "basis", "cos"))]
        for index, node in enumerate(nodes):
            axes = {a: v for a, v in plan[index].values.items() if a in self.axes}
            if said(plan[index]) and index in shared:
                outcomes.append(Rewritten(index, f"as layer {shared[index]}"))
                continue
            if said(plan[index]) and index in bound:
                outcomes.append(Refused(index, bound[index], node.name))
                continue
            if said(plan[index]):
                outcomes.append(_rule(node, axes, index, ruled, plan[index]))
                continue
            kept = Store.of(axes, argument(node, "window"))
            if not kept.window and not kept.sinks:
                continue
            beside = axes.get("positions") == "slot" and kept.sinks > 0 and kept.window > 0
            if beside and argument(node, "cos") is None:
                raise RecipeError(f"{plan[index].origin['positions']}: layer {index}: positions="
                                  "slot: its keys are not cached before a rotation (see place)")
            store = replace(Store.parse(argument(node, "store")), sinks=kept.sinks,
                            window=kept.window, side_by_side=beside)
            node.kwargs = cast(Any, {**node.kwargs, "store": str(store)})
            first = f"{kept.sinks} first" if kept.sinks else ""
            last = f"{kept.window} last" if kept.window else "all others"
            outcomes.append(Rewritten(index, " and ".join(filter(None, (first, last))) + " tokens"
                                      + ", positions side by side" * beside))
        return outcomes


def said(own: LayerPlan) -> Term | None:
    """The term that gives a layer a rule."""
    return own.origin.get(KEEP + "score") or own.origin.get(KEEP + "channels")


def _rule(node: Node, axes: Mapping[str, Any], index: int, ruled: list[int], own: LayerPlan
          ) -> Outcome:
    """Give a layer its rule, numbered among the layers that have one."""
    term = said(own)
    assert term
    if "window" in axes:
        raise RecipeError(f"'{own.origin['window'].name}' and '{term.name}' both say which tokens "
                          "stay; give them different layers=")
    if argument(node, "basis") is not None or argument(node, "cos") is not None:
        return Refused(index, "its keys are rebuilt at every read; scores need them as they are",
                       node.name)
    if window := argument(node, "window"):
        store = Store.of({}, window)
        node.kwargs = cast(Any, {**node.kwargs, "store": str(replace(
            Store.parse(argument(node, "store")), sinks=0, window=store.window))})
        return Refused(index, f"the layer keeps its own window of {window} tokens", node.name)
    rule = rule_of(axes, ruled.index(index), len(ruled))
    assert rule.scorer and rule.budgeter  # names and options are checked here
    if rule.pruner and (rule.positions != "original" or rule.merge):
        what = "turned" if rule.positions != "original" else "merged"
        raise RecipeError(f"{own.origin[KEEP + 'channels']}: layer {index}: kept keys are {what} "
                          f"by {term.name}, which fills channels that are dropped")
    if rule.apart and rule.observes:
        raise RecipeError(f"{term}: layer {index}: {rule.score.name} asks what each token gets of "
                          "the weights, which one slot for all dropped tokens changes")
    _, heads, _, dim = argument(node, "k").meta["val"].shape
    problem = rule.unfit(heads, dim) or rule.short(heads) or _missing(node, rule)
    if problem:
        raise RecipeError(f"{term.brief}: layer {index}: {problem}")
    node.kwargs = cast(Any, {**node.kwargs, "rule": str(rule)})
    drops = "" if not rule.every else ", and while decoding"
    tokens = f"tokens by {rule.score}, {rule.budget}{drops}" if KEEP + "score" in axes else ""
    floor = words(*rule.stays(0))
    tokens += f"; at least {floor}" if tokens and floor else ""
    if rule.salient:
        tokens = f"{rule.salient} of {PAGE} tokens in the upper tier, by {rule.score}"
    channels = f"channels of K by {rule.channels}" if rule.channels else ""
    return Rewritten(index, "; ".join(filter(None, (tokens, channels))))


def rule_of(axes: Mapping[str, Any], layer: int, layers: int) -> Rule:
    """The rule that a layer's axes spell, number `layer` of the `layers` that have one."""
    given = {a.removeprefix(KEEP): v for a, v in axes.items() if a.startswith(KEEP)}
    place = {"layer": layer, "layers": layers}
    return Rule(**{n: _placed(v, place) for n, v in given.items()}, **place)  # type: ignore[arg-type]


def _placed(value: Any, place: Mapping[str, int]) -> Any:
    """Budgets with the fields `layer` and `layers` are told which it is, wherever they stand."""
    if not isinstance(value, Term):
        return value
    args = tuple((name, _placed(x, place)) for name, x in value.args)
    told = tuple(place.items()) if place.keys() <= options("budget", value.name) else ()
    return Term(value.name, (*args, *told))


def _missing(node: Node, rule: Rule) -> str:
    """What the rule reads and the graph does not show."""
    if "weight" in rule.needs and output_weight(node) is None:
        return f"{rule.score.name} reads the weight after attention, which was not found"
    turned = argument(node, "k").target is ROPE
    if "angles" in rule.needs and turned and rotary(node)[0] is None:
        return f"{rule.score.name} reads rotary angles, which were not found"
    if rule.positions != "original" and rotary(node)[0] is None:
        return f"positions={rule.positions}: the rotary angles were not found"
    return ""


PASS = Select()
