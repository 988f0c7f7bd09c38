"""Keys hidden in prose: where they are, and that a cache without them does not find them."""

import pytest
import torch
from support import needs_smollm2

from kvcompile import KVCompileError
from kvcompile.measure.recall import example, recall


@pytest.mark.slow
@needs_smollm2
def test_the_key_is_in_the_context_once_and_only_recency_loses_it():
    from kvcompile.models.smollm2 import smollm2

    model, tokenizer = smollm2(torch.float32)
    for keys in (1, 4):
        e = example(model, tokenizer, 300, keys, seed=3)
        text = tokenizer.decode(e.context[0])
        assert text.count("The pass key") == keys and e.answer in text
        assert e.answer not in tokenizer.decode(e.question[0])
        assert 300 <= e.context.shape[1] <= 300 + keys * 40
    found = recall(model, tokenizer, ["streamingllm-slots(budget=20)"], tokens=250, examples=1,
                   aware=[False], compile=False)
    exact, lost = found.scores
    assert exact.passkey == 1 and lost.passkey == lost.needle == 0
    assert lost.kv_bytes < exact.kv_bytes
    assert "1 examples of each kind" in str(found)
    assert found.as_dict()["scores"][1]["aware"] is False


def test_too_short_a_context_is_refused():
    with pytest.raises(KVCompileError, match="at least 200 tokens"):
        recall(None, None, [], tokens=100)
