"""Artefacts of a model in folders, a JSON and a safetensors file; what calibration found."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvcompile.errors import KVCompileError
from kvcompile.recipe import Recipe

VERSION = 1
OF_A_MODEL = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window")


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """What of a model's config artefacts depend on."""
    config = model.config.get_text_config(decoder=True)
    return {name: getattr(config, name) for name in OF_A_MODEL
            if getattr(config, name, None) is not None}


def check(what: str, known: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Raise KVCompileError unless `model` has the `identity` that `what` was made for."""
    own = identity(model)
    for name in OF_A_MODEL:
        if known.get(name) != own.get(name):
            raise KVCompileError(f"{what} is of a model with {name} {known.get(name)}, this one "
                                 f"has {own.get(name)}")


def write(folder: str | Path, kind: str, content: Mapping[str, Any],
          tensors: Mapping[str, Tensor]) -> None:
    """Write `content` and `tensors` to `folder`/`kind`.json and .safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: x.contiguous().cpu() for n, x in tensors.items()},
              folder / f"{kind}.safetensors")
    text = json.dumps({"kvcompile": kind, "version": VERSION, **content}, indent=2)
    (folder / f"{kind}.json").write_text(text + "\n")


def read(folder: str | Path, kind: str, keys: Sequence[str] = (), names: Sequence[str] = ()
         ) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` wrote, with these keys and tensors at least; KVCompileError for anything else.
    """
    path = Path(folder) / f"{kind}.json"
    try:
        content = json.loads(path.read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
    except FileNotFoundError as error:
        raise KVCompileError(f"{folder} holds no kvcompile {kind}: {error.filename or error} is "
                             "missing") from None
    except (ValueError, OSError, SafetensorError) as error:
        raise KVCompileError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("kvcompile") != kind:
        raise KVCompileError(f"{path} is no kvcompile {kind}")
    if content.get("version") != VERSION:
        raise KVCompileError(f"{path} has version {content.get('version')}, this kvcompile reads "
                             f"{VERSION}")
    lacks = [*(key for key in keys if key not in content), *(n for n in names if n not in tensors)]
    if lacks:
        raise KVCompileError(f"{path}: {lacks[0]} is missing")
    return content, tensors


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a recipe's methods found in a text.

    recipe      as it was asked for
    found       the same with every parameter that was found written out
    ids         the text [texts, tokens], which passes read again when the model is lowered
    statistics  `similarity.k` and `.v` [layers, layers]: mean cosines of layers' K and V
    model       what of the model's config all this depends on
    """

    recipe: Recipe
    found: Recipe
    ids: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def of(self, recipe: str | Recipe, model: PreTrainedModel) -> Recipe:
        """`recipe` for `model`, with what was found if it is the one that was calibrated.

        Raises KVCompileError for another model.
        """
        check("the calibration", self.model, model)
        recipe = Recipe.parse(recipe)
        return self.found if recipe == self.recipe else recipe

    def save(self, folder: str | Path) -> None:
        """Write it to `folder`: calibration.json and calibration.safetensors."""
        write(folder, "calibration", {
            "recipe": str(self.recipe), "found": str(self.found), "model": self.model},
            {"ids": self.ids, **self.statistics})

    @staticmethod
    def load(folder: str | Path) -> "Calibration":
        """What `save` wrote."""
        content, tensors = read(folder, "calibration", ("recipe", "found", "model"), ("ids",))
        ids = tensors.pop("ids")
        return Calibration(Recipe.parse(content["recipe"]), Recipe.parse(content["found"]), ids,
                           tensors, content["model"])
