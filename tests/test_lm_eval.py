"""lm-evaluation-harness drives an optimized model as it drives any other."""

import pytest
import torch
from support import needs_smollm2

import kvcompile

lm_eval = pytest.importorskip("lm_eval")


@pytest.mark.slow
@needs_smollm2
def test_a_generated_task():
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from kvcompile.models.smollm2 import smollm2

    model, tokenizer = smollm2(torch.float32)
    questions = ("The capital of France is", "Question: what is two plus two? Answer:")
    texts = []
    for m in (model, kvcompile.optimize(model, "full", compile=False)):
        lm = HFLM(pretrained=m, tokenizer=tokenizer, batch_size=2)
        requests = [Instance("generate_until", {}, (q, {"until": ["\n"], "max_gen_toks": 8}), i)
                    for i, q in enumerate(questions)]
        texts.append(lm.generate_until(requests))
    assert texts[0] == texts[1] and "Paris" in texts[0][0]
