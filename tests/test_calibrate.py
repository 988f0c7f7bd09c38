"""calibrate, save and load: what is found once is used again, and refused for another model."""

import json

import pytest
import torch
from support import greedy, optimized, plain, prompt

import kvcompile
from kvcompile.calibration.samples import Samples
from kvcompile.errors import KVCompileError
from kvcompile.models.tiny import tiny

RECIPE = "kvtuner(bits=3, group=16, residual=32)"


@pytest.fixture(scope="module")
def found():
    return kvcompile.calibrate(optimized("llama:2"), RECIPE, prompt(128, 2))


def test_what_is_found_is_what_optimize_finds(found):
    program = optimized("llama:2").kvcompile.program
    assert found.found == program.lower(RECIPE, calibration=prompt(128, 2)).recipe
    assert str(found.recipe) == RECIPE and torch.equal(found.ids, prompt(128, 2))
    model = kvcompile.optimize(optimized("llama:2"), RECIPE, calibration=found, compile=False)
    assert model.kvcompile.program.recipe == found.found
    other = kvcompile.optimize(optimized("llama:2"), "kvtuner(bits=6)", calibration=found,
                               compile=False)
    assert sum(map(sum, (other.kvcompile.program.recipe.terms[0].get(x) for x in "kv"))) <= 24


def test_similarities_are_mean_cosines(found):
    seen = Samples(optimized("llama:2").kvcompile.program.snapshots["capture"],
                   found.ids).attention
    for side in "kv":
        a, b = (getattr(s, side).double().flatten(0, 2) for s in seen)
        want = ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()
        table = found.statistics[f"similarity.{side}"]
        assert table[0, 1] == table[1, 0] == pytest.approx(float(want), abs=1e-6)
        assert torch.allclose(table.diagonal(), torch.ones(2))


def test_a_calibration_survives_a_folder(found, tmp_path):
    found.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"calibration.json", "calibration.safetensors"}
    again = kvcompile.Calibration.load(tmp_path)
    assert (again.recipe, again.found, again.model) == (found.recipe, found.found, found.model)
    assert torch.equal(again.ids, found.ids)
    assert all(torch.equal(x, again.statistics[n]) for n, x in found.statistics.items())


def test_texts_take_a_tokenizer():
    class Words:
        def __call__(self, text):
            return {"input_ids": [3 + len(word) for word in text.split()]}

    texts = ["a bb ccc " * 30, "dd " * 90]
    found = kvcompile.calibrate(optimized("llama:2"), "int8", texts, tokenizer=Words(), tokens=64)
    assert found.ids.shape == (2, 64) and found.ids[0, :3].tolist() == [4, 5, 6]
    assert str(found.found) == "int8"
    for texts, tokenizer, message in (
            (["short"], Words(), "text 0 has 1 tokens, 64 are needed"),
            (["a b"], None, "texts need a tokenizer"),
            ([], Words(), "at least one text")):
        with pytest.raises(KVCompileError, match=message):
            kvcompile.calibrate(optimized("llama:2"), "int8", texts, tokenizer=tokenizer, tokens=64)


def test_an_optimized_model_survives_a_folder(found, tmp_path):
    model = kvcompile.optimize(optimized("llama:2"), RECIPE, calibration=found, compile=False,
                               max_length=300)
    kvcompile.save(model, tmp_path)
    again = kvcompile.load(tmp_path, plain("llama:2"), compile=False)
    assert again.kvcompile.program.recipe == model.kvcompile.program.recipe
    assert again.kvcompile.max_length == 300
    assert torch.equal(again.kvcompile.program.text, found.ids)
    ids = prompt(150)
    assert torch.equal(greedy(again, ids, 9), greedy(model, ids, 9))
    whole = tmp_path / "weights"
    plain("llama:2").save_pretrained(whole)
    from transformers import AutoModelForCausalLM

    kvcompile.save(kvcompile.optimize(AutoModelForCausalLM.from_pretrained(whole), "int8",
                                      compile=False), tmp_path / "b")
    alone = kvcompile.load(tmp_path / "b", compile=False)
    assert str(alone.kvcompile.program.recipe) == "int8" and alone.kvcompile.program.text is None


def test_what_is_refused(found, tmp_path):
    other = tiny("llama", num_hidden_layers=3)
    with pytest.raises(KVCompileError, match="the calibration is of a model with num_hidden_layers "
                                             "2, this one has 3"):
        kvcompile.optimize(other, RECIPE, calibration=found, compile=False)
    kvcompile.save(optimized("llama:2", "int8"), tmp_path)
    with pytest.raises(KVCompileError, match="num_hidden_layers 2, this one has 3"):
        kvcompile.load(tmp_path, other)
    with pytest.raises(KVCompileError, match="saved from the weights '.*', which cannot be loaded"):
        kvcompile.load(tmp_path)
    with pytest.raises(KVCompileError, match="holds no kvcompile calibration"):
        kvcompile.Calibration.load(tmp_path)
    with pytest.raises(KVCompileError, match="save takes what optimize"):
        kvcompile.save(plain("llama:2"), tmp_path)
    path = tmp_path / "optimized.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(KVCompileError, match="has version 99, this kvcompile reads 1"):
        kvcompile.load(tmp_path, plain("llama:2"))
    for text, why in ((b"{", "cannot be read"), (b"\xff\xfe", "cannot be read"),
                      (b"[]", "is no kvcompile optimized"),
                      (b'{"kvcompile": "optimized"}', "has version None"),
                      (b'{"kvcompile": "optimized", "version": 1}', "recipe is missing")):
        path.write_bytes(text)
        with pytest.raises(KVCompileError, match=why) as error:
            kvcompile.load(tmp_path, plain("llama:2"))
        assert "\n" not in str(error.value)
    found.save(tmp_path / "found")
    (tmp_path / "found" / "calibration.safetensors").write_bytes(b"nothing")
    with pytest.raises(KVCompileError, match="cannot be read"):
        kvcompile.Calibration.load(tmp_path / "found")
    with pytest.raises(KVCompileError, match="cannot be read|holds no kvcompile"):
        kvcompile.Calibration.load(path)  # a file, where a folder should be
    wide = tiny("llama", num_hidden_layers=2, intermediate_size=96)
    with pytest.raises(KVCompileError, match="intermediate_size"):
        kvcompile.optimize(wide, RECIPE, calibration=found, compile=False)


@pytest.mark.parametrize("change, why", [(1000, "the token id 1000, the model knows 0 to 127"),
                                         (-1, "the token id -1")])
def test_ids_of_another_tokenizer_are_refused(change, why):
    ids = prompt(64, 1)
    ids[0, 5] = change
    with pytest.raises(KVCompileError, match=why):
        kvcompile.calibrate(optimized("llama:2"), "int8", ids)
