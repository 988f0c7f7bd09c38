"""What the torch.compile backend does to a graph before Inductor gets it."""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kvcompile.errors import UnsupportedModelError
from kvcompile.ir import DECODE, UPDATE, argument, attention_nodes
from kvcompile.plan import plan
from kvcompile.recipe import Recipe
from kvcompile.rewrite import Refused, check_axes, passes, run_passes
from kvcompile.structure.recognize import recognize

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
THROUGH = {aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.view.default,
           aten.clone.default, aten.contiguous.default, aten.slice.Tensor, aten.alias.default,
           aten._unsafe_view.default, aten.repeat_interleave.self_int}
OTHER_CACHE = ("the graph reads or fills a cache that is not a kvcompile.KVCache; pass "
               "past_key_values=kvcompile.KVCache(model.config, recipe=...), or use_cache=False")


class Unchanged(Exception):
    """The graph stays as it is; the text says why."""


def stateless(gm: GraphModule, recipe: Recipe) -> None:
    """Every attention of a forward without a cache sees what decoding by `recipe` would have seen.

    Raises Unchanged if an attention is not recognised, or its K and V leave the graph.
    """
    try:
        refused = [o for o in recognize(gm) if isinstance(o, Refused)]
    except UnsupportedModelError as error:
        raise Unchanged(str(error)) from error
    if refused:
        past = [n for n in gm.graph.nodes if n.op == "placeholder" and _is_past(n)]
        raise Unchanged(OTHER_CACHE if past else
                        f"{refused[0].reason} (node '{refused[0].node}')")
    sites = attention_nodes(gm.graph)
    if not sites:
        raise Unchanged("no attention was found in the graph")
    returned = set(gm.graph.output_node().all_input_nodes)
    for node in sites:
        if _reaches(node, returned):
            raise Unchanged(OTHER_CACHE)
    settings = plan(recipe, len(sites))
    check_axes(settings)
    run_passes(passes(), gm, settings)
    gm.recompile()


def _is_past(node: Node) -> bool:
    """Whether a placeholder may be what a cache holds: [batch, heads, tokens, dim]."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()


def _reaches(node: Node, returned: set[Node]) -> bool:
    """Whether K or V, perhaps through a concatenation, is among the graph's results."""
    for side in ("k", "v"):
        value = argument(node, side)
        around = {value, *value.all_input_nodes, *value.users}
        if around & returned:
            return True
    return False


def over_cache(gm: GraphModule, recipe: Recipe | None) -> None:
    """sdpa(q, *update(cache, k, v), mask) -> decode(cache, q, k, v, mask).

    Raises Unchanged if a layer does not attend to its cache by scaled_dot_product_attention.
    """
    for node in [n for n in gm.graph.nodes if n.target is UPDATE]:
        _decode(gm, node, "" if recipe is None else str(recipe))
    gm.graph.lint()
    gm.recompile()


def _decode(gm: GraphModule, update: Node, recipe: str) -> None:
    found = [n for n in gm.graph.nodes if n.target is SDPA
             and _origin(n.args[1]) is update and _origin(n.args[2]) is update]
    layer = update.kwargs["layer"]
    if len(found) != 1:
        raise Unchanged(f"layer {layer} does not attend to its KVCache by "
                        "scaled_dot_product_attention; load the model with "
                        "attn_implementation='sdpa'")
    node, (cache, k, v) = found[0], update.args
    q, mask = node.args[0], _option(node, 3, "attn_mask", None)
    if _option(node, 4, "dropout_p", 0.0):
        raise Unchanged(f"node '{node.name}' drops out attention weights")
    tokens, dim = q.meta["val"].shape[2:]
    if mask is None and not _option(node, 5, "is_causal", False) and tokens != 1:
        raise Unchanged(f"node '{node.name}' attends to later tokens")
    scale = _option(node, 6, "scale", None)
    with gm.graph.inserting_before(node):
        o = gm.graph.call_function(DECODE, (cache, q, k, v, mask), {
            "scale": float(scale if scale is not None else dim**-0.5), "recipe": recipe,
            "layer": layer})
    o.meta = dict(node.meta)
    node.replace_all_uses_with(o)
    gm.graph.erase_node(node)
    gone = _upto(update, [])
    for dead in reversed([n for n in gm.graph.nodes if n in gone]):
        if dead.users:
            raise Unchanged(f"layer {layer} uses what its KVCache returns for more than attention")
        gm.graph.erase_node(dead)


def _upto(node: Node, found: list[Node]) -> list[Node]:
    """`node` and what is computed from it."""
    if node not in found:
        found.append(node)
        for user in node.users:
            _upto(user, found)
    return found


def _option(node: Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _origin(node: object) -> Node | None:
    """The kvc.update node whose result `node` is, repeated heads looked through."""
    while isinstance(node, Node):
        if node.target is UPDATE:
            return node
        if node.target is not operator.getitem and node.target not in THROUGH:
            return None
        node = node.args[0]
    return None
