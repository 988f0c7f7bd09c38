"""evict: a layer whose rule drops tokens while decoding knows the score of each that it holds, and
one that compensates for what it drops has a slot for that; so does one with tiers by score."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, Format, format_of, term_of
from kvcompile.ir import argument, attention_nodes
from kvcompile.passes.select import said
from kvcompile.plan import LayerPlan
from kvcompile.recipe import Term
from kvcompile.rewrite import Outcome, Rewritten
from kvcompile.rule import Rule
from kvcompile.store import SIDES, Store


@dataclass(frozen=True)
class Evict:
    """attention(store, rule) -> attention(store with slots, rule), where the rule has `every`;
    with `rest`, where what it drops is `apart`.

    Tokens leave one by one where each is stored by itself. Where a format encodes several together
    or tokens wait before they are encoded, whole pages of the body leave, since nothing is ever
    encoded twice.
    """

    name: ClassVar[str] = "evict"
    order: ClassVar[int] = 65
    axes: ClassVar[tuple[str, ...]] = ()

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for index, node in enumerate(attention_nodes(gm.graph)):
            rule = Rule.parse(argument(node, "rule")) if argument(node, "rule") else None
            if rule and argument(node, "members"):
                raise RecipeError(f"{said(plan[index])}: layer {index} is stored "
                                  "together with another, which would keep other tokens")
            store = Store.parse(argument(node, "store"))
            if tiered(store) and not (rule and rule.salient):
                store = replace(store, k=replace(store.k, format=upper(store.k.format)),
                                v=replace(store.v, format=upper(store.v.format)))
                node.kwargs = cast(Any, {**node.kwargs, "store": str(store)})
                outcomes.append(Rewritten(index, "all tokens in the upper tier, without scores"))
            if not rule or not rule.every and not rule.apart:
                continue
            check = _tiers if rule.salient else _how
            how = [check(node, rule, store, said(plan[index]))] if rule.every else []
            how += ["one slot more for what is dropped"] if rule.apart else []
            store = replace(store, slots=bool(rule.every), rest=rule.apart)
            node.kwargs = cast(Any, {**node.kwargs, "store": str(store)})
            outcomes.append(Rewritten(index, ", ".join(how)))
        return outcomes


def _how(node: Node, rule: Rule, store: Store, term: object) -> str:
    """What leaves together; raises RecipeError where nothing can."""
    layer = argument(node, "layer")
    if not hasattr(rule.scorer, "observe") and not hasattr(rule.scorer, "arrive"):
        raise RecipeError(f"{term}: layer {layer}: {rule.score.name} scores whole prompts, not the "
                          "tokens that follow; wrap a method that evicts while decoding")
    if store.sinks or store.window:
        raise RecipeError(f"{term}: layer {layer}: tokens cannot be evicted from a store that "
                          "keeps the first ones apart; give the method sinks= instead")
    reasons = [f"{side.upper()} {term_of(how.format)}" for side in SIDES
               if (how := store.side(side)).format.step > 1 or how.delayed]
    if not reasons:
        return "evicts token by token"
    if hasattr(rule.budgeter, "below"):
        raise RecipeError(f"{term}: layer {layer}: budget {rule.budget.name} evicts single tokens, "
                          f"which {', '.join(reasons)} does not store; use a per-token format")
    odd = [how.block for how in (store.k, store.v) if PAGE % how.block]
    if odd:
        raise RecipeError(f"{term}: layer {layer}: blocks of {odd[0]} tokens are encoded together "
                          f"and {PAGE} are evicted; use a block that divides {PAGE}")
    return f"evicts pages of {PAGE} tokens, because of {', '.join(reasons)}"


def _tiers(node: Node, rule: Rule, store: Store, term: object) -> str:
    """What is in which tier; raises RecipeError where the store has no tiers by score."""
    where = f"{term}: layer {argument(node, 'layer')}"
    if not any(hasattr(rule.scorer, name) for name in ("observe", "averaged")):
        raise RecipeError(f"{where}: {rule.score.name} does not score the tokens that follow a "
                          "prompt from what attention gives them")
    if store.sinks or store.window:
        raise RecipeError(f"{where}: tokens cannot be put in order in a store that keeps the first "
                          "or the last ones apart")
    for side in store.sides:
        how = store.side(side)
        if salient(how.format) != rule.salient or (how.block, how.lag) != (PAGE, 0):
            raise RecipeError(f"{where}: {rule.salient} of {PAGE} tokens are salient, but "
                              f"{side.upper()} is stored as {term_of(how.format)}, {how.block} "
                              f"tokens at a time behind {how.lag}")
    return f"the {rule.salient} of {PAGE} with the highest scores are stored first"


def salient(fmt: Format) -> int:
    """How many tokens of a block a format takes more bits for; 0: for all the same."""
    inside = getattr(fmt, "inner", None)
    return int(getattr(fmt, "salient", 0)) or (salient(inside) if inside else 0)


def upper(fmt: Format) -> Format:
    """The same with more bits for every token."""
    if hasattr(fmt, "salient"):
        return fmt.parts[0][0]  # type: ignore[attr-defined]
    if not salient(fmt):
        return fmt
    args = dict(term_of(fmt).args) | {"of": term_of(upper(fmt.inner))}  # type: ignore[attr-defined]
    return format_of(Term(fmt.name, tuple(args.items())))


def tiered(store: Store) -> bool:
    """Whether some tokens of a block are stored better than others."""
    return any(salient(store.side(side).format) for side in store.sides)


PASS = Evict()
