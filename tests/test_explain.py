"""explain() predicts what is allocated, says what passes did, and reads as a table."""

import json

import pytest
import torch
from support import EVERY, optimized, plain, prompt

import kvcompile
from kvcompile.engine import Engine
from kvcompile.errors import CacheFullError, KVCompileError, RecipeError
from kvcompile.explain import Report
from kvcompile.measure.baseline import Uncompressed, cache_nbytes, uncompressed
from kvcompile.models.decoder import Decoder
from kvcompile.models.tiny import tiny
from kvcompile.own_cache import OwnCache
from kvcompile.recipe import Recipe
from kvcompile.rewrite import Refused
from kvcompile.rows import bytes_per_token, storage
from kvcompile.store import Store

LENGTHS = (1, 127, 128, 129, 1000)


def prefill(report: Report, tokens: int, batch: int) -> OwnCache:
    """The cache after a real prompt through the report's own program."""
    cache = OwnCache(report.sites, str(report.program.recipe), "test", report.max_length)
    ids = prompt(tokens, batch)
    positions = torch.arange(tokens).expand(batch, -1)
    with torch.no_grad():
        Engine(report.program, compile=False).run(
            cache, ids, positions, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1).long())
    return cache


@pytest.mark.parametrize("recipe", EVERY)
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
def test_bytes_are_what_a_prefill_allocates(arch: str, recipe: str) -> None:
    report = kvcompile.explain(optimized(arch), recipe)
    for tokens in LENGTHS:
        for batch in (1, 3):
            if tokens * batch > 1000 and arch != "llama":
                continue  # once is enough for the slowest
            assert report.kv_bytes(tokens, batch) == prefill(report, tokens, batch).nbytes


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2", "deepseek_v2", "gpt2"])
def test_baseline_bytes_are_those_of_transformers_cache(arch: str) -> None:
    layers = uncompressed(plain(arch))
    for tokens, batch in ((1, 1), (6, 1), (7, 3), (8, 1), (200, 2)):
        with torch.no_grad():
            cache = plain(arch)(prompt(tokens, batch), use_cache=True).past_key_values
        assert batch * sum(layer.nbytes(tokens) for layer in layers) == cache_nbytes(cache)


def test_latent_attention_is_measured_against_the_latent() -> None:
    config = plain("deepseek_v2").config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert uncompressed(plain("deepseek_v2")) == (Uncompressed(4 * width),) * 4


def test_the_baseline_leaves_the_model_as_it_was() -> None:
    model = plain("llama")
    model.model.layers[1].train()
    uncompressed(model)
    assert [m for m in model.modules() if m.training] == list(model.model.layers[1].modules())
    model.eval()


def test_max_length_is_allocated_at_once_and_not_exceeded() -> None:
    model = kvcompile.optimize(optimized("llama"), "kivi(bits=4)", max_length=300, compile=False)
    report = kvcompile.explain(model)
    assert report.max_length == 300
    for tokens in (1, 127, 300):
        assert report.kv_bytes(tokens) == prefill(report, tokens, 1).nbytes
    with torch.no_grad():
        assert report.kv_bytes(5, 2) == model(prompt(5, 2), use_cache=True).past_key_values.nbytes
    with pytest.raises(CacheFullError, match="301 tokens exceed max_length=300"):
        report.kv_bytes(301)
    assert "300 tokens:" in str(report)


def test_bytes_per_token_are_the_slope_of_the_bytes() -> None:
    for recipe in ("full", "kivi(bits=2)", "kivi(bits=4, group=64)", "int8", "fp8(format=e5m2)"):
        report = kvcompile.explain(optimized("llama"), recipe)
        many = 128 * 50
        tables = sum(4 * s.heads * 50 for s in report.sites) * 2  # K and V, 50 pages more
        slope = report.kv_bytes(3 * many) - report.kv_bytes(2 * many) - tables
        assert slope == many * sum(bytes_per_token(site) for site in report.sites)


def test_rows_say_what_each_pass_did() -> None:
    report = kvcompile.explain(optimized("gemma2"), "kivi(bits=4, layers=1:)")
    done = {(row.layer, row.name): row for row in report.rows}
    assert done[0, "select"].what == "7 last tokens"
    assert (0, "quantize") not in done and (1, "select") not in done
    quantized = done[1, "quantize"]
    assert (quantized.status, quantized.before, quantized.after) == ("rewritten", 256, 44)
    assert "int(bits=4" in quantized.what and quantized.storage.startswith("K int(bits=4")
    assert done[1, "insert_cache"].before == done[1, "insert_cache"].after == 44
    assert {row.layer for row in report.rows} == {0, 1, 2, 3}
    assert [row.layer for row in report.rows] == sorted(row.layer for row in report.rows)
    assert all((row.kernel, row.why) == ("fused C++", "") for row in report.rows)


def test_what_has_no_kernel_says_why() -> None:
    report = kvcompile.explain(tiny("llama", head_dim=24), "fp8")
    rows = report.rows
    assert "eager body (layers 0-3): kvc.attend runs its plain body: head" in str(report)
    why = "head dimension 24 is not a multiple of 16 up to 1024"
    assert {row.kernel for row in rows} == {"eager body"}
    assert {row.why for row in rows} == {f"kvc.attend runs its plain body: {why}; "
                                         f"kvc.append runs its plain body: {why}"}


