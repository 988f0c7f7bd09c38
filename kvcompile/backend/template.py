"""Kernels of our own in graphs that Inductor compiles: C++ text around given buffers.

Private API of torch 2.13, and why:

    ir.CppTemplateBuffer, CppTemplateKernel, PartialRender's hooks   the one way to have C++ of our
        own compiled, called and cached with the rest of a graph, without a dispatcher call
    register_lowering   what takes the place of a kvc op; torch._inductor.lowering must be imported
        before any template is
    MutationOutput   which inputs a kernel writes, for the order of what reads them
    V.graph.no_fuse_buffer_names   our text takes no epilogues: nothing may be fused to its output
    config.unsafe_marked_cacheable_functions   part of the key of Inductor's caches, which do not
        see what a lowering reads: stale kernels would come back from the disk
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._inductor.lowering  # noqa: F401  # before the other parts of Inductor
from torch._inductor import ir
from torch._inductor import lowering as lowerings
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import cexpr_index
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.utils import Placeholder, parallel_num_threads
from torch._inductor.virtualized import V
from torch._ops import OpOverload

from kvcompile.registry import digest

log = logging.getLogger(__name__)

HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
LOWERED: list[str] = []  # the ops with a lowering of ours


def lowering(op: OpOverload) -> Callable[[Callable], Callable]:
    """Register the decorated function as what Inductor makes of kvc op `op`.

    It gets the op's arguments as Inductor's nodes, and returns `kernel(...)`, or None for the op's
    body.
    """

    def register(function: Callable) -> Callable:
        plain = fallback_handler(op)

        def lower(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            if out is not None:
                return out
            log.info("%s runs its plain body", op)
            return plain(*args, **kwargs)

        register_lowering(op, type_promotion_kind=None)(lower)
        LOWERED.append(str(op))
        return function

    return register


def kernel(functions: Sequence[str], statements: str, inputs: Mapping[str, Any],
           size: Sequence[Any], dtype: torch.dtype, mutated: Sequence[str] = ()) -> ir.TensorBox:
    """A contiguous tensor of `size` and `dtype`, computed by a C++ function on the CPU.

    `functions` are the texts that stand before it, each once in a file, and `statements` its body.
    There, input `a` is the pointer `a` to its first element, `a_size[]` and `a_stride[]` (int64_t,
    in elements; 0-d tensors have neither), and the result is the pointer `out`. Inputs may be views
    and may share memory. No text may contain three single quotes in a row. If it writes into
    inputs, through `const_cast`, they are named by `mutated`, and there is no `out`.
    """
    nodes = {key: ir.ExternKernel.realize_input(node) for key, node in inputs.items()}
    layout = ir.FixedLayout(torch.device("cpu"), dtype, list(size))
    text = _Text("".join(map(_once, functions)), statements, nodes)
    buffer = _Buffer(layout, list(nodes.values()), text.make, cast(Any, text), None)
    buffer.mutations = [ir.MutationOutput(ir.NoneLayout(device=layout.device), nodes[key], buffer)
                        for key in mutated]
    V.graph.no_fuse_buffer_names.add(buffer.get_name())
    return ir.TensorBox.create(buffer)


def contiguous(node: Any) -> Any:
    """`node`, copied if its elements do not lie one after another."""
    return ir.ExternKernel.require_contiguous(node)


def last_contiguous(node: Any) -> Any:
    """`node`, copied if its elements do not lie one after another in the last dim."""
    node = ir.ExternKernel.realize_input(node)
    one = V.graph.sizevars.statically_known_equals(node.get_stride()[-1], 1)
    return node if one else ir.ExternKernel.require_contiguous(node)


def constant(value: int) -> Any:
    """An int32 tensor [1] that the compiled module holds: kernels that differ in nothing else are
    compiled once."""
    return V.graph.add_tensor_constant(torch.tensor([value], dtype=torch.int32))


def empty(size: Sequence[Any], dtype: torch.dtype) -> Any:
    """A tensor for a kernel to write into, one of several results: named by `mutated`."""
    full = lowerings.full(size, 0, dtype=dtype, device=torch.device("cpu"))
    full.realize()
    return full


def part(node: Any, index: int) -> Any:
    """The element `index` of a tensor [N], a view [1]."""
    return lowerings.slice_(node, 0, index, index + 1)


def permute(node: Any, dims: Sequence[int]) -> Any:
    """A view with its dims in this order."""
    return lowerings.permute(node, dims)


def to_dtype(node: Any, dtype: torch.dtype) -> Any:
    return node if node.get_dtype() == dtype else lowerings.to_dtype(node, dtype)


def threads() -> int:
    """Threads that a kernel may use."""
    return parallel_num_threads()


class _Buffer(ir.CppTemplateBuffer):
    """A template's output, and what it writes into beside."""

    mutations: Sequence[ir.MutationOutput] = ()

    def get_outputs(self) -> list[Any]:
        return [self, *self.mutations]


def _once(text: str) -> str:
    """`text` for a file that may hold several kernels."""
    guard = f"KVC_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return f"#ifndef {guard}\n#define {guard}\n{text}\n#endif\n"


@dataclass(frozen=True)
class _Text:
    """What Inductor asks for when it writes the kernel."""

    functions: str
    statements: str
    inputs: Mapping[str, Any]

    def make(self, out: Any, **_: Any) -> tuple[CppTemplateKernel, Callable[[], str]]:
        made = CppTemplateKernel(str(Placeholder.KERNEL_NAME), parallel_num_threads())
        return made, lambda: made.render(self, out=out)

    def render(self, kernel: CppTemplateKernel, out: Any) -> str:
        """The C++ file; buffers that several inputs read are one argument of the function."""
        arguments = {node.get_name(): f"in{i}" for i, node in enumerate(self.inputs.values())}
        buffers = {arguments[node.get_name()]: node for node in self.inputs.values()}
        offsets = [node.get_layout().offset for node in self.inputs.values()]
        results = {} if out.mutations else {"out": out}
        head = kernel.def_kernel(buffers, results, extra_sizevars=offsets)
        lines = []
        for (key, node), offset in zip(self.inputs.items(), offsets, strict=True):
            place = cexpr_index(kernel.rename_indexing(offset))
            lines.append(f"const auto* {key} = {arguments[node.get_name()]} + {place};")
            for what, values in (("size", node.get_size()), ("stride", node.get_stride())):
                texts = [cexpr_index(kernel.rename_indexing(v)) for v in values]
                if texts:
                    lines.append(f"[[maybe_unused]] const int64_t {key}_{what}[] = "
                                 f"{{{', '.join(texts)}}};")
        declarations = "\n".join(lines)
        return (f'{HEADER}{self.functions}extern "C" {head}\n'
                f"{{\n{declarations}\n{self.statements}\n}}\n")


def cache_key() -> dict[str, Any]:
    """Settings of Inductor that make all of our text part of its caches' keys."""
    marked = torch._inductor.config.unsafe_marked_cacheable_functions
    return {"unsafe_marked_cacheable_functions": {**marked, **dict.fromkeys(LOWERED, digest())}}
