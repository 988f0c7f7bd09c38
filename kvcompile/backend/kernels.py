"""What Inductor makes of the kvc ops that have a kernel."""

from typing import Any

import torch
from torch._inductor.virtualized import V

from kvcompile.backend.template import (
    constant,
    contiguous,
    empty,
    kernel,
    last_contiguous,
    lowering,
    part,
    permute,
    threads,
    to_dtype,
)
from kvcompile.ir import APPEND, ATTEND, ATTENTION, EVICT, LINEAR, STORABLE
from kvcompile.kernels import cpp_append, cpp_attend, cpp_blockwise, cpp_evict
from kvcompile.kernels import linear as linears
from kvcompile.kernels.dense import CPP
from kvcompile.kernels.rebuild import made
from kvcompile.store import Store


@lowering(LINEAR)
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
    statements = linears.statements(x.get_dtype(), [b is not None for b in biases], gate)
    return kernel([*linears.headers()], statements, inputs, [*rows, total],
                  x.get_dtype())


@lowering(ATTENTION)
def attention(q: Any, k: Any, v: Any, positions: Any, valid: Any, sinks: Any, *, scale: float,
              window: int = 0, softcap: float = 0.0, store: str = "store", layer: int = 0,
              members: Any = (), basis: Any = None, offset: Any = None, cos: Any = None,
              sin: Any = None, style: str = "", far: Any = None) -> Any:
    """Any number of queries, each of which sees the exact tokens of the call."""
    if not Store.parse(store).exact or any(x is not None for x in (basis, cos, far)):
        return None
    shape = _shape(q, k, v, scale, window, softcap, sinks)._replace(stored=False)
    return _many(shape, q, k, v, [], valid, sinks, Store.parse(store))


@lowering(ATTEND)
def attend(q: Any, k: Any, v: Any, planes: list[Any], positions: Any, valid: Any, sinks: Any, *,
           scale: float, window: int = 0, softcap: float = 0.0, store: str, slot: int = 0,
           layer: int = 0, mass: bool = False, looks: int = 0, low: bool = False, member: int = 0,
           basis: Any = None, offset: Any = None, cos: Any = None, sin: Any = None, style: str = "",
           at: Any = None) -> Any:
    """Over what is stored; the log-sum-exp and mass of one query only."""
    batch, heads, tokens, _ = q.get_size()
    lse = _used(1)
    parsed = Store.parse(store)
    shape = _shape(q, k, v, scale, window, softcap, sinks)._replace(mass=mass)
    making = {n: contiguous(x) for n, x in (("basis", basis), ("offset", offset), ("cos", cos),
                                            ("sin", sin)) if x is not None}
    if making:
        shape = shape._replace(dims=(int(k.get_size()[3]), shape.dims[1]),
                               made=made(int(q.get_size()[3]), shape.heads, making.get("basis"),
                                         making.get("offset"), making.get("cos"), style))
    if not _equal(tokens, 1):
        if making:
            return None
        o = None if mass or lse else _many(shape, q, k, v, planes, valid, sinks, parsed, slot,
                                           member, at)
        return o and (o, o, o)
    if q.get_device().type != "cpu" or cpp_attend.unsupported(parsed, shape):
        return None
    inputs = _inputs(q, k, v, planes, valid, sinks, parsed, slot, member, at) | making
    text = [*cpp_attend.headers(), cpp_attend.config(parsed, shape, threads())]
    statements = cpp_attend.statements(parsed, shape, threads(), lse)
    size, results = [batch, heads, tokens, v.get_size()[3]], dict[str, Any]()
    if mass:
        places = parsed.places(shape.dims, q.get_dtype(), [x.get_size() for x in planes]) + 1
        results["mass"] = empty([batch, shape.heads, places], torch.float32)
    if lse:
        results["lse"] = empty(size[:3], torch.float32)
    if not results:
        o = kernel(text, statements, inputs, size, q.get_dtype())
        return o, o, o
    results["out"] = o = empty(size, q.get_dtype())
    kernel(text, statements, {**inputs, **results}, [1], torch.uint8, [*results])
    return o, results.get("lse", o), results.get("mass", o)


def _many(shape: cpp_attend.Shape, q: Any, k: Any, v: Any, planes: list[Any], valid: Any,
          sinks: Any, store: Store, slot: int = 0, member: int = 0, at: Any = None) -> Any:
    """Attention of many queries, laid out token by token; None where there is no kernel."""
    if q.get_device().type != "cpu" or cpp_attend.unsupported(store, shape):
        return None
    batch, heads, tokens, _ = q.get_size()
    o = kernel([*cpp_blockwise.headers(), cpp_attend.config(store, shape, threads())],
               cpp_blockwise.statements(store, shape, threads()),
               _inputs(q, k, v, planes, valid, sinks, store, slot, member, at),
               [batch, tokens, heads, v.get_size()[3]], q.get_dtype())
    return permute(o, [0, 2, 1, 3])


