"""Hugging Face's own uncompressed cache, layer by layer: what every saving is measured against."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Uncompressed:
    """One layer of it: bytes per token, and its sliding window (it keeps window - 1; 0: all)."""

    bytes_per_token: int
    window: int = 0

    def nbytes(self, tokens: int) -> int:
        """Bytes that one sequence of `tokens` tokens takes."""
        return self.bytes_per_token * (min(tokens, self.window - 1) if self.window > 1 else tokens)


def uncompressed(model: PreTrainedModel) -> tuple[Uncompressed, ...]:
    """The layers of the cache that `model` fills by itself, read off after one token.

    So it is right for models that keep something else than K and V, such as MLA's latent. Layers
    that keep nothing are left out. The model is left as it was.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            cache = model(input_ids=ids, use_cache=True).past_key_values
    finally:
        for module, training in modes:
            module.training = training
    layers = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None:
            window = layer.sliding_window if getattr(layer, "is_sliding", False) else 0
            layers.append(Uncompressed(keys.nbytes + values.nbytes, window))
    return tuple(layers)


def cache_nbytes(cache: object) -> int:
    """Bytes of K and V in a cache, transformers' or ours."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    layers = getattr(cache, "layers", ())
    return sum(x.nbytes for layer in layers for x in (layer.keys, layer.values) if x is not None)