def test_it_says_what_runs_between_attentions() -> None:
    line = "a prompt of 1,024 tokens or more: what lies between attentions is compiled"
    assert f"\n{line}\n" in str(kvcompile.explain(optimized("llama"), "int8"))
    told = str(kvcompile.explain(optimized("deepseek_v2"), "full")).replace("\n    ", " ")
    assert f"{line} in 2 of 3 places; the others, which" in told
    single = kvcompile.explain(tiny("llama", num_hidden_layers=1), "full")
    assert "between attentions" not in str(single)


def test_a_refusal_shows_its_reason_and_node() -> None:
    program = optimized("llama").kvcompile.program.lower("kivi(bits=4)")
    program.outcomes["quantize"][2] = Refused(2, "head dimension 16 is odd", "attention_2")
    report = Report(program, uncompressed(plain("llama")))
    row = next(r for r in report.rows if (r.layer, r.name) == (2, "quantize"))
    assert (row.status, row.what, row.node) == ("refused", "head dimension 16 is odd",
                                                "attention_2")
    assert "refused:" in str(report) and "(attention_2)" in str(report)


def test_terms_that_change_nothing_are_warned_about() -> None:
    def warned(arch: str, recipe: str) -> list[tuple[int, str]]:
        rows = kvcompile.explain(optimized(arch), recipe).rows
        return [(row.layer, row.what) for row in rows if row.status == "warning"]

    idle = "streamingllm(window=64) changes nothing here"
    assert warned("gemma2", "streamingllm(window=64)+kivi") == [(0, idle), (2, idle)]
    assert warned("llama", "full+streamingllm(window=64)+kivi(layers=0)") == []
    assert [layer for layer, _ in warned("llama", "int8+int8(layers=:2)")] == [0, 0, 1, 1]


def test_equal_layers_share_a_block_of_the_table() -> None:
    text = str(kvcompile.explain(optimized("llama"), "kivi(bits=4, layers=1:)"))
    lines = text.splitlines()
    assert lines[0] == "LlamaForCausalLM, recipe: kivi(bits=4, layers=1:)"
    starts = [line.split()[0] for line in lines if line.startswith((" 0", " 1-3"))]
    assert starts == ["0", "1-3"]
    assert "256 -> 44" in text and "fused C++" in text
    assert lines[-1].startswith("4,096 tokens: 4,194,304 bytes uncompressed -> ")
    assert "0, 2" in str(kvcompile.explain(optimized("gemma2"), "full"))


def test_the_table_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    report = kvcompile.explain(optimized("llama"), "streamingllm+kivi(bits=2)")
    plain_text = str(report)
    for name, value in (("COLUMNS", "40"), ("FORCE_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        assert str(report) == plain_text
    assert "\x1b" not in plain_text
    assert max(map(len, plain_text.splitlines())) <= 100


def test_json_holds_the_rows() -> None:
    report = kvcompile.explain(optimized("llama"), "kivi(bits=2)")
    told = json.loads(report.to_json())
    assert (told["model"], told["recipe"]) == ("LlamaForCausalLM", "kivi(bits=2)")
    assert len(told["rows"]) == len(report.rows)
    row = next(row for row in told["rows"] if row["pass"] == "quantize")
    assert (row["layer"], row["before"], row["after"]) == (0, 256, 28)


def test_decoders_in_plain_pytorch_are_measured_against_their_k_and_v() -> None:
    report = kvcompile.explain(Decoder.tiny(), "kivi(bits=4)")
    bytes_each = [site.exact_bytes_per_token for site in report.sites]
    assert report.baseline_kv_bytes(100, 3) == 300 * sum(bytes_each)
    assert [row.before for row in report.rows if row.name == "quantize"] == bytes_each


def test_storage_in_short() -> None:
    for text, want in (
        ("store", "K, V dense"),
        ("store(sinks=4, window=9)", "K, V dense\nfirst 4 and last 9 tokens"),
        ("store(sinks=4)", "K, V dense\nfirst 4 tokens exact"),
        ("store(k=fp8, v=fp8, v_lag=3)", "K fp8\nV fp8, last 3 exact"),
        ("store(k=int(bits=2, axis=channel), k_block=64)",
         "K int(bits=2, axis=channel), 64 at a time\nV dense"),
        ("store(k=int(axis=channel), k_block=32)", "K int(axis=channel)\nV dense"),
    ):
        assert storage(Store.parse(text)) == want


def test_a_plain_model_and_mistakes() -> None:
    model = tiny("llama", num_hidden_layers=1)
    report = kvcompile.explain(model, "kivi(bits=4)")
    want = kvcompile.explain(optimized("llama"), "kivi(bits=4)")
    assert report.rows == [row for row in want.rows if row.layer == 0]
    assert 4 * report.kv_bytes(777) == want.kv_bytes(777)
    assert kvcompile.explain(model).program.recipe == Recipe.parse("full")
    with pytest.raises(RecipeError, match="unknown method 'kivy'"):
        kvcompile.explain(optimized("llama"), "kivy")
    for bad in (0, -1, 1.5):
        with pytest.raises(KVCompileError, match="positive whole number"):
            report.kv_bytes(bad)  # type: ignore[arg-type]
        with pytest.raises(KVCompileError, match="positive whole number"):
            report.baseline_kv_bytes(4, bad)  # type: ignore[arg-type]


def test_eviction_while_decoding_has_a_kernel() -> None:
    rows = [r for r in kvcompile.explain(optimized("llama"), "h2o(budget=24)").rows if r.kernel]
    assert rows and all(r.kernel == "fused C++" for r in rows)
    assert {r.why for r in rows} == {"calls of several tokens add up what each token is given in "
                                     "the plain body of kvc.attend"}
