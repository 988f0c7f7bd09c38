"""A model by name: the embedded SmolLM2, a tiny seeded one, a folder, or a hub id."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvcompile.models.smollm2 import smollm2
from kvcompile.models.tiny import tiny


def load(
    name: str, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """`smollm2`, `tiny-<arch>`, a folder or a hub id -> the model in eval mode and its tokenizer.

    Without a dtype: SmolLM2 in bfloat16, tiny models in float32, the others as they were saved.
    Tiny models have no tokenizer.
    """
    if name == "smollm2":
        return smollm2(dtype or torch.bfloat16)
    if name.startswith("tiny-"):
        return tiny(name.removeprefix("tiny-"), dtype=dtype or torch.float32), None
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        kind = "folder" if Path(name).is_dir() else "hub id"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load {kind} {name!r}: {reason}") from error
    return model.eval(), tokenizer
