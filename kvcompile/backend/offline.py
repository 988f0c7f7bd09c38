"""Triton kernels compiled for GPUs that are not there: what they take of the machine.

Triton 3.7 lowers to a cubin or a code object without a device; `cuobjdump` lies in its package.
Private: triton.compiler.ASTSource and triton.compile, to compile for a target that is not this one.
"""

import inspect
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvcompile.errors import KVCompileError, nearest
from kvcompile.kernels import triton_append, triton_attend, triton_evict, triton_tune
from kvcompile.kernels.rebuild import Made
from kvcompile.kernels.triton_source import helpers, installed, kernel
from kvcompile.store import Store

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
            torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32"}
STRIDES = re.compile("[qkv]_(layer|row|head|token)$")


@dataclass(frozen=True)
class Kernel:
    """A printed kernel, and how it is compiled: types and constants of its parameters."""

    name: str
    text: str
    types: Mapping[str, str]
    constants: Mapping[str, int]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Compiled:
    """What a target's compiler made of a kernel. Bytes but for counts of registers and spills."""

    kernel: str
    target: str
    failed: str                 # why there is none; "" if there is
    registers: int = 0          # of a thread
    spills: int = 0             # loads and stores of spilled registers
    local: int = 0              # memory of a thread beside its registers
    shared: int = 0             # memory of a block
    code_load: int = 0          # widest load of packed codes; 0: the store has none
    mma: int = 0                # matrix instructions
    assembly: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Figures in plain types."""
        return {key: value for key, value in asdict(self).items() if key != "assembly"}


def kernels(store: Store, shape: triton_attend.Shape, target: str = TARGETS[0],
            tried: bool = False) -> tuple[list[Kernel], list[str]]:
    """The kernels of a store on a target, and why one is missing where it is.

    `tried`: kvc.attend's in all the ways that tuning tries, not the default alone.
    """
    found, reasons = [], []
    planes = _planes(store, shape.dims, shape.dtype)
    own = POINTERS[shape.dtype]
    why = triton_attend.unsupported(store, shape)
    if why:
        reasons.append(f"attend: {why}")
    else:
        names = triton_attend.arguments(store, shape)
        parts, cuts = shape.made or Made(0), triton_tune.tiles(store, shape, target)
        given = {"q": own, "k": own, "v": own, "numbers": "*i32", "part": "*fp32",
                 "stats": "*fp32", "basis": POINTERS[parts.parts], "offset": POINTERS[parts.parts],
                 "cos": POINTERS[parts.angles], "sin": POINTERS[parts.angles], **planes}
        found += [Kernel(triton_attend.name(store, shape, cut),
                         triton_attend.source(store, shape, cut),
                         {n: given.get(n, "i32") for n in names},
                         {"tokens": 1} if shape.one else {}, cut.warps, cut.stages)
                  for cut in (cuts if tried else cuts[:1])]
    spec = triton_append.Shape(shape.heads, shape.dims, shape.dtype)
    why = triton_append.unsupported(store, shape.dims, shape.dtype)
    if why:
        return found, [*reasons, f"append: {why}"]
    for phase in triton_append.PHASES:
        if text := triton_append.source(store, spec, phase):
            given = {"k": own, "v": own, "columns": "*i32", "new": "*i32",
                     **planes}
            types = {n: given.get(n, "i32") for n in triton_append.arguments(store, spec)}
            found.append(Kernel(triton_append.name(store, spec, phase), text, types, {},
                                triton_append.warps(store, spec, phase)))
    if not triton_evict.unsupported(store):
        args = store, shape.dims, shape.dtype
        given = {"sources": "*i32", **planes}
        types = {n: given.get(n, "i32") for n in triton_evict.arguments(*args)}
        found.append(Kernel(triton_evict.name(*args), triton_evict.source(*args), types, {}))
    return found, reasons


def compiled(one: Kernel, target: str) -> Compiled:
    """`one` for `target` ("cuda:90", "hip:gfx942"); a compiler's refusal is told in `failed`."""
    import triton
    from triton.compiler import ASTSource

    where, name = _target(target), one.name
    run = kernel(one.text, name)
    types = {n: "constexpr" if n in one.constants else t for n, t in one.types.items()}
    aligned = [i for i, (n, t) in enumerate(types.items()) if t[0] == "*" or STRIDES.match(n)]
    try:
        made = triton.compile(
            ASTSource(fn=run, signature=types, constexprs=dict(one.constants),
                      attrs={(i,): [["tt.divisibility", 16]] for i in aligned}),
            target=where, options={"num_warps": one.warps, "num_stages": one.stages})
    except Exception as error:  # compilers of other targets fail in their own ways
        text = (str(error) or type(error).__name__).strip().splitlines()
        return Compiled(name, target, " ".join(text)[-300:])
    read = _nvidia if where.backend == "cuda" else _amd
    return Compiled(name, target, "", shared=int(made.metadata.shared), assembly=dict(made.asm),
                    **read(made.asm))