def _shape(q: Any, k: Any, v: Any, scale: float, window: int, softcap: float, sinks: Any
           ) -> cpp_attend.Shape:
    heads, kept, dim = (int(n) for n in (q.get_size()[1], k.get_size()[1], q.get_size()[3]))
    return cpp_attend.Shape(kept, heads // kept, (dim, int(v.get_size()[3])), q.get_dtype(), scale,
                            window, softcap, sinks is not None)


def _inputs(q: Any, k: Any, v: Any, planes: list[Any], valid: Any, sinks: Any, store: Store,
            slot: int, member: int, at: Any) -> dict[str, Any]:
    inputs = {"q": last_contiguous(q), "k": last_contiguous(k), "v": last_contiguous(v),
              "valid": contiguous(valid)}
    if planes:
        inputs["slot"] = constant(slot) if at is None else part(at, 0)
    if store.members > 1:
        inputs["member"] = constant(member) if at is None else part(at, 1)
    inputs |= {f"plane{i}": plane for i, plane in enumerate(planes)}
    if sinks is not None:
        inputs["sinks"] = to_dtype(contiguous(sinks), torch.float32)
    return inputs


@lowering(APPEND)
def append(planes: list[Any], k: list[Any], v: list[Any], positions: Any, valid: Any, *,
           store: str, slots: list[int]) -> Any:
    """Any number of tokens."""
    heads, dim = k[0].get_size()[1], k[0].get_size()[3]
    if valid.get_device().type != "cpu":
        return None
    dims, dtype = (int(dim), int(v[0].get_size()[3])), k[0].get_dtype()
    parsed = Store.parse(store)
    if cpp_append.unsupported(parsed, dims, dtype):
        return None
    inputs = {f"plane{i}": plane for i, plane in enumerate(planes)}
    inputs |= {f"k{i}": last_contiguous(x) for i, x in enumerate(k)}
    inputs |= {f"v{i}": last_contiguous(x) for i, x in enumerate(v)}
    inputs["valid"] = contiguous(valid)
    kernel([*cpp_append.headers(), cpp_append.functions(parsed, dims, dtype)],
           cpp_append.statements(parsed, dims, dtype, int(heads), slots, threads(),
                                 len(valid.get_size()) == 3), inputs, [1], torch.uint8,
           [f"plane{i}" for i in range(len(planes))])
    return ()


@lowering(EVICT)
def evict(planes: list[Any], mass: list[Any], k: list[Any], v: list[Any], positions: Any,
          valid: Any, *, store: str, rules: list[str], slots: list[int], group: int = 1,
          ids: Any = None) -> Any:
    """One token a row."""
    parsed, dims = Store.parse(store), tuple(int(x[0].get_size()[3]) for x in (k, v))
    if (valid.get_device().type != "cpu" or not _equal(valid.get_size()[1], 1)
            or cpp_evict.unsupported(parsed, rules)):
        return None
    inputs = {f"plane{i}": plane for i, plane in enumerate(planes)}
    inputs |= {f"mass{i}": contiguous(x) for i, x in enumerate(mass)}
    inputs |= {"positions": positions, "valid": contiguous(valid)}
    kernel([*cpp_evict.headers()],
           cpp_evict.statements(parsed, (dims[0], dims[1]), k[0].get_dtype(),
                                int(k[0].get_size()[1]), rules, slots, group, threads()),
           inputs, [1], torch.uint8, [f"plane{i}" for i in range(len(planes))])
    return ()


@lowering(STORABLE)
def storable(k: list[Any], v: list[Any], k_limits: list[float], v_limits: list[float]) -> Any:
    """One token a row."""
    if k[0].get_device().type != "cpu" or not _equal(k[0].get_size()[2], 1):
        return None
    inputs = {f"k{i}": last_contiguous(x) for i, x in enumerate(k)}
    inputs |= {f"v{i}": last_contiguous(x) for i, x in enumerate(v)}
    dtypes = {x.get_dtype() for x in (*k, *v)}
    if not dtypes <= CPP.keys():
        return None
    return kernel([*cpp_append.headers()], cpp_append.check([x.get_dtype() for x in k], k_limits,
                                                         v_limits), inputs, [len(k)], torch.bool)


def _used(output: int) -> bool:
    """Whether anything reads this output of the op that is being lowered."""
    users = V.graph.current_node.users
    return any(user.args[1] == output and user.users for user in users)


def _equal(size: Any, value: int) -> bool:
    return V.graph.sizevars.statically_known_equals(size, value)
