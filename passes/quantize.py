"""quantize: how K and V are stored. attention(store) -> attention(store with formats)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch.fx import GraphModule

from kvcompile.errors import RecipeError
from kvcompile.format import bits_per_element, term_of
from kvcompile.ir import argument, attention_nodes
from kvcompile.kernels.tail import dropped, without
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Rewritten
from kvcompile.store import SIDES, Store


@dataclass(frozen=True)
class Quantize:
    """Give the body tiers of K and V their formats: k, v -> decode(encode(k)), decode(encode(v)).

    Each group of tokens is encoded once, when it leaves the recent tier. Raises RecipeError where
    a format does not fit the head dimension.
    """

    name: ClassVar[str] = "quantize"
    order: ClassVar[int] = 60
    axes: ClassVar[tuple[str, ...]] = tuple(
        f"{axis}.{side}" for side in SIDES for axis in ("format", "block", "lag"))

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for index, node in enumerate(attention_nodes(gm.graph)):
            axes = {a: v for a, v in plan[index].values.items() if a in self.axes}
            if not axes:
                continue
            old = Store.parse(argument(node, "store"))
            store = replace(Store.of({**axes, "v_in_k": old.v_in_k}), sinks=old.sinks,
                            window=old.window, side_by_side=old.side_by_side)
            store = without(store, dropped(old))
            words = []
            for side in store.sides:
                value = argument(node, side).meta["val"]
                fmt = store.side(side).format
                try:
                    bits = bits_per_element(fmt, int(value.shape[-1]), value.dtype, side)
                except RecipeError as error:
                    origin = plan[index].origin[f"format.{side}"]
                    raise RecipeError(f"{origin.name}: layer {index}: {error}") from error
                words.append(f"{side} {term_of(fmt)} {bits:g} bits")
            node.kwargs = cast(Any, {**node.kwargs, "store": str(store)})
            outcomes.append(Rewritten(index, ", ".join(words)))
        return outcomes


PASS = Quantize()
