"""Norms, however they are spelled: one fused op, or squares, means and a root over the last dim."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from kvcompile.structure.movement import CASTS, Probe, chokepoints, constant, feeds, packet

aten = torch.ops.aten

LAYER, RMS = ("input", "dims", "weight", "bias", "eps"), ("input", "dims", "weight", "eps")
FUSED = {aten.layer_norm: LAYER, aten.native_layer_norm: LAYER, aten.rms_norm: RMS}
ROOTS = {aten.rsqrt, aten.sqrt}
PARTS = CASTS | ROOTS | {aten.add, aten.sub, aten.mul, aten.div, aten.pow, aten.mean,
                         aten.reciprocal}


@dataclass(frozen=True)
class Norm:
    """`node` = input / rms(input) * (weight + offset) + bias; kind "layer" centres input before.

    The mean is over the last dim and `eps` is added to it; weight and bias are names, or None.
    """

    node: Node
    input: Node
    kind: str
    weight: str | None
    bias: str | None
    eps: float
    offset: float = 0.0

    def apply(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The formula above, the slow clear way."""
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        x = x if weight is None else x * (weight + self.offset)
        return x if bias is None else x + bias


def find_norm(node: Node, probe: Probe) -> Norm | None:
    """The norm whose result `node` is; None if it is none."""
    op = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else node
    assert isinstance(op, Node)
    if packet(op) in FUSED:
        return _fused(node, op)
    inside: list[Node] = []

    def inputs(n: Node) -> list[Node] | None:
        if packet(n) not in PARTS:
            return None
        found = [x for x in feeds(n) if not constant(x)]
        if packet(n) is aten.add and len(found) > 1:
            return None  # a residual
        inside.append(n)
        return found

    shape = probe.shape(node)
    for x in chokepoints(node, inputs):
        means = [n for n in inside if packet(n) is aten.mean]
        if means and any(packet(n) in ROOTS for n in inside) and probe.shape(x) == shape:
            last = all(n.args[1:2] in (([-1],), ([len(shape) - 1],)) for n in means)
            norm = _spelled(node, x, inside) if last else None
            return norm if norm and _holds(norm, probe) else None
    return None


def _fused(node: Node, op: Node) -> Norm | None:
    names = FUSED[packet(op)]
    kind = "layer" if names is LAYER else "rms"
    args: dict[str, Any] = dict(zip(names, op.args))
    x, eps = args["input"], args.get("eps")
    if eps is None:
        eps = 1e-5 if kind == "layer" else torch.finfo(x.meta["val"].dtype).eps
    parameters = [args.get(n) for n in ("weight", "bias")]
    if len(args["dims"]) != 1 or not all(p is None or constant(p) for p in parameters):
        return None
    (weight, offset), (bias, _) = (_parameter(p) if p else (None, 0.0) for p in parameters)
    return Norm(node, x, kind, weight, bias, eps, offset)


def _spelled(node: Node, x: Node, inside: list[Node]) -> Norm | None:
    weight = bias = None
    eps = offset = 0.0
    for n in inside:
        for c in filter(constant, n.all_input_nodes):
            if packet(n) is aten.mul and weight is None:
                weight, offset = _parameter(c)
            elif packet(n) is aten.add and bias is None:
                bias, _ = _parameter(c)
            else:
                return None
        if packet(n) is aten.add and isinstance(n.args[1], float):
            eps = n.args[1]
    kind = "layer" if any(packet(n) is aten.sub for n in inside) else "rms"
    return Norm(node, x, kind, weight, bias, eps, offset)


def _holds(norm: Norm, probe: Probe) -> bool:
    """Whether the ops between input and node, run on random numbers, give what `norm` says."""
    random = torch.Generator().manual_seed(0)
    known: dict[Node, Tensor] = {}
    names: dict[str, Tensor] = {}

    def value(n: Node) -> Tensor:
        if n not in known:
            if n is norm.input:  # small, so that eps counts
                known[n] = 0.01 * torch.randn(probe.shape(n), generator=random).double()
            elif n.op == "get_attr":
                known[n] = names[str(n.target)] = torch.randn(
                    probe.shape(n), generator=random).double()
            elif packet(n) in CASTS:
                known[n] = value(feeds(n)[0])
            else:
                args: Any = map_arg(n.args, value)
                options = {k: v for k, v in n.kwargs.items() if k != "dtype"}
                assert callable(n.target)
                known[n] = n.target(*args, **options)
        return known[n]

    got = value(norm.node)
    weight, bias = (names[name] if name else None for name in (norm.weight, norm.bias))
    return torch.allclose(got, norm.apply(value(norm.input), weight, bias), rtol=1e-6)


def _parameter(node: Node) -> tuple[str, float]:
    """The parameter behind `node`, and the number that is added to it."""
    offset = 0.0
    while node.op != "get_attr":
        if packet(node) is aten.add and isinstance(node.args[1], (int, float)):
            offset += node.args[1]
        node = node.all_input_nodes[0]
    return str(node.target), offset
