"""The two products of an attention, in one notation: labels of two operands and of the result."""

from collections.abc import Callable, Sequence
from string import ascii_uppercase as BATCH
from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from kvcompile.concrete import Miss, kind, value

PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


class Product(NamedTuple):
    """out[..] = sum of a[..] * b[..] over the labels that are not in out."""

    a: Node
    b: Node
    labels: tuple[str, str, str]


def product(node: Node) -> Product:
    """The product that `node` computes, an addend of baddbmm left aside."""
    if kind(node) == "einsum":
        equation, operands = node.args[:2]
        spelled, _, out = str(equation).replace(" ", "").partition("->")
        parts = spelled.split(",")
        if len(parts) != 2 or not out or "." in spelled or any(len({*p}) < len(p) for p in parts):
            raise Miss(f"einsum '{equation}' is no plain product of two tensors", node)
        a, b = operands  # type: ignore[misc]
        return Product(a, b, (parts[0], parts[1], out))
    a, b = node.args[1:3] if kind(node) == "baddbmm" else node.args[:2]
    ranks = [value(x).dim() for x in (a, b)]  # type: ignore[arg-type]
    if min(ranks) < 2:
        raise Miss("multiplies by a vector", node)
    batch = BATCH[: max(ranks) - 2]
    left, right = (batch[len(batch) - r + 2 :] for r in ranks)
    return Product(a, b, (left + "xy", right + "yz", batch + "xz"))  # type: ignore[arg-type]


def arranged(labels: str, batch: str, last: str,
             sizes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Brings a tensor with `labels` to [batch and heads, *last], repeated over what it lacks.

    `sizes` are those of the `batch` labels; a tensor that has fewer heads repeats each.
    """
    def arrange(x: Tensor) -> Tensor:
        x = x.permute([labels.index(n) for n in batch + last if n in labels])
        for dim, n in enumerate(batch):
            if n not in labels:
                x = x.unsqueeze(dim)
        if batch and 1 < x.shape[len(batch) - 1] < sizes[-1]:
            x = x.repeat_interleave(sizes[-1] // x.shape[len(batch) - 1], len(batch) - 1)
        return x.expand(*sizes, -1, -1).reshape(-1, *x.shape[-2:])

    return arrange
