"""What Inductor makes of the kvc ops that have a kernel."""

from typing import Any

from torch._inductor.virtualized import V

from kvcompile.backend.template import contiguous, kernel, lowering
from kvcompile.ir import LINEAR
from kvcompile.kernels import cpp_vector
from kvcompile.kernels import linear as linears


@lowering(LINEAR, linears, cpp_vector)
def linear(x: Any, weights: list[Any], biases: list[Any], *, gate: str = "") -> Any:
    """One row of x against weights whose rows are contiguous."""
    *rows, _ = x.get_size()
    if x.get_device().type != "cpu" or not all(_equal(n, 1) for n in rows):
        return None
    inputs = {"x": contiguous(x)}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        inputs[f"weight{i}"] = weight if _equal(weight.get_stride()[1], 1) else contiguous(weight)
        if bias is not None:
            inputs[f"bias{i}"] = contiguous(bias)
    total = sum(w.get_size()[0] for w in weights[: 1 if gate else None])
    statements = linears.statements([b is not None for b in biases], gate)
    return kernel([cpp_vector.TEXT, linears.TEXT], statements, inputs, [*rows, total],
                  x.get_dtype())


def _equal(size: Any, value: int) -> bool:
    return V.graph.sizevars.statically_known_equals(size, value)
