"""reuse: layers' K and V from what an earlier layer is given.

    attention_i(q, W_k norm_i(h_i), W_v norm_i(h_i)) -> attention_i(q, W_k norm_i(h_j), ...)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.ir import ROPE, argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.store import SIDES
from kvcompile.structure.layout import linear_input
from kvcompile.structure.movement import CASTS, Probe, feeds, packet
from kvcompile.structure.norms import find_norm
from kvcompile.structure.sources import is_linear


@dataclass(frozen=True)
class Reuse:
    """K and V of layer i are projected from h_j, where axis `input` of layer i is j < i.

    h is what the norm before a layer's projections reads; norm and projections stay the layer's
    own, as do its queries. Raises RecipeError for a layer that does not come earlier.
    """

    name: ClassVar[str] = "reuse"
    order: ClassVar[int] = 15
    axes: ClassVar[tuple[str, ...]] = ("input",)

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        nodes = attention_nodes(gm.graph)
        wanted = {i: own.get("input", i) for i, own in enumerate(plan)}
        wanted = {i: j for i, j in wanted.items() if i != j}
        given = [_given(node) for node in nodes] if wanted else []
        for i, j in wanted.items():
            if type(j) is not int or not 0 <= j < i:
                raise RecipeError(f"{plan[i].origin['input']}: layer {i} cannot compute K and V "
                                  f"from what layer {j} is given: it must be an earlier layer")
            old, new = given[i], given[j]
            if old is None or new is None:
                bare = i if old is None else j
                outcomes.append(Refused(i, f"K and V of layer {bare} are not projected from one "
                                        "norm", nodes[bare].name))
            elif old is new:                              # a second run
                outcomes.append(Rewritten(i, f"K and V from what layer {j} is given"))
            else:
                _redirect(gm, nodes[i], old, new)
                outcomes.append(Rewritten(i, f"K and V from what layer {j} is given"))
        gm.graph.eliminate_dead_code()
        return outcomes


def _given(node: Node) -> Node | None:
    """What the norm before the projections of K and V reads; None if there is no such norm."""
    todo, seen, inputs = [argument(node, side) for side in SIDES], set[Node](), set[Node]()
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if is_linear(n):
            inputs.add(linear_input(n))
        elif n.op == "call_function":
            todo += [argument(n, "x")] if n.target is ROPE else feeds(n)
    while len(inputs) == 1 and packet(next(iter(inputs))) in CASTS:
        inputs = set(feeds(inputs.pop()))
    norm = find_norm(inputs.pop(), Probe()) if len(inputs) == 1 else None
    return norm.input if norm else None


def _redirect(gm: GraphModule, node: Node, old: Node, new: Node) -> None:
    """Compute k and v of `node` from `new` as they are from `old`."""
    copies = {old: new}

    def copied(n: Node) -> Node:
        if n not in copies and n < old:
            copies[n] = n
        elif n not in copies:
            inputs = {x: copied(x) for x in n.all_input_nodes}
            same = n.op != "call_function" or all(x is y for x, y in inputs.items())
            copies[n] = n if same else gm.graph.node_copy(n, inputs.__getitem__)
        return copies[n]

    with gm.graph.inserting_before(node):
        for i, side in enumerate(SIDES, 1):
            node.update_arg(i, copied(argument(node, side)))


PASS = Reuse()
