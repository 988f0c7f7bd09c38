import os
import time
from collections import Counter

import pytest
from hypothesis import Phase, settings
from hypothesis.statistics import collector

# examples of every law: few and always the same ones in CI, many and new ones at night
settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", max_examples=50, deadline=None, print_blob=True)
settings.register_profile("brief", settings.get_profile("ci"), phases=[Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write golden text anew")
    parser.addoption("--minutes", type=float, default=0, help="repeat property tests, each its "
                     "share of so many minutes (mark.share, default 1), and count examples")


LONG = tuple(f"test_{name}.py" for name in (
    "registered_kernels", "registered", "registered_triton", "triton", "exact", "compiled",
    "backend", "blockwise", "smollm2", "eviction", "place", "selection", "kernels"))


def pytest_collection_modifyitems(items):
    """Files that take long first: a process that gets one last keeps the others waiting."""
    items.sort(key=lambda item: [*LONG, item.path.name].index(item.path.name))


def pytest_configure(config):
    config.addinivalue_line("markers", "share(n): of --minutes, n times what others get")
    if config.getoption("--minutes"):
        config.pluginmanager.register(Minutes(60 * config.getoption("--minutes")))


class Minutes:
    """Repeats tests with new examples until the time is up; what is late shortens the rest."""

    def __init__(self, seconds):
        self.end, self.left = time.monotonic() + seconds, 0.0
        self.tried, self.events = Counter(), Counter()

    @staticmethod
    def share(item):
        return next((mark.args[0] for mark in item.iter_markers("share")), 1)

    def pytest_collection_finish(self, session):
        self.left = sum(map(self.share, session.items))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        own, name = self.share(item), f"{item.path.name}::{item.originalname}"
        if "one" in getattr(getattr(item, "callspec", None), "params", ()):
            name = item.callspec.params["one"].name
        run = item.runtest

        def count(stats):
            cases = [x for phase in ("reuse", "generate")
                     for x in stats.get(f"{phase}-phase", {}).get("test-cases", ())]
            self.events.update(e for x in cases for e in x["events"] if "logits" in e)
            self.tried[name] += sum(x["status"] in ("valid", "interesting") for x in cases)

        def repeated():
            until = time.monotonic() + (self.end - time.monotonic()) * own / max(self.left, own)
            again = True
            while again:
                before = self.tried[name]
                with collector.with_value(count):
                    run()
                again = (time.monotonic() < until and self.tried[name] > before
                         and not getattr(item, "_excinfo", None))
            self.left -= own

        item.runtest = repeated

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("examples tried")
        for name, count in sorted(self.tried.items()):
            terminalreporter.write_line(f"{count:9,}  {name}")
        terminalreporter.write_line(f"{self.tried.total():9,}  in all")
        for event, count in sorted(self.events.items()):
            terminalreporter.write_line(f"{count:9,}  {event}")
