"""The optimized model does what its users do with the original."""

import copy

import pytest
import torch
from support import EVERY, greedy, optimized, plain, prompt
from transformers import LlamaForCausalLM, PreTrainedModel, TextStreamer

import kvcompile


def test_is_the_same_class_with_the_same_weights():
    model, ours = plain("llama"), optimized("llama")
    assert isinstance(ours, LlamaForCausalLM) and isinstance(ours, PreTrainedModel)
    for (name, a), (other, b) in zip(model.named_parameters(), ours.named_parameters(),
                                     strict=True):
        assert name == other and a is b


def test_the_users_model_is_untouched():
    model = plain("gemma2")
    before = (model.config.to_json_string(), {k: v.clone() for k, v in model.state_dict().items()},
              model(prompt(9)).logits, model.config._attn_implementation)
    model.train()
    kvcompile.optimize(model, "full", compile=False)
    assert all(m.training for m in model.modules())
    model.eval()
    assert before[0] == model.config.to_json_string()
    assert before[3] == model.config._attn_implementation
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
    assert torch.equal(model(prompt(9)).logits, before[2])


@pytest.mark.parametrize("recipe", EVERY)
def test_a_batch_gives_each_row_what_it_gives_alone(recipe):
    model = optimized("llama", recipe)
    ids, lengths = prompt(150, batch=4), (150, 90, 33, 1)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, -n:] = 1
    batch = greedy(model, ids, 40, attention_mask=mask)
    for row, n in enumerate(lengths):
        alone = greedy(model, ids[row : row + 1, -n:], 40)
        assert torch.equal(batch[row, 150 - n :], alone[0]), f"row of {n} tokens"


@pytest.mark.parametrize("recipe", EVERY)
def test_several_turns_over_one_cache(recipe):
    """Continuing a cache equals giving the same calls to forward one after the other."""
    model = optimized("llama", recipe)
    first = greedy(model, prompt(60), 20, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, prompt(30, seed=1)], 1)
    second = greedy(model, turn, 20, past_key_values=first.past_key_values)
    cache = model(prompt(60), use_cache=True).past_key_values
    for i in range(60, 79):
        model(first.sequences[:, i : i + 1], past_key_values=cache)
    logits = model(turn[:, 79:], past_key_values=cache).logits
    tokens = [logits[:, -1:].argmax(-1)]
    while len(tokens) < 20:
        tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    assert torch.equal(second[:, turn.shape[1] :], torch.cat(tokens, 1))


def test_turns_under_full_equal_hugging_face():
    outs = []
    for model in (plain("llama"), optimized("llama")):
        first = greedy(model, prompt(60), 20, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, prompt(30, seed=1)], 1)
        outs.append(greedy(model, turn, 20, past_key_values=first.past_key_values))
    assert torch.equal(*outs)


def test_beams_sampling_and_streaming_equal_hugging_face(capsys):
    ids = prompt(30, batch=2)

    class Tokens:  # a tokenizer is all that a streamer wants
        def decode(self, tokens, **options):
            return " ".join(map(str, torch.as_tensor(tokens).flatten().tolist())) + "\n"

    outs, texts = [], []
    for model in (plain("llama"), optimized("llama")):
        beams = greedy(model, ids, 20, num_beams=3, num_return_sequences=2)
        torch.manual_seed(3)
        sampled = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                                 do_sample=True, top_k=20)
        greedy(model, ids[:1], 10, streamer=TextStreamer(Tokens()))
        outs.append((beams, sampled))
        texts.append(capsys.readouterr().out)
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
    assert texts[0] == texts[1] != ""


