"""prefill(): a context is compressed once, before any question is known, and asked many times."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompile.errors import KVCompileError
from kvcompile.optimize import Optimized
from kvcompile.own_cache import OwnCache


def prefill(model: PreTrainedModel, context_ids: Tensor, *, attention_mask: Tensor | None = None,
            question_length: int = 0) -> OwnCache:
    """The cache of `context_ids` [B, S], compressed by the model's recipe.

    `copy.deepcopy` of it goes into `past_key_values` of generate() once for every question, whose
    input_ids are those of the context and the question together. What follows the context is
    stored whole, unless the recipe evicts while decoding. `attention_mask` is 0 for padding;
    `question_length` says how many tokens at the end are a question, for methods that ask what it
    looks at (0: the method's own window).
    """
    if not isinstance(model, Optimized):
        raise KVCompileError(f"prefill takes a model that kvcompile.optimize returned, not "
                             f"{type(model).__name__}")
    if context_ids.dim() != 2 or not context_ids.shape[1]:
        raise KVCompileError(f"context_ids is {list(context_ids.shape)}: must be token ids [batch, "
                             "tokens]")
    mask = torch.ones_like(context_ids) if attention_mask is None else attention_mask
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=context_ids.to(model.device), attention_mask=mask.to(model.device),
                position_ids=positions.to(model.device), use_cache=True, logits_to_keep=1,
                question_length=question_length)
    return out.past_key_values
