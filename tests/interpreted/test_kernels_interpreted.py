"""Triton's kernels against the plain bodies, by Triton's interpreter.

tests/test_triton.py runs these in a process of their own: Triton decides when it is imported.
"""

import warnings
from math import gcd

import pytest
import torch

from kvcompile.format import formats
from kvcompile.kernels.triton_source import installed, interpreted
from kvcompile.recipe import Term, parse_term

if not interpreted():
    pytest.skip("run by tests/test_triton.py with TRITON_INTERPRET=1", allow_module_level=True)
if not installed():
    pytest.skip("no Triton: pip install triton", allow_module_level=True)

from triton_case import APPENDED, MOVED, STORES, Case, moved_alike, stored_alike  # noqa: E402

NARROW = "store(k=int(bits=2, axis=channel, group=16), v=int(bits=4, group=16), v_lag=20)"
OPTIONS = {
    "softcap": dict(store=STORES["int8"], softcap=20.0, sinks=True, lengths=(0, 140)),
    "own-window": dict(store="store(k=int, v=int, window=76)", window=77, lengths=(3, 140)),
    "wide-window": dict(store=STORES["kivi4"], window=90, lengths=(40, 140)),
    "tokens": dict(store=STORES["kivi4"], tokens=5, padding=True, lengths=(0, 150)),
    "tokens-window": dict(store=STORES["kivi4"], tokens=21, window=50, group=1, lengths=(9, 150)),
    "tokens-sinks": dict(store=STORES["window"], tokens=3, sinks=True, lengths=(2, 150)),
    "mass": dict(store=STORES["kivi4"], lengths=(0, 17, 150), mass=True),
    "mass-tokens": dict(store=STORES["outliers"], tokens=5, padding=True, lengths=(150,),
                        mass=True, sinks=True, window=60),
    "heads": dict(store=STORES["kivi2"], heads=2, group=9, lengths=(150,)),
    "padding": dict(store=STORES["full"], padding=True, lengths=(20, 20)),
    "bf16": dict(store=STORES["kivi4"], dtype=torch.bfloat16, lengths=(150,)),
    "bf16-turned": dict(store=STORES["quarot"], dtype=torch.bfloat16, lengths=(150,)),
    "fp16": dict(store=STORES["kivi2"], dtype=torch.float16, lengths=(150,)),
    "dims": dict(store=STORES["kivi2"], dims=(16, 64), lengths=(150,)),
    "odd-dims": dict(store=NARROW, dims=(80, 48), lengths=(70,)),
    "latent": dict(store=STORES["latent"], dims=(48, 32), lengths=(0, 150), tokens=3, mass=True),
    "latent-turned": dict(store=STORES["latent-turned"], dims=(64, 16), lengths=(3, 150)),
    "odd-dims-2": dict(store=STORES["gear"], dims=(96, 96), lengths=(140,)),
}
LAWS = {"full", "window", "kivi2", "kivi4", "int8", "fp8", "nf4", "quarot", "zipcache", "gear",
        "nuq", "latent", "slots"}  # tried by test_registered_interpreted.py, with other numbers
TWICE = {"clip", "outliers", "nested", "centered", "minicache", "latent-turned"}  # parts of others'


RARE = {"bf16-turned", "fp16", "heads", "odd-dims-2", "mass-tokens"}


def slow(names, of=STORES):
    return [pytest.param(n, marks=pytest.mark.slow) if n in names else n for n in of]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():  # numpy tells of what masks leave out
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.mark.parametrize("name", slow(LAWS))
def test_attend_is_the_body(name):
    Case(STORES[name]).check()


@pytest.mark.parametrize("name", slow(RARE, OPTIONS))
def test_attend_with_options(name):
    Case(**OPTIONS[name]).check()


@pytest.mark.parametrize("name", slow(LAWS | TWICE, APPENDED))
def test_append_is_the_body_bit_for_bit(name):
    assert stored_alike(STORES[name])


@pytest.mark.parametrize("dims, dtype", [((80, 48), torch.float32), ((16, 64), torch.bfloat16)],
                         ids=str)
def test_append_other_heads(dims, dtype):
    assert stored_alike(NARROW, (40, 1), dims, dtype, rows=2)


@pytest.mark.parametrize("name", ["kivi8", "minicache+kivi"])
def test_append_to_rows_of_two_layers(name):
    assert stored_alike(STORES[name], (171, 1, 60), rows=2, slots=(0, 1))


def test_append_of_a_block_in_pieces():
    assert stored_alike(STORES["outliers"], (90, 1), dims=(128, 96))


def test_append_where_each_head_keeps_tokens_of_its_own():
    assert stored_alike(STORES["slots"], heads=2, rows=2, own=True)


@pytest.mark.parametrize("store", MOVED)
def test_compaction_is_the_body_bit_for_bit(store):
    assert moved_alike(store)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", STORES)
def test_every_head_size(name, dim, dtype):
    Case(fitting(STORES[name], dim), (140,), 1, 4, (dim, dim), dtype).check()


def fitting(store, dim):
    """The store with groups of 16 or 32, also where none is said, if `dim` has no groups of 64."""
    def narrow(part):
        name = getattr(part, "name", part)
        args = [(key, narrow(value)) for key, value in getattr(part, "args", ()) if key != "group"]
        if name in formats() and "group" in formats()[name].__match_args__:
            args.append(("group", gcd(dim, 32)))
        return Term(name, tuple(args)) if args else part
    return str(narrow(parse_term(store))) if dim > 64 and dim % 64 else store
