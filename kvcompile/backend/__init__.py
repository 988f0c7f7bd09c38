"""backend="kvcompile" of torch.compile: graphs from Dynamo, rewritten and given to Inductor.

    torch.compile(model, backend="kvcompile", options={"recipe": "kivi(bits=4)"})

A stateless forward (use_cache=False) is rewritten so that attention sees the compressed view of
the sequence. With `past_key_values=kvcompile.KVCache(...)` attention over the decoded view becomes
kvc.decode, attention over the stored form. Any other graph is compiled as it is, with one warning
that names the reason.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from kvcompile.backend.inductor import compile_dynamo, frame, to_aten
from kvcompile.backend.rewrite import Unchanged, over_cache, stateless
from kvcompile.errors import KVCompileError, nearest
from kvcompile.ir import UPDATE
from kvcompile.recipe import Recipe

log = logging.getLogger(__name__)
_warned: set[tuple[str, int]] = set()


def kvcompile(gm: GraphModule, example_inputs: Sequence[Any], *,
              options: dict[str, Any] | None = None, mode: str | None = None) -> Callable:
    """The Dynamo backend. `options`: `recipe` (default "full", or what the KVCache stores by)."""
    options = dict(options or {})
    recipe = options.pop("recipe", None)
    if options:
        name = next(iter(options))
        raise KVCompileError(f"backend kvcompile has no option {name!r}"
                             f"{nearest(name, ['recipe'])}; known: recipe")
    if recipe is not None:
        recipe = Recipe.parse(recipe)
    aten = to_aten(gm)
    try:
        if any(n.target is UPDATE for n in aten.graph.nodes):
            over_cache(aten, recipe)
        else:
            stateless(aten, recipe or Recipe.parse("full"))
    except Unchanged as why:
        key = (str(why), frame())
        if key not in _warned:
            _warned.add(key)
            log.warning("compiled without kvcompile's rewrites: %s", why)
        return compile_dynamo(gm, example_inputs)
    return compile_dynamo(aten, example_inputs)
