"""How far attention's output is off when K and V are stored by a recipe, layer by layer.

The last tokens of a text are a call on a cache that holds the others: its queries see what the
recipe has stored of those and, exactly, the tokens of their own call. The error of a layer is
|o' - o| / |o| over all these queries and heads (L2), on the exact K, V and q of a forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from kvcompile.calibration.samples import Samples, Text, calibrated, checked
from kvcompile.calibration.stored_attention import attend, relative
from kvcompile.errors import KVCompileError
from kvcompile.format import bits_per_element
from kvcompile.optimize import Optimized
from kvcompile.plan import plan
from kvcompile.program import capture
from kvcompile.recipe import Recipe
from kvcompile.store import AXES, SIDES, Store


@dataclass(frozen=True)
class AttentionError:
    """A recipe, bits per stored number (mean of K and V over layers), the error of each layer."""

    recipe: str
    bits: float
    layers: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.layers) / len(self.layers)


def attention_error(model: PreTrainedModel, ids: Tensor, recipes: Sequence[str | Recipe], *,
                    queries: int = 64, calibration: Tensor | None = None) -> list[AttentionError]:
    """The error of every recipe on `ids` [N, T]: the last `queries` tokens attend to the others.

    `calibration` is for recipes that need it, as in `optimize`.
    """
    if ids.dim() != 2 or not 1 <= queries < ids.shape[1]:
        raise KVCompileError(f"queries={queries}: must be from 1 to one less than the tokens of "
                             "ids [texts, tokens]")
    program = model.kvcompile.program if isinstance(model, Optimized) else capture(model)
    layers = Samples(program.snapshots["capture"], ids.to(model.device)).attention
    context = ids.shape[1] - queries
    exact = [attend(sample, Store.parse("store"), context) for sample in layers]
    text, out = Text(program, None if calibration is None else checked(calibration)), []
    for recipe in recipes:
        settings = plan(calibrated(Recipe.parse(recipe), program, text), len(layers))
        errors, bits = [], 0.0
        for own, sample, o in zip(settings, layers, exact, strict=True):
            if beyond := sorted(own.values.keys() - set(AXES)):
                raise KVCompileError(f"{recipe}: {beyond[0]} changes the model, not storage alone")
            store = Store.of(own.values, sample.window)
            errors.append(relative(attend(sample, store, context), o))
            for side, x in zip(SIDES, (sample.k, sample.v), strict=True):
                bits += bits_per_element(store.side(side).format, x.shape[-1], x.dtype, side)
        out.append(AttentionError(str(recipe), bits / 2 / len(layers), tuple(errors)))
    return out
