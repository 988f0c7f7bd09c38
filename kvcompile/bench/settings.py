"""What a run of the benchmark is given, and what its groups of rows share."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompile.bench.bandwidth import MIB as PROBE
from kvcompile.bench.bandwidth import Bandwidth
from kvcompile.bench.row import Target
from kvcompile.errors import KVCompileError
from kvcompile.measure.prose import prose
from kvcompile.optimize import optimize
from kvcompile.registry import module

REFERENCE = "smollm2"  # the model that the targets are set for
SCALE = 256  # MiB of K and V that a kernel reads before it sees the same bytes again


@dataclass
class Settings:
    """`quick`: fewer contexts, recipes and repetitions; `tokens` overrides the contexts.

    `recipes` are those whose decode step is measured, instead of those with targets.
    `mib` is how many MiB a kernel reads before it comes back to the same bytes: more than the
    caches hold, unless figures do not matter.
    """

    model: str = REFERENCE
    quick: bool = False
    threads: int = 1
    tokens: int | None = None
    recipes: tuple[str, ...] = ()
    mib: int = SCALE
    _optimized: dict[str, PreTrainedModel] = field(default_factory=dict, repr=False)

    @cached_property
    def bandwidth(self) -> Bandwidth:
        """The probe, compiled at its first use."""
        return Bandwidth(PROBE if self.mib >= SCALE else self.mib)

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """The model and its tokenizer, loaded once."""
        try:
            return module("models", "load").load(self.model)
        except (ValueError, ModuleNotFoundError) as error:
            raise KVCompileError(str(error)) from error

    def optimized(self, recipe: str) -> PreTrainedModel:
        """The model under a recipe; its decode step is compiled once."""
        if recipe not in self._optimized:
            captured = next(iter(self._optimized.values()), self.loaded[0])
            self._optimized[recipe] = optimize(captured, recipe)
        return self._optimized[recipe]

    def contexts(self, quick: tuple[int, ...], whole: tuple[int, ...], spare: int = 0) -> list[int]:
        """Lengths to measure at, those that leave the model `spare` positions more."""
        config: Any = self.loaded[0].config.get_text_config()
        most = (getattr(config, "max_position_embeddings", None) or max(whole) + spare) - spare
        wanted = (self.tokens,) if self.tokens else quick if self.quick else whole
        fit = [n for n in wanted if n <= most]
        if not fit:
            raise KVCompileError(f"{self.model} has only {most + spare} positions")
        return fit

    def ids(self, tokens: int) -> Tensor:
        """[1, tokens] of prose."""
        return prose(*self.loaded, tokens)

    def target(self, sign: Any, value: float) -> Target | None:
        """A target where the model is the one that it is set for."""
        return Target(sign, value) if self.model == REFERENCE else None
