"""What the torch.compile backend does to a graph before Inductor gets it."""

import operator

import torch
from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError, UnsupportedModelError
from kvcompile.ir import ATTEND, CAUSAL, VIEW, argument, attention_nodes
from kvcompile.plan import plan
from kvcompile.recipe import Recipe
from kvcompile.recognize import recognize
from kvcompile.rewrite import Refused, check_axes, passes, run_passes
from kvcompile.store import Store

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
THROUGH = {aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.view.default,
           aten.clone.default, aten.contiguous.default, aten.slice.Tensor, aten.alias.default,
           aten._unsafe_view.default, aten.repeat_interleave.self_int}


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
        raise Unchanged(f"{refused[0].reason} (node '{refused[0].node}')")
    sites = attention_nodes(gm.graph)
    if not sites:
        raise Unchanged("no attention was found in the graph")
    returned = set(gm.graph.output_node().all_input_nodes)
    for node in sites:
        if _reaches(node, returned):
            raise Unchanged(f"attention '{node.name}' fills a cache that is not a kvcompile.KVCache; "
                            "pass past_key_values=kvcompile.KVCache(model.config, recipe=...), or "
                            "use_cache=False")
    settings = plan(recipe, len(sites))
    check_axes(settings)
    run_passes(passes(), gm, settings)
    gm.recompile()


def _reaches(node: Node, returned: set[Node]) -> bool:
    """Whether K or V, perhaps through a concatenation, is among the graph's results."""
    for side in ("k", "v"):
        value = argument(node, side)
        around = {value, *value.all_input_nodes, *value.users}
        if around & returned:
            return True
    return False


def over_cache(gm: GraphModule, recipe: Recipe | None) -> None:
    """sdpa(q, view(planes, k), view(planes, v), mask) -> attend(q, k, v, planes)."""
    views = [n for n in gm.graph.nodes if n.target is VIEW]
    if recipe is not None:
        stores = [Store.parse(argument(v, "store")) for v in views]
        layers = [argument(v, "layer") for v in views]
        settings = plan(recipe, max(layers) + 1) if max(layers) + 1 == len(views) else None
        if settings is not None and stores != [
                Store.of(settings[i].values, argument(v, "window"))
                for i, v in zip(layers, views, strict=True)]:
            raise RecipeError(f"options say recipe {str(recipe)!r}, but the KVCache stores by another "
                              f"({stores[0]})")
    checks: dict[tuple[Node, int], Node] = {}
    for view in views:
        _attend(gm, view, checks)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()


def _attend(gm: GraphModule, view: Node, checks: dict[tuple[Node, int], Node]) -> None:
    graph, found = gm.graph, [n for n in gm.graph.nodes if n.target is SDPA
                              and _origin(n.args[1]) is view and _origin(n.args[2]) is view]
    if len(found) != 1:
        raise Unchanged(f"layer {argument(view, 'layer')} does not attend to its KVCache by "
                        "scaled_dot_product_attention; load the model with "
                        "attn_implementation='sdpa'")
    node = found[0]
    q, mask = node.args[0], _option(node, 3, "attn_mask", None)
    if _option(node, 4, "dropout_p", 0.0):
        raise Unchanged(f"node '{node.name}' drops out attention weights")
    k, v, planes, positions, valid = (argument(view, n) for n in
                                      ("k", "v", "planes", "positions", "valid"))
    scale = _option(node, 6, "scale", None)
    tokens = q.meta["val"].shape[2]
    window = argument(view, "window")
    with graph.inserting_before(node):
        if mask is not None:
            if (mask, window) not in checks:
                checks[mask, window] = graph.call_function(CAUSAL, (mask, k), {"window": window})
                checks[mask, window].meta["val"] = valid.meta["val"]
            valid = checks[mask, window]
        elif not _option(node, 5, "is_causal", False) and tokens != 1:
            raise Unchanged(f"node '{node.name}' attends to later tokens")
        both = graph.call_function(ATTEND, (q, k, v, planes, positions, valid, None), {
            "scale": float(scale if scale is not None else q.meta["val"].shape[3] ** -0.5),
            "window": window, "store": argument(view, "store"), "layer": argument(view, "layer")})
        o = graph.call_function(operator.getitem, (both, 0))
    o.meta = dict(node.meta)
    node.replace_all_uses_with(o)
    graph.erase_node(node)


def _option(node: Node, index: int, name: str, default: object) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _origin(node: object) -> Node | None:
    """The kvc.view node whose result `node` is, repeated heads looked through."""
    while isinstance(node, Node):
        if node.target is VIEW:
            return node
        if node.target is not operator.getitem and node.target not in THROUGH:
            return None
        node = node.args[0]
    return None
