"""The kvc dialect: ops over torch.fx, each with a schema, a fake and a plain PyTorch body.

    kvc.attention  what capture emits: causal attention among the tokens of one call
    kvc.rope       rotary embedding, explicit so that keys can be cached before or after it
    kvc.append     store this call's tokens of some layers (mutates the planes in place)
    kvc.attend     attention over what earlier calls stored and, exactly, this call's tokens
    kvc.storable   whether this call's K and V may be stored, layer by layer
    kvc.linear     linears of one input, read as one
    kvc.score      how much each token of a prompt matters, by the layer's rule
    kvc.keep       K and V of the tokens that rules keep, gathered head by head
    kvc.prune      K without the channels that a head drops of its older tokens
    kvc.evict      note what a step attended to, and drop tokens of heads that hold too many
    kvc.rank       note scores, and order the tokens that leave the recent tier by them
    kvc.rest       of a prompt the mean K and V of what heads do not keep, and how much that is
    kvc.beside     attention over one slot more, which stands for so many tokens

Two more serve models that fill a KVCache by their own code. They take a handle of the cache, so
that its planes may grow between calls without a graph noticing:

    kvc.update     store this call's tokens; what it sees as dense K and V, to be attended to
    kvc.decode     the same and the attention over it, as kvc.attend and kvc.append

Shapes: q [B, Hq, S, Dk], k [B, H, S, Dk], v [B, H, S, Dv], positions and valid [B, S] (valid is
False for padding: such tokens are neither seen nor stored). `store` is the text of a
`kvcompile.store.Store`; `planes` are its tensors in `Store.planes` order, shared by all layers of
a group, and a layer's index there is its `slot`. Of layers that are stored together, `members` by
number, k and v come in order, and each of them is a `member` of the slot. `window` counts tokens
of the row, the query included (0: no window). Where k is less than the keys, they are
rope(k basis^T + offset) with basis [H', Dq, Dk], offset [H', Dq], cos and sin [B or 1, 1, N, R] of
N tokens, all optional. `far`, like k, are the keys of tokens in the body, where those are another
layer's. The bodies live in `kernels/`.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch._ops import OpOverload
from torch.fx import Node

from kvcompile.store import Store

F = TypeVar("F", bound=Callable[..., Any])

LIB = torch.library.Library("kvc", "DEF")

LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor valid, Tensor? sinks, *, "
    "float scale, int window=0, float softcap=0.0, str store='store', int layer=0, "
    "int[] members=[], Tensor? basis=None, Tensor? offset=None, Tensor? cos=None, "
    "Tensor? sin=None, str style='', str rule='', Tensor? far=None) -> Tensor"
)
LIB.define(
    "score(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor valid, Tensor hints, "
    "Tensor? weight, Tensor? angles, *, str rule, float scale, float softcap=0.0, "
    "str style='half', Tensor? ids=None) -> (Tensor, Tensor)"
)
LIB.define(
    "keep(Tensor[] scores, Tensor[] measures, Tensor[] k, Tensor[] v, Tensor positions, "
    "Tensor valid, Tensor hints, Tensor? angles, *, str[] rules, str style='half') -> "
    "(Tensor[], Tensor[], Tensor[], Tensor[])"
)
LIB.define("prune(Tensor q, Tensor k, Tensor positions, Tensor valid, Tensor hints, *, str rule) "
           "-> Tensor")
LIB.define(
    "evict(Tensor(a!)[] planes, Tensor[] mass, Tensor[] k, Tensor[] v, Tensor positions, "
    "Tensor valid, *, str store, str[] rules, int[] slots, int group=1, Tensor? ids=None) -> ()"
)
LIB.define(
    "rank(Tensor(a!)[] planes, Tensor[] mass, Tensor[] k, Tensor[] v, Tensor positions, "
    "Tensor valid, *, str store, str[] rules, int[] slots, int group=1) -> (Tensor, Tensor)"
)
LIB.define("rest(Tensor k, Tensor v, Tensor columns, Tensor valid, Tensor hints) -> "
           "(Tensor, Tensor, Tensor)")
LIB.define(
    "beside(Tensor q, Tensor o, Tensor lse, Tensor k, Tensor v, Tensor count, *, float scale, "
    "float softcap=0.0, int slot=0, Tensor? at=None) -> Tensor"
)
LIB.define("rope(Tensor x, Tensor cos, Tensor sin, *, str style) -> Tensor")
LIB.define(
    "append(Tensor(a!)[] planes, Tensor[] k, Tensor[] v, Tensor positions, Tensor valid, *, "
    "str store, int[] slots) -> ()"
)
LIB.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor[] planes, Tensor positions, Tensor valid, "
    "Tensor? sinks, *, float scale, int window=0, float softcap=0.0, str store, int slot=0, "
    "int layer=0, bool mass=False, int looks=0, bool low=False, int member=0, "
    "Tensor? basis=None, Tensor? offset=None, Tensor? cos=None, Tensor? sin=None, "
    "str style='', Tensor? at=None) -> (Tensor, Tensor, Tensor)"
)
LIB.define("storable(Tensor[] k, Tensor[] v, float[] k_limits, float[] v_limits) -> Tensor")
LIB.define(
    "update(Tensor(a!) cache, Tensor k, Tensor v, *, SymInt length, int layer) -> (Tensor, Tensor)"
)
LIB.define(
    "decode(Tensor(a!) cache, Tensor q, Tensor k, Tensor v, Tensor? mask, *, float scale, "
    "str recipe='', int layer) -> Tensor"
)
LIB.define(
    "linear(Tensor x, Tensor[] weights, Tensor?[] biases, *, str gate='') -> Tensor"
)

ATTENTION = torch.ops.kvc.attention.default
ROPE = torch.ops.kvc.rope.default
APPEND = torch.ops.kvc.append.default
ATTEND = torch.ops.kvc.attend.default
STORABLE = torch.ops.kvc.storable.default
UPDATE = torch.ops.kvc.update.default
DECODE = torch.ops.kvc.decode.default
LINEAR = torch.ops.kvc.linear.default
SCORE = torch.ops.kvc.score.default
KEEP = torch.ops.kvc.keep.default
PRUNE = torch.ops.kvc.prune.default
EVICT = torch.ops.kvc.evict.default
RANK = torch.ops.kvc.rank.default
REST = torch.ops.kvc.rest.default
BESIDE = torch.ops.kvc.beside.default
OPS = (ATTENTION, ROPE, APPEND, ATTEND, STORABLE)


@torch.library.register_fake("kvc::attention", lib=LIB)
def _(  # type: ignore[no-untyped-def]
    q, k, v, positions, valid, sinks, *, scale, window=0, softcap=0.0, store="store", layer=0,
    members=(), basis=None, offset=None, cos=None, sin=None, style="", rule="", far=None,
):
    batch, heads, tokens, _ = q.shape  # in memory the heads of a token lie together
    return q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)


@torch.library.register_fake("kvc::rope", lib=LIB)
def _(x, cos, sin, *, style):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("kvc::append", lib=LIB)
def _(planes, k, v, positions, valid, *, store, slots):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("kvc::attend", lib=LIB)
def _(  # type: ignore[no-untyped-def]
    q, k, v, planes, positions, valid, sinks, *, scale, window=0, softcap=0.0, store, slot=0,
    layer=0, mass=False, looks=0, low=False, member=0, basis=None, offset=None, cos=None,
    sin=None, style="", at=None,
):
    o = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    dims, (batch, heads) = (k.shape[-1], v.shape[-1]), k.shape[:2]
    sizes = [x.shape for x in planes]
    places = Store.parse(store).places(dims, k.dtype, sizes) + q.shape[2] if mass else 0
    return (o, *(q.new_empty(shape, dtype=torch.float32)
                 for shape in (q.shape[:-1], (batch, heads, places))))


@torch.library.register_fake("kvc::storable", lib=LIB)
def _(k, v, k_limits, v_limits):  # type: ignore[no-untyped-def]
    return k[0].new_empty(len(k), dtype=torch.bool)


@torch.library.register_fake("kvc::evict", lib=LIB)
def _(  # type: ignore[no-untyped-def]
    planes, mass, k, v, positions, valid, *, store, rules, slots, group=1, ids=None,
):
    return None


@torch.library.register_fake("kvc::rank", lib=LIB)
def _(planes, mass, k, v, positions, valid, *, store, rules, slots, group=1):  # type: ignore[no-untyped-def]
    return tuple(x[0].new_empty(len(x), *x[0].shape) for x in (k, v))


@torch.library.register_fake("kvc::beside", lib=LIB)
def _(q, o, lse, k, v, count, *, scale, softcap=0.0, slot=0, at=None):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


@torch.library.register_fake("kvc::update", lib=LIB)
def _(cache, k, v, *, length, layer):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape[0], x.shape[1], length, x.shape[3]) for x in (k, v))


@torch.library.register_fake("kvc::decode", lib=LIB)
def _(cache, q, k, v, mask, *, scale, recipe="", layer):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


@torch.library.register_fake("kvc::linear", lib=LIB)
def _(x, weights, biases, *, gate=""):  # type: ignore[no-untyped-def]
    rows = sum(w.shape[0] for w in weights[: 1 if gate else None])
    return x.new_empty(*x.shape[:-1], rows)


INLINED: dict[OpOverload, Callable[..., Any]] = {}  # ops that a compiler should see through


def body(name: str, inline: bool = False) -> Callable[[F], F]:
    """Register the decorated function as the plain PyTorch body of kvc op `name`.

    `inline`: compiled graphs take the body's own ops, to be fused with what is around them.
    """

    def register(function: F) -> F:
        LIB.impl(name, function, "CompositeExplicitAutograd")
        if inline:
            INLINED[getattr(torch.ops.kvc, name).default] = function
        return function

    return register


def argument(node: Node, name: str) -> Any:
    """The value that `node` (a call of a kvc op) has for the schema argument `name`."""
    for index, arg in enumerate(cast(OpOverload, node.target)._schema.arguments):
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
