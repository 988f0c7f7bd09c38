"""calibrate(), and save() and load(): what a model and a text were asked once, kept in a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvcompile.calibration import artefacts
from kvcompile.calibration.artefacts import Calibration
from kvcompile.calibration.samples import Samples, checked
from kvcompile.calibration.similarity import similarity
from kvcompile.errors import KVCompileError
from kvcompile.optimize import Optimized, optimize
from kvcompile.program import capture
from kvcompile.recipe import Recipe
from kvcompile.show import progress


def calibrate(model: PreTrainedModel, recipe: str | Recipe, texts: Tensor | str | Sequence[str],
              *, tokenizer: Any = None, tokens: int = 256) -> Calibration:
    """Let the methods of `recipe` look at texts once; `optimize(calibration=)` takes the result.

    texts   token ids [texts, tokens], or texts, of which `tokenizer` makes one row each; texts of
            fewer than `tokens` tokens are refused, longer ones cut

    Raises KVCompileError for texts that cannot be used, RecipeError for a bad recipe.
    """
    ids, recipe = checked(_ids(texts, tokenizer, tokens)), Recipe.parse(recipe)
    base = model.kvcompile.model if isinstance(model, Optimized) else model
    known = int(cast(Any, base.get_input_embeddings()).weight.shape[0])
    if wrong := [x for x in (int(ids.min()), int(ids.max())) if not 0 <= x < known]:
        raise KVCompileError(f"calibration holds the token id {wrong[0]}, the model knows 0 to "
                             f"{known - 1}: it is another tokenizer's")
    with progress("capturing the model"):
        program = (model.kvcompile.program.lower("full") if isinstance(model, Optimized)
                   else capture(model, "full"))
    with progress(f"calibrating {recipe} on {ids.numel():,} tokens"):
        found = program.lower(recipe, calibration=ids).recipe
        seen = Samples(program.snapshots["capture"], ids).attention
        statistics = {f"similarity.{side}": similarity(seen, side) for side in "kv"}
    return Calibration(recipe, found, ids, statistics, artefacts.identity(base))


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write what `optimize` made of a model to `folder`: recipe, options and the text that its
    passes read, in JSON and safetensors. The model's weights are not written."""
    if not isinstance(model, Optimized):
        raise KVCompileError(f"save takes what optimize() returns, not a {type(model).__name__}")
    state = model.kvcompile
    text = state.program.text
    artefacts.write(folder, "optimized", {
        "recipe": str(state.program.recipe), "max_length": state.max_length,
        "prefill_chunk": state.prefill_chunk, "model": artefacts.identity(state.model),
        "weights": state.model.config.name_or_path}, {} if text is None else {"ids": text})


def load(folder: str | Path, model: PreTrainedModel | None = None, *,
         compile: bool = True) -> PreTrainedModel:
    """The optimized model that `save` wrote, made of `model` or of the weights that it was made of.

    Raises KVCompileError if `model` is another one.
    """
    content, tensors = artefacts.read(folder, "optimized", (
        "recipe", "max_length", "prefill_chunk", "model", "weights"))
    if model is None:
        name = content["weights"]
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        except (OSError, ValueError) as error:
            raise KVCompileError(f"{folder} was saved from the weights {name!r}, which cannot be "
                                 "loaded: pass the model") from error
    base = model.kvcompile.model if isinstance(model, Optimized) else model
    artefacts.check(str(folder), content["model"], base)
    return optimize(model, content["recipe"], max_length=content["max_length"], compile=compile,
                    prefill_chunk=content["prefill_chunk"], calibration=tensors.get("ids"))


def _ids(texts: Tensor | str | Sequence[str], tokenizer: Any, tokens: int) -> Tensor:
    """[texts, tokens]."""
    if isinstance(texts, Tensor):
        return texts
    texts = [texts] if isinstance(texts, str) else texts
    if not len(texts):
        raise KVCompileError("calibration needs at least one text")
    if tokenizer is None:
        raise KVCompileError("texts need a tokenizer: calibrate(model, recipe, texts, "
                             "tokenizer=tokenizer)")
    rows = [tokenizer(text)["input_ids"][:tokens] for text in texts]
    short = [i for i, row in enumerate(rows) if len(row) < tokens]
    if short:
        raise KVCompileError(f"text {short[0]} has {len(rows[short[0]])} tokens, {tokens} are "
                             "needed: join texts, or give tokens=")
    return torch.tensor(rows)