def check(target: str) -> None:
    """Raise KVCompileError for a target that is not known, and without Triton."""
    _target(target)


def _target(text: str) -> Any:
    if not installed():
        raise KVCompileError("no Triton to compile with: pip install triton")
    from triton.backends.compiler import GPUTarget

    backend, _, arch = text.partition(":")
    if backend == "cuda" and arch.isdecimal():
        return GPUTarget("cuda", int(arch), 32)
    if backend == "hip" and arch.startswith("gfx9"):
        return GPUTarget("hip", arch, 64)
    raise KVCompileError(f"unknown target {text!r}{nearest(text, TARGETS)}; known: "
                         f"{', '.join(TARGETS)}")


def _nvidia(asm: Mapping[str, Any]) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        cubin.write_bytes(asm["cubin"])
        usage, sass = (subprocess.run([tool, what, cubin], capture_output=True, text=True,
                                      check=True).stdout for what in ("-res-usage", "-sass"))
    figures = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
    widths = [_ptx_bytes(line) for line in _code_loads(asm["ptx"])]
    return {"registers": figures["REG"], "local": figures["STACK"] + figures["LOCAL"],
            "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
            "code_load": max(widths, default=0),
            "mma": len(re.findall(r"^\s*(?:mma|wgmma\.mma|tcgen05\.mma)", asm["ptx"], re.M))}


def _amd(asm: Mapping[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def figure(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    widths = [4 * int(m[1] or 1) for line in _code_loads(text)
              if (m := re.search(r"(?:global|buffer)_load_dword(?:x(\d))?\b", line))]
    return {"registers": figure("vgpr_count"), "local": figure("private_segment_fixed_size"),
            "spills": figure("vgpr_spill_count"),  # scalar registers spill into vector ones
            "code_load": max(widths, default=0), "mma": len(re.findall(r"v_mfma", text))}


def _ptx_bytes(line: str) -> int:
    if found := re.search(r"cp\.async\.\w+\.shared\.global \[.*?\], \[.*?\], (\w+)", line):
        return int(found[1], 0)
    found = re.search(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", line)
    return int(found[1] or 1) * int(found[2]) // 8 if found else 0


def _code_loads(text: str) -> Iterator[str]:
    """Lines of assembly that come from the functions which read codes."""
    lines = set()
    for name in ("k_codes", "v_codes"):
        function = helpers()[name].fn
        source, first = inspect.getsourcelines(function)
        lines |= {("coded.py", n) for n in range(first, first + len(source))}
    files = {number: path.rsplit("/", 1)[-1]
             for number, path in re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"', text)}
    at: tuple[str, int] = ("", 0)
    for line in text.splitlines():
        if found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            at = files.get(found[1], ""), int(found[2])
        elif at in lines:
            yield line


def _planes(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> dict[str, str]:
    return {spec.name.replace(".", "_"): POINTERS[spec.dtype]
            for spec in store.planes(dims, dtype)}
