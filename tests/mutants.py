"""Plants faults in a copy of the product's code and shows that the property tests catch them.

    python tests/mutants.py [NAME ...]        exit code 1 if one is not caught; `make mutants`

Each fault is one replacement in one file, and the property tests that are run on it; a fault is
caught if they fail. The same tests pass without it (they are the suite's own).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CACHE, LAWS, KERNELS = "test_cache.py", "test_registered.py", "test_registered_kernels.py"
RULES = "test_cache_rules.py"


class Fault(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: str
    only: str = ""


FAULTS = {
    "scale-axis": Fault(
        "a group takes the scale of its neighbour", "kernels/coded.py",
        "scale, low = self.fit(grouped)", "scale, low = self.fit(grouped.roll(1, -2))",
        LAWS, "int-"),
    "range": Fault(
        "2^b steps instead of 2^b - 1", "kernels/int_group.py",
        "want = (high - low.float()) / (2**self.bits - 1)",
        "want = (high - low.float()) / 2**self.bits", LAWS, "int-"),
    "truncation": Fault(
        "codes are cut off instead of rounded", "kernels/values.py",
        "(x.round() + self.offset)", "(x.floor() + self.offset)", LAWS, "int-"),
    "field-order": Fault(
        "the codes of a byte are read backwards", "kernels/coded.py",
        "for shift in range(0, 8, bits)]", "for shift in range(8 - bits, -1, -bits)]",
        LAWS, "nf4-"),
    "outlier-place": Fault(
        "outliers go to each other's places", "kernels/outliers.py",
        'planes["rest"].float())\n', 'planes["rest"].float().roll(1, -2))\n', LAWS, "outliers-"),
    "turn": Fault(
        "a rotation is not its own inverse", "kernels/hadamard.py",
        "torch.cat([a + b, a - b], -1)", "torch.cat([a + b, b - a], -1)", LAWS, "hadamard-"),
    "late-flush": Fault(
        "tokens leave the recent tier one token late", "kvcompile/store.py",
        "end = max(0, queued - side.lag) //", "end = max(0, queued - side.lag - 1) //",
        LAWS, "kivi- and one_tier"),
    "lost-residual": Fault(
        "the first of a call's recent tokens is not written", "kernels/pages.py",
        'start = max(after["recent"].start, queued)\n',
        'start = max(after["recent"].start, queued + 1)\n', CACHE),
    "head-map": Fault(
        "query heads are given to kv heads in turn", "kernels/dense_attention.py",
        "folded = q.reshape(h, hq // h, s, q.shape[-1])",
        "folded = q.reshape(hq // h, h, s, q.shape[-1]).transpose(0, 1)",
        LAWS, "full-attention or int8-attention or full-decoding or int8-decoding"),
    "padding-counted": Fault(
        "the count of a row counts its padding", "kernels/eager.py",
        "planes[0][pages.at(slots)] += new[:, None]",
        "planes[0][pages.at(slots)] += valid.shape[1]", CACHE),
    "grown-rows": Fault(
        "growing copies a row from another's pages", "kvcompile/planes.py",
        "self.planes[table][:, rows],", "self.planes[table][:, rows].roll(1, 1),", CACHE),
    "stale-rows": Fault(
        "rows keep their lengths when they change places", "kvcompile/own_cache.py",
        "self._rows = [self._rows[r] for r in rows]",
        "self._rows = (self._rows * 3)[: len(rows)]", CACHE),
    "crop": Fault(
        "the last token of a cut block is not brought back", "kernels/pages.py",
        'new["recent"].end))\n', 'new["recent"].end) - 1)\n', CACHE),
    "shared-copy": Fault(
        "a copy of the cache shares its planes", "kvcompile/planes.py",
        "[p.clone() for p in self.planes]", "list(self.planes)", CACHE),
    "wrong-slot": Fault(
        "a layer reads the slot of the first one", "passes/insert_cache.py",
        "slot=slot,", "slot=0,", LAWS, "int8-attention or kivi-attention"),
    "window": Fault(
        "a window shows one token too many", "kernels/dense_attention.py",
        "(t > q - window)", "(t >= q - window)", "test_audit.py", "gemma2"),
    "softcap": Fault(
        "the soft cap is dropped where several tokens are read", "kernels/dense_attention.py",
        "        if softcap:\n", "        if False:\n", "test_audit.py", "gemma2"),
    "sinks": Fault(
        "the sink's share is dropped in a decode step", "kernels/dense_attention.py",
        "    if sinks is not None:\n", "    if False:\n", "test_audit.py", "views_its_output"),
    "evicted-sinks": Fault(
        "the first tokens of a head are evicted like any other", "kernels/evict.py",
        "    safe |= position < first + rule.sinks\n", "", RULES),
    "moved-token": Fault(
        "V of a token that takes another's place stays behind", "kernels/evict.py",
        "        if not spec.shape:\n            continue\n        to, source",
        "        if not spec.shape or spec.name[0] == 'v':\n            continue\n"
        "        to, source", RULES),
    "rebuilt-angles": Fault(
        "keys that are rebuilt are turned by the angles of others", "kernels/eager.py",
        "own.at(numbers).keys(old[0])", "own.at(numbers.flip(0)).keys(old[0])",
        LAWS, "palu-attention"),
    "turned-keys": Fault(
        "kept keys are turned one position too far", "kernels/select.py",
        "x.rotation(to - positions[at])", "x.rotation(to - positions[at] + 1)",
        LAWS, "slots-attention"),
    "stored-twice": Fault(
        "layers beside kvzip's store the prompt's second reading, too", "passes/insert_cache.py",
        "if chosen and again:", "if False:", "test_audit.py", "stored_once"),
    "cpp-flush": Fault(
        "C++: V leaves the recent tier one token early", "kernels/cpp/attend.h",
        "queued - C::V_LAG)", "queued - C::V_LAG + 1)", KERNELS, "method-kivi-"),
    "cpp-head-map": Fault(
        "C++: query heads are given to kv heads in turn", "kernels/cpp/attend.h",
        "q_at(i / C::H, i % C::H * C::G + g);\n", "q_at(i / C::H, i % C::H + g * C::H);\n",
        KERNELS, "method-kivi-"),
    "cpp-own-token": Fault(
        "C++: the value of the query's own token is lost", "kernels/cpp/attend.h",
        "o[d] = weight * read(v + d);", "o[d] = 0.0f;", KERNELS, "method-kivi-"),
    "cpp-scale": Fault(
        "C++: a block's scales are stored channel by channel in pairs swapped",
        "kernels/cpp/append.h", "/ GROUP * D + c, [&]", "/ GROUP * D + (c ^ 1), [&]",
        KERNELS, "method-kivi-"),
    "cpp-lost-residual": Fault(
        "C++: the first token after a flush is not written", "kernels/cpp/append.h",
        "if (number >= Q::end(n + 1)) Recent::write", "if (number > Q::end(n + 1)) Recent::write",
        KERNELS, "method-kivi-"),
    "cpp-evict-sinks": Fault(
        "C++: the first tokens of a head are evicted like any other", "kernels/cpp/evict.h",
        " || positions[n] < first + rule.sinks)", ")", "test_evict_kernel.py"),
}


def caught(fault: Fault, copy: Path) -> str:
    """The first test that fails with the fault planted, or ``""``."""
    path = copy / fault.file
    text = path.read_text()
    if fault.old not in text:
        raise SystemExit(f"{fault.file} has no {fault.old!r}: the fault has to be planted anew")
    path.write_text(text.replace(fault.old, fault.new))
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", f"tests/{fault.tests}", "-q", "-x", "-p", "no:xdist",
             "-m", "not slow", "--tb=line", *(["-k", fault.only] if fault.only else [])],
            cwd=copy, capture_output=True, text=True, check=False,
            env={**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
                 "HYPOTHESIS_PROFILE": "brief"})
    finally:
        path.write_text(text)
    if run.returncode in (4, 5):
        raise SystemExit(f"no tests: {fault.tests} -k {fault.only!r}")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", run.stdout, re.M)
    return failed[1] if failed and run.returncode == 1 else ""


def main() -> int:
    wanted = sys.argv[1:] or list(FAULTS)
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".git", ".venv", "build", ".*_cache", "__pycache__", ".hypothesis"))
        for name in wanted:
            start = time.perf_counter()
            test = caught(FAULTS[name], copy)
            missed += [] if test else [name]
            print(f"| {FAULTS[name].what} | `{FAULTS[name].file}` | "
                  f"{f'`{test}`' if test else 'NOT CAUGHT'} |", flush=True)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{len(wanted) - len(missed)} of {len(wanted)} faults caught", flush=True)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
