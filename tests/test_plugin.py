"""A third party's format and method, found by their entry points, under all laws; and broken."""

import dataclasses
from pathlib import Path

import pytest

from kvcompile import format as formats_module
from kvcompile import method as methods_module
from kvcompile.errors import KVCompileError
from kvcompile.testing import LAWS, check_registered, exempt, pairs, registered
from kvcompile.testing.__main__ import main


@pytest.fixture
def installed(monkeypatch):
    """tests/plugin on the path, as an installed package is."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "plugin")
    caches = (formats_module.formats, formats_module.format_of, methods_module._discovered)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_my_plugin(installed):
    check_registered("rounded")


def test_a_broken_format_is_caught_with_a_line_that_repeats_it(installed, monkeypatch):
    cls = formats_module.formats()["rounded"]
    monkeypatch.setattr(cls, "error_bound", lambda self, planes, dim, side: (
        self.decode(planes, dim, None, side).abs() * 2.0 ** -(self.bits + 1)))
    with pytest.raises(AssertionError) as error:
        check_registered("rounded")
    told = "\n".join(error.value.__notes__)
    assert "reproduce: python -m kvcompile.testing rounded error_is_bounded --seed " in told


def test_names_and_opt_outs():
    with pytest.raises(KVCompileError, match="nothing is registered as kivy; did you mean 'kivi'?"):
        check_registered("kivy")
    kivi = registered()["method"]["kivi"]
    out = dataclasses.replace(kivi, exempt={"a_batch_is_its_rows": "rows are pooled"})
    assert exempt(out, "a_batch_is_its_rows") == "rows are pooled"
    assert not exempt(kivi, "a_batch_is_its_rows")
    for wrong in ({"a_batch_is_its_rows": " "}, {"batches": "no"}):
        with pytest.raises(KVCompileError, match="must give a reason for one of"):
            exempt(dataclasses.replace(kivi, exempt=wrong), "a_batch_is_its_rows")


def test_everything_registered_is_covered():
    """Every kind has laws, and every registered thing keeps some or says why not."""
    covered = {(one.kind, name) for one, name, _ in pairs()}
    assert covered == {(kind, name) for kind, things in registered().items() for name in things}


def test_what_is_covered_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["laws"])
    main()
    told = capsys.readouterr().out
    assert f"{len({x.name for x in LAWS})} laws, {len(list(pairs()))} pairs, " in told
    outs = told.split(" opt-outs")[1].strip().splitlines()
    assert all(line.partition(": ")[2] for line in outs)     # each with its reason
    monkeypatch.setattr("sys.argv", ["laws", "dense", "text_round_trips", "--seed", "3"])
    main()
    assert capsys.readouterr().out == "dense text_round_trips: holds\n"
