"""Text to measure on: the same English prose for everyone."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompile.errors import KVCompileError
from kvcompile.registry import module


def prose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, tokens: int,
          skip: int = 0) -> Tensor:
    """[1, tokens] of pydoc's topics; seeded random tokens where there is no tokenizer."""
    if tokenizer is None:
        size = model.config.get_text_config().vocab_size
        return torch.randint(0, size, (1, tokens), generator=torch.Generator().manual_seed(0))
    try:
        return module("models", "smollm2").topics_ids(tokenizer, tokens, skip=skip)
    except ValueError as error:
        raise KVCompileError(str(error)) from error
