"""What Inductor makes of the kvc ops that have a kernel."""

from typing import Any

import torch
from torch._inductor.virtualized import V

from kvcompile.backend.template import (
    constant,
    contiguous,
    kernel,
    last_contiguous,
    lowering,
    threads,
    to_dtype,
)
from kvcompile.ir import ATTEND, LINEAR
from kvcompile.kernels import cpp_attend, cpp_vector
from kvcompile.kernels import linear as linears
from kvcompile.store import Store


@lowering(LINEAR, linears, cpp_vector)
def linear(x: Any, weights: list[Any], biases: list[Any]) -> Any:
    """One row of x against weights whose rows are contiguous."""
    *rows, _ = x.get_size()
    if x.get_device().type != "cpu" or not all(_equal(n, 1) for n in rows):
        return None
    inputs = {"x": contiguous(x)}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        inputs[f"weight{i}"] = weight if _equal(weight.get_stride()[1], 1) else contiguous(weight)
        if bias is not None:
            inputs[f"bias{i}"] = contiguous(bias)
    total = sum(w.get_size()[0] for w in weights)
    return kernel("linear", linears.FUNCTIONS,
                  linears.statements([b is not None for b in biases]), inputs,
                  [*rows, total], x.get_dtype())


@lowering(ATTEND, cpp_attend, *cpp_attend.FILES)
def attend(q: Any, k: Any, v: Any, planes: list[Any], positions: Any, valid: Any, sinks: Any, *,
           scale: float, window: int = 0, softcap: float = 0.0, store: str, slot: int = 0,
           layer: int = 0) -> Any:
    """One query a row over what is stored, where the log-sum-exp is not asked for."""
    batch, heads, tokens, dim = q.get_size()
    kept = k.get_size()[1]
    if q.get_device().type != "cpu" or not _equal(tokens, 1) or _used(1):
        return None
    shape = cpp_attend.Shape(int(kept), int(heads) // int(kept), (int(dim), int(v.get_size()[3])),
                             q.get_dtype(), scale, window, softcap, sinks is not None)
    parsed = Store.parse(store)
    if cpp_attend.unsupported(parsed, shape):
        return None
    inputs = {"q": last_contiguous(q), "k": last_contiguous(k), "v": last_contiguous(v),
              "valid": contiguous(valid), "slot": constant(slot)}
    inputs |= {f"plane{i}": plane for i, plane in enumerate(planes)}
    if sinks is not None:
        inputs["sinks"] = to_dtype(contiguous(sinks), torch.float32)
    o = kernel("attend", cpp_attend.functions(parsed, shape, threads()),
               cpp_attend.statements(parsed, shape), inputs,
               [batch, heads, tokens, v.get_size()[3]], q.get_dtype())
    return o, o


def _used(output: int) -> bool:
    """Whether anything reads this output of the op that is being lowered."""
    users = V.graph.current_node.users
    return any(user.args[1] == output and user.users for user in users)


def _equal(size: Any, value: int) -> bool:
    return V.graph.sizevars.statically_known_equals(size, value)