def test_a_compiled_step_is_given_rows_side_by_side(monkeypatch):
    """Positions that are left out are one row expanded, and a mask of bools is cut out of a wider
    one: the compiled step reads neither."""
    model = kvcompile.optimize(optimized("llama:2"), "full", compile=True)
    engine, strides = model.kvcompile.engine, []
    monkeypatch.setattr(engine, "compile", True)

    def step(batch, device):
        def call(ids, positions, valid, *rest):
            strides.append([x.stride() for x in (ids, positions, valid)])
            return engine.program.phases["extend"](ids, positions, valid, *rest)
        return call

    monkeypatch.setattr(engine, "step", step)
    monkeypatch.setattr(engine.alone, "compile", False)
    ids, mask = prompt(20, 2), torch.ones(2, 21, dtype=torch.bool)
    cache = model(ids, attention_mask=mask[:, :20], use_cache=True).past_key_values
    got = model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True).logits
    assert strides == [[(1, 1)] * 3]
    want = plain("llama:2")(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert (got - want).abs().max() < 1e-4


def test_inputs_embeds_and_logits_to_keep():
    model, ids = optimized("llama"), prompt(20)
    embeds = model.get_input_embeddings()(ids)
    every = model(ids).logits
    assert torch.equal(model(inputs_embeds=embeds).logits, every)
    some = model(ids, logits_to_keep=3).logits
    weight, length = model.get_output_embeddings().weight, model.model.norm.weight.norm()
    most = 2 * 64 * torch.finfo(torch.float32).eps * length * weight.norm(dim=-1).max()
    assert (some - every[:, -3:]).abs().max() <= most  # sums of 64 products, in any order
    got = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids),
                         max_new_tokens=10, do_sample=False)
    assert torch.equal(got, greedy(model, ids, 10)[:, 20:])


def test_loss_equals_hugging_face():
    ids = prompt(20)
    want, got = (m(ids, labels=ids).loss for m in (plain("llama"), optimized("llama")))
    assert abs(want - got) <= 1e-5 * abs(want)


@pytest.mark.parametrize("recipe", EVERY)
def test_copies_of_a_cache_are_independent(recipe):
    model, ids = optimized("llama", recipe), prompt(140)
    cache = model(ids, use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    answers = []
    for question in (1, 2):
        used = copy.deepcopy(cache)
        answers.append(greedy(model, torch.cat([ids, prompt(9, seed=question)], 1), 10,
                              past_key_values=used))
    assert twin.get_seq_length() == cache.get_seq_length() == 140
    again = greedy(model, torch.cat([ids, prompt(9, seed=1)], 1), 10, past_key_values=twin)
    assert torch.equal(again, answers[0])


@pytest.mark.parametrize("recipe", ("full", "kivi(bits=4)", "int8"))
def test_crop_then_go_on(recipe):
    """What is left after crop is seen as before; under `full` exactly as if never longer."""
    model, ids = optimized("llama", recipe), prompt(300)
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-133)
    assert cache.get_seq_length() == 167 and cache.stored_tokens(0).eq(167).all()
    assert torch.equal(cache.positions(0)[0, 0], torch.arange(167))
    got = model(ids[:, 167:170], past_key_values=cache).logits
    if recipe == "full":
        fresh = model(ids[:, :167], use_cache=True).past_key_values
        want = model(ids[:, 167:170], past_key_values=fresh).logits
        assert (got - want).abs().max() <= 1e-4 + 1e-5 * want.abs().max()
    else:  # close to the exact logits: within what the format itself does to them
        want = optimized("llama")(ids[:, :170]).logits[:, 167:]
        whole = model(ids[:, :167], use_cache=True).past_key_values
        other = model(ids[:, 167:170], past_key_values=whole).logits
        assert (got - want).abs().max() <= 2 * (other - want).abs().max() + 1e-3


def test_chunked_prefill_is_exact_under_full():
    chunked = kvcompile.optimize(optimized("llama"), "full", compile=False, prefill_chunk=50)
    ids = prompt(170)
    assert torch.equal(greedy(chunked, ids, 20), greedy(plain("llama"), ids, 20))
    native = greedy(optimized("llama"), ids, 20, prefill_chunk_size=64)
    assert torch.equal(native, greedy(plain("llama"), ids, 20))


def test_holes_and_right_padding_in_the_mask():
    model, ids = optimized("llama"), prompt(40, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 10:20] = 0
    mask[1, 30:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    want = [model(ids[i : i + 1, mask[i].bool()]).logits for i in range(2)]
    for row in range(2):
        assert (got.logits[row, mask[row].bool()] - want[row][0]).abs().max() <= 1e-4
    assert got.past_key_values.stored_tokens(0).tolist() == [[30, 30], [30, 30]]


def test_assisted_decoding_equals_greedy():
    ids = prompt(20)
    helped = greedy(optimized("llama"), ids, 24, assistant_model=plain("llama"))
    assert torch.equal(helped, greedy(plain("llama"), ids, 24))
