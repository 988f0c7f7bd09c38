"""The kvc dialect: ops over torch.fx, each with a schema, a fake and a plain PyTorch body.

    kvc.attention  what capture emits: causal attention among the tokens of one call
    kvc.rope       rotary embedding, explicit so that keys can be cached before or after it
    kvc.append     store this call's tokens (mutates the planes in place)
    kvc.attend     attention over what earlier calls stored and, exactly, this call's tokens
    kvc.view       what a call sees as dense K and V (for models that attend by themselves)
    kvc.causal     the validity of this call's tokens, by a mask that must hide nothing else

Shapes: q [B, Hq, S, Dk], k [B, H, S, Dk], v [B, H, S, Dv], positions and valid [B, S] (valid is
False for padding: such tokens are neither seen nor stored). `store` is the text of a
`kvcompile.store.Store`; `planes` are its tensors in `Store.planes` order. `window` counts tokens
of the row, the query included (0: no window). The bodies live in `kernels/eager.py`.
"""

import torch
from torch import Tensor
from torch.fx import Node

LIB = torch.library.Library("kvc", "DEF")

LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor valid, Tensor? sinks, *, "
    "float scale, int window=0, float softcap=0.0, str store='store', int layer=0) -> Tensor"
)
LIB.define("rope(Tensor x, Tensor cos, Tensor sin, *, str style) -> Tensor")
LIB.define(
    "append(Tensor(a!)[] planes, Tensor k, Tensor v, Tensor positions, Tensor valid, *, "
    "str store, int layer=0) -> ()"
)
LIB.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor[] planes, Tensor positions, Tensor valid, "
    "Tensor? sinks, *, float scale, int window=0, float softcap=0.0, str store, int layer=0)"
    " -> (Tensor, Tensor)"
)
LIB.define(
    "view(Tensor k, Tensor v, Tensor[] planes, Tensor positions, Tensor valid, *, "
    "str store, SymInt length, int window=0, int layer=0) -> (Tensor, Tensor)"
)
LIB.define("causal(Tensor mask, Tensor k, *, int window=0) -> Tensor")

ATTENTION = torch.ops.kvc.attention.default
ROPE = torch.ops.kvc.rope.default
APPEND = torch.ops.kvc.append.default
ATTEND = torch.ops.kvc.attend.default
VIEW = torch.ops.kvc.view.default
CAUSAL = torch.ops.kvc.causal.default
OPS = (ATTENTION, ROPE, APPEND, ATTEND, VIEW)


@torch.library.register_fake("kvc::attention", lib=LIB)
def _(q, k, v, positions, valid, sinks, *, scale, window=0, softcap=0.0, store="store", layer=0):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.register_fake("kvc::rope", lib=LIB)
def _(x, cos, sin, *, style):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("kvc::append", lib=LIB)
def _(planes, k, v, positions, valid, *, store, layer=0):
    return None


@torch.library.register_fake("kvc::attend", lib=LIB)
def _(
    q, k, v, planes, positions, valid, sinks, *, scale, window=0, softcap=0.0, store, layer=0
):
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    return o, q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("kvc::view", lib=LIB)
def _(k, v, planes, positions, valid, *, store, length, window=0, layer=0):
    return tuple(x.new_empty(x.shape[0], x.shape[1], length, x.shape[3]) for x in (k, v))


@torch.library.register_fake("kvc::causal", lib=LIB)
def _(mask, k, *, window=0):
    return k.new_empty(k.shape[0], k.shape[2], dtype=torch.bool)


def body(name: str):
    """Register the decorated function as the plain PyTorch body of kvc op `name`."""

    def register(function):
        LIB.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def argument(node: Node, name: str):
    """The value that `node` (a call of a kvc op) has for the schema argument `name`."""
    for index, arg in enumerate(node.target._schema.arguments):
        if arg.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if not arg.kwarg_only and index < len(node.args):
                return node.args[index]
            return arg.default_value
    raise KeyError(f"{node.target} has no argument {name!r}")


def attention_nodes(graph: torch.fx.Graph) -> list[Node]:
    """The kvc.attention nodes of `graph` in order of execution."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target == ATTENTION]


__all__ = ["APPEND", "ATTEND", "ATTENTION", "LIB", "OPS", "ROPE", "VIEW", "Tensor", "argument",
           "attention_nodes", "body"]
