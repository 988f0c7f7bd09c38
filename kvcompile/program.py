"""A captured model on its way: the stateless graph, what passes did, the graphs with a cache."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, TextIO

from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from kvcompile.calibration.samples import Text, calibrated, checked, uncalibrated
from kvcompile.capture import export
from kvcompile.capture_module import export_module
from kvcompile.errors import KVCompileError, nearest
from kvcompile.ir import attention_nodes
from kvcompile.plan import plan
from kvcompile.printer import text
from kvcompile.recipe import Recipe
from kvcompile.rewrite import (
    Outcome,
    Pass,
    check_axes,
    copy_graph,
    passes,
    phases,
    run_passes,
    same_graph,
)
from kvcompile.site import Site, groups, sites


@dataclass
class Program:
    """What `kvcompile.capture` returns.

    `graph_module` is the stateless graph (input_ids [B, S], position_ids [B, S], valid [B, S],
    keep [N]) -> logits [B, N, V] after every pass; `phases` holds the graphs with a cache. Each of
    them runs eagerly. `outcomes` says per pass what became of every layer, and `snapshots` has the
    graph after it; of insert_cache, which makes both phases, these are the ones of `extend`.
    """

    name: str
    graph_module: GraphModule
    recipe: Recipe
    phases: dict[str, GraphModule] = field(default_factory=dict)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    snapshots: dict[str, GraphModule] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The attention layers, in order."""
        return sites(self.graph_module.graph)

    @property
    def groups(self) -> list[list[int]]:
        """The layers that share one set of planes, by number; a layer's slot is its index there."""
        return groups(self.sites)

    @property
    def text(self) -> Tensor | None:
        """The token ids that passes read or were given; None if none have been asked for."""
        text: Text | None = self.graph_module.meta.get("text")
        return None if text is None else text.ids

    def __str__(self) -> str:
        return text(self.graph_module, f"kvcompile {self.name}, recipe: {self.recipe}")

    def print(self, file: TextIO | None = None) -> None:
        """Print the graph, one node a line."""
        print(self, file=file or sys.stdout)

    def after(self, name: str) -> "Program":
        """The program as it was after the pass `name` ("capture": before any)."""
        if name not in self.snapshots:
            raise KVCompileError(f"no pass {name!r} was run{nearest(name, self.snapshots)}; "
                                 f"passes: {', '.join(self.snapshots)}")
        return Program(self.name, self.snapshots[name], self.recipe)

    def begun(self) -> tuple[GraphModule, list[Pass]]:
        """A graph to lower, and the passes to run over it: those that read no axis, and come before
        all that do, are the same under every recipe, and have been run in a program of ours."""
        same = [p.name for p in takewhile(lambda p: not p.axes, passes())]
        done = [name for name in same if name in self.snapshots]
        last = done[-1] if done else "capture"
        return copy_graph(self.snapshots[last]), [p for p in passes() if p.name not in done]

    def lower(self, recipe: str | Recipe, watch: Callable | None = None,
              calibration: Tensor | None = None, tokenizer: Any = None) -> "Program":
        """This program under a recipe: all passes over the graph as it was captured. What the first
        ones do under every recipe is not done again.

        `watch(pass, graph, outcomes, seconds)` is called after each pass. `calibration` is token
        ids for methods that look at text first, `tokenizer` tells methods that know classes of
        tokens the ids; what they find is in the result's `recipe`.
        """
        start = self.snapshots["capture"]
        if tokenizer is not None:
            start.meta["tokenizer"] = tokenizer
        text = (start.meta.setdefault("text", Text(self)) if calibration is None
                else Text(self, checked(calibration)))
        start.meta["text"] = text  # what is lowered later reads it too
        recipe = calibrated(Recipe.parse(recipe), self, text)
        gm, rest = self.begun()
        gm.meta.update(start.meta)
        done = [p for p in passes() if p not in rest]
        known = ["capture", *(p.name for p in done)]
        out = Program(self.name, gm, recipe, outcomes={p.name: self.outcomes[p.name] for p in done},
                      seconds={name: self.seconds[name] for name in known},
                      snapshots={name: self.snapshots[name] for name in known})
        settings = plan(recipe, len(attention_nodes(start.graph)))
        check_axes(settings)

        def record(p: Pass, gm: GraphModule, outcomes: list[Outcome], seconds: float) -> None:
            out.outcomes[p.name] = outcomes
            out.seconds[p.name] = out.seconds.get(p.name, 0.0) + seconds
            *_, last = out.snapshots.values()
            out.snapshots[p.name] = last if same_graph(gm, last) else copy_graph(gm)
            if watch:
                watch(p, gm, outcomes, seconds)

        for p in done:
            if watch:
                watch(p, out.snapshots[p.name], out.outcomes[p.name], out.seconds[p.name])
        run_passes(rest, gm, settings, record)
        for phase, p in phases().items():
            gm = copy_graph(out.graph_module)
            run_passes([p], gm, settings, record)
            out.phases[phase] = gm
        return out


def capture(model: nn.Module, recipe: str | Recipe = "full",
            watch: Callable | None = None, calibration: Tensor | None = None,
            tokenizer: Any = None) -> Program:
    """Capture a causal LM, of transformers or plain PyTorch, and run the passes of `recipe`.

    The model is left exactly as it was and shares its parameters with the graph. `calibration` and
    `tokenizer` are `Program.lower`'s; a model may carry its tokenizer itself. Raises
    UnsupportedModelError for what cannot be captured, RecipeError for a bad recipe.
    """
    start = time.perf_counter()
    recipe = Recipe.parse(recipe)
    if isinstance(model, PreTrainedModel) and not uncalibrated(recipe):  # errors are told at once
        config = model.config.get_text_config(decoder=True)
        check_axes(plan(recipe, getattr(config, "num_hidden_layers", None) or 1))
    gm = export(model) if isinstance(model, PreTrainedModel) else export_module(model)
    program = Program(type(model).__name__, gm, recipe, snapshots={"capture": gm},
                      seconds={"capture": time.perf_counter() - start})
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    return program.lower(recipe, watch, calibration, tokenizer)
