"""`full` computes what Hugging Face computes, token for token."""

import pytest
import torch
from support import greedy, optimized, plain, prompt, slow_but

ARCHS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2",
         "starcoder2", "smollm3", "deepseek_v2", "mixtral", "gpt_oss")
MORE = ("gemma", "phi", "gpt_neox", "opt", "stablelm", "olmo2", "granite", "cohere", "cohere2",
        "exaone4", "glm4", "qwen3_moe", "bitnet", "deepseek_v3", "nemotron")


QUICK = ("llama", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "smollm3", "deepseek_v2", "gpt_oss")


@pytest.mark.parametrize("arch", slow_but(QUICK, ARCHS))
def test_greedy_tokens_and_logits_equal(arch):
    theirs, ours = plain(arch), optimized(arch)
    for tokens in (1, 7, 200):
        ids = prompt(tokens)
        options = dict(return_dict_in_generate=True, output_logits=True)
        want, got = greedy(theirs, ids, 64, **options), greedy(ours, ids, 64, **options)
        assert torch.equal(want.sequences, got.sequences), f"prompt of {tokens}"
        assert want.sequences[0, tokens:].unique().numel() > 5, "the test could not fail"
        for a, b in zip(want.logits, got.logits, strict=True):
            assert (a - b).abs().max() <= 1e-4 + 1e-5 * a.abs().max()


@pytest.mark.parametrize("arch", ARCHS)
def test_left_padded_batch_equals_hugging_face(arch):
    ids = prompt(40, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    mask[2, :33] = 0
    want = greedy(plain(arch), ids, 64, attention_mask=mask)
    got = greedy(optimized(arch), ids, 64, attention_mask=mask)
    assert torch.equal(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MORE)
def test_other_architectures_are_exact_too(arch):
    ids = prompt(50)
    assert torch.equal(greedy(plain(arch), ids, 32), greedy(optimized(arch), ids, 32))
