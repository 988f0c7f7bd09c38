"""Graphs as text: one node a line, stable names, shape at the end, weights by their last names."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64",
          torch.int64: "i64", torch.int32: "i32", torch.bool: "b8", torch.uint8: "u8",
          torch.int8: "i8", torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2"}


def text(gm: GraphModule, header: str = "") -> str:
    """`%o = kvc.attend(%q, %k, ...) {layer=3, ...} : f16[B, 8, S, 64]`, a line for each node."""
    names: dict[Node, str] = {}
    counts: dict[str, int] = {}
    symbols: dict[str, str] = {}
    lines = [f"# {header}"] if header else []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            names[node] = "@" + str(node.target).removeprefix("model.")
            continue
        stem = node.name if node.op == "placeholder" else _target(node).split(".")[-1]
        counts[stem] = counts.get(stem, -1) + 1
        names[node] = f"%{stem}" if node.op == "placeholder" else f"%{stem}_{counts[stem]}"
        lines.append(_line(node, names, symbols))
    return "\n".join(lines)


def _target(node: Node) -> str:
    if node.op == "output":
        return "return"
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).replace("aten.", "").removesuffix(".default")
        return name.split(".")[0] if not name.startswith("kvc.") else name
    return getattr(target, "__name__", str(target))


def _line(node: Node, names: dict[Node, str], symbols: dict[str, str]) -> str:
    shape = _shape(node.meta.get("val"), symbols)
    if node.op == "placeholder":
        plane = node.meta.get("plane")
        if plane:
            shape = f" : {DTYPES[plane.dtype]}[pages, {', '.join(map(str, plane.shape))}]"
            if not plane.shape:
                pages = ", pages" if plane.name.endswith("table") else (
                    f", {plane.each}" if plane.each else "")
                shape = f" : {DTYPES[plane.dtype]}[layers, B, H{pages}]"
        return f"{names[node]} = input{shape}"
    args = ", ".join(_value(a, names, symbols) for a in node.args)
    if node.op == "output":
        return f"return {args}"
    attrs = ", ".join(f"{k}={_value(v, names, symbols)}" for k, v in node.kwargs.items())
    if str(node.target).startswith("kvc."):
        attrs = f" {{{attrs}}}" if attrs else ""
        return f"{names[node]} = {_target(node)}({args}){attrs}{shape}"
    inside = ", ".join(x for x in (args, attrs) if x)
    return f"{names[node]} = {_target(node)}({inside}){shape}"


def _value(value: Any, names: dict[Node, str], symbols: dict[str, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(v, names, symbols) for v in value)}]"
    if isinstance(value, torch.dtype):
        return DTYPES.get(value, str(value))
    if isinstance(value, torch.SymInt):
        return _dim(value, symbols)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _dim(size: Any, symbols: dict[str, str]) -> str:
    """Symbolic sizes are named in order of appearance: B, S, N, then s3, s4, ..."""
    if isinstance(size, int):
        return str(size)
    expr = str(size)
    for symbol in sorted((str(s) for s in size.node.expr.free_symbols), key=len, reverse=True):
        if symbol not in symbols:
            order = len(symbols)
            symbols[symbol] = "BSN"[order] if order < 3 else f"s{order}"
        expr = expr.replace(symbol, symbols[symbol])
    return expr


def _shape(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_dim(s, symbols) for s in value.shape)
        return f" : {DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return " :" + ",".join(_shape(v, symbols).removeprefix(" :") for v in value)
    return ""
