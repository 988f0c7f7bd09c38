"""Attention found by its structure: sdpa(q, k, v) or softmax(q k^T) v -> kvc.attention(q, k, v).

Two rules over the matchers of `logits.py`, `products.py`, `operands.py` and `masks.py`:
scaled_dot_product_attention in any of its aten forms, and a softmax over tokens between two
products. The graph is ATen, as torch.export's `run_decompositions({})` or AOTAutograd's inference
graphs give it. Every site is rewritten, or left as it was and refused with the reason and the node
in the way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvcompile.errors import UnsupportedModelError
from kvcompile.ir import ATTENTION, attention_nodes
from kvcompile.ir import argument as option
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.structure.concrete import (
    CASTS,
    SYMBOLIC,
    Concrete,
    Inputs,
    Miss,
    argument,
    constant,
    kind,
    value,
)
from kvcompile.structure.emit import Emitter
from kvcompile.structure.logits import SAME, SHAPED, Walk
from kvcompile.structure.masks import Mask, Masks, Term
from kvcompile.structure.operands import Operand, per_head, sources
from kvcompile.structure.products import DEPTH, LETTERS, PRODUCTS, ROW, Side, scores_of, values_of

SOFTMAX = {"softmax", "_softmax", "_safe_softmax", "special_softmax"}


@dataclass(frozen=True)
class Site:
    """The attention at `node`: kvc.attention, heads split and dimensions permuted, is `out`.

    `batch` are the sizes into which batch and heads are split, at concrete sizes.
    """

    node: Node
    out: Node
    q: Operand
    k: Operand
    v: Operand
    batch: tuple[int, ...]
    order: tuple[int, ...]
    mask: Mask
    scale: float
    softcap: float = 0.0
    sinks: Node | None = None

    def __str__(self) -> str:
        text = f"{self.q.heads} query heads on {self.k.heads} kv heads, scale {self.scale:.6g}"
        extra = {"window": self.mask.window, "softcap": self.softcap}
        text += "".join(f", {n} {x:g}" for n, x in extra.items() if x)
        return text + (", sinks" if self.sinks else "") + (", padding" if self.mask.padding else "")


def recognize(gm: GraphModule, *, tokens: Node | None = None, positions: Node | None = None,
              padding: Node | None = None, valid: Node | None = None,
              values: Mapping[str, Tensor] | None = None) -> list[Outcome]:
    """Rewrite every attention of `gm` in place; one outcome for each, in graph order.

    Placeholders: `tokens` [B, S, ..] gives the sizes, `positions` and `padding` [B, S] the token
    positions and which tokens are padding (0); those not given are recognized by name and shape,
    positions else count from 0. `valid` [B, S] bool, if given, becomes every node's operand in
    place of what its mask reads. `values` are the contents of placeholders that tracing lifted.
    """
    try:
        inputs = Inputs.of(gm.graph, tokens, positions, padding, values)
        rules = Rules(Concrete(gm, inputs, 5), Concrete(gm, inputs, 7), Masks(gm, inputs))
    except Miss as miss:
        raise UnsupportedModelError(miss.reason) from None
    for node in list(gm.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):  # would keep alive what is replaced
            gm.graph.erase_node(node)
    numbers = count(1 + max((option(n, "layer") for n in attention_nodes(gm.graph)), default=-1))
    outcomes: list[Outcome] = []
    sites: list[tuple[int, Site]] = []
    for node in [n for n in gm.graph.nodes if rules.attends(n)]:
        layer = next(numbers)
        try:
            site = rules.softmax(node) if kind(node) in SOFTMAX else rules.sdpa(node)
            sites.append((layer, site))
            outcomes.append(Rewritten(layer, str(site)))
        except Miss as miss:
            outcomes.append(Refused(layer, miss.reason, (miss.node or node).name))
    if sites:
        emit = Emitter(gm.graph, inputs, valid)
        for layer, site in sites:
            emit.attention(site, layer)
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return outcomes


@dataclass(frozen=True)
class Rules:
    """What an attention looks like, in a graph seen at two token counts."""

    at: Concrete
    more: Concrete
    masks: Masks

    def attends(self, node: Node) -> bool:
        """Whether `node` is an attention op, or a softmax over tokens."""
        if node.op != "call_function" or node.target is ATTENTION:
            return False
        if kind(node) not in SOFTMAX:
            return "attention" in str(node.target)
        size = value(node).shape[_arguments(node)["dim"]]
        try:
            if isinstance(size, SYMBOLIC):
                return bool(self.at.size(size) != self.more.size(size))
        except Miss:
            return True  # over a number of its own, such as that of encoded tokens
        if self.at.tokens != self.more.tokens or size not in (self.at.tokens, self.at.tokens + 1):
            return False  # over experts or channels
        return _finds(lambda: self._values(node, None)) or _finds(
            lambda: Walk(self.at).logits(argument(node)))

    def sdpa(self, node: Node) -> Site:
        """scaled_dot_product_attention, and the fused ops that it becomes."""
        named = _arguments(node)
        if "scaled_dot_product" not in kind(node):
            raise Miss(f"'{node.target}' is an attention op that kvcompile does not know", node)
        if named.get("dropout_p"):
            raise Miss("drops weights at random; put the module into eval mode", node)
        out = node
        if not isinstance(value(node), Tensor):
            used = {u.args[1]: u for u in node.users}
            if set(used) != {0}:
                raise Miss("has results besides the attention that are used", node)
            out = used[0]
        batch = LETTERS[: value(named["query"]).dim() - 2]
        sizes = self.at.shape(named["query"])[:-2]
        q, k, v = (Side(named[n], batch + last, batch, last, sizes)
                   for n, last in (("query", "xy"), ("key", "zy"), ("value", "zw")))
        mask = named.get("attn_mask", named.get("attn_bias"))
        how = "see" if mask is not None and value(mask).dtype == torch.bool else "add"
        terms = () if mask is None else (Term(mask, how, rank=len(batch) + 2),)  # type: ignore[arg-type]
        scale = named.get("scale")
        return self._site(
            node, out, q, k, v, batch + ROW + DEPTH, terms, causal=bool(named.get("is_causal")),
            scale=value(q.node).shape[-1] ** -0.5 if scale is None else constant(self.at, scale))

    def softmax(self, node: Node) -> Site:
        """matmul(softmax(logits), v), where the logits lead to matmul(q, k^T)."""
        if _arguments(node)["dim"] not in (-1, value(node).dim() - 1):
            raise Miss("is a softmax over tokens that are not the last dimension", node)
        so = Walk(self.at).logits(argument(node))
        out, weights = self._values(node, so.sinks)
        assert so.product is not None
        q, k = scores_of(so.product)
        v, result = values_of(out, weights)
        sizes = self.at.shape(so.product)[:-2]
        q, k, v = (x._replace(sizes=s) for x, s in (
            (q, sizes), (k, sizes), (v, self.at.shape(weights)[:-2])))
        return self._site(node, out, q, k, v, result, so.terms, scale=so.scale,
                          softcap=so.softcap, sinks=so.sinks)

    def _values(self, softmax: Node, sinks: Node | None) -> tuple[Node, Node]:
        """(the product with the values, its operand the weights) that the softmax leads to."""
        node, cut = softmax, sinks is None
        while True:
            if len(node.users) != 1:
                names = ", ".join(u.name for u in node.users)
                raise Miss(f"gives weights to {names}; only a product with values is known", node)
            user = next(iter(node.users))
            if kind(user) in PRODUCTS and cut:
                return user, node
            if kind(user) == "slice" and self.at.shape(user) != self.at.shape(node) and not cut:
                before, after = self.at.shape(node), self.at.shape(user)
                cut = after == (*before[:-1], before[-1] - 1) and user.args[2] in (0, None)
            elif not (kind(user) in SAME | CASTS or (kind(user) in SHAPED | {"slice"} and
                                                    self.at.same_rows(node, user))):
                raise Miss(f"goes into '{user.name}', no product with values", node)
            node = user

    def _site(self, node: Node, out: Node, q: Side, k: Side, v: Side, result: str,
              terms: tuple[Term, ...], scale: float, causal: bool = False, softcap: float = 0.0,
              sinks: Node | None = None) -> Site:
        for side, what in ((q, "queries"), (k, "keys")):
            size = side.size(side.last[0])
            if any(c.size(size) != c.tokens for c in (self.at, self.more)):
                raise Miss(f"has {what} of {size} tokens, which are not the tokens of the call",
                           side.node)
        heads = prod(v.sizes) // self.at.batch
        if heads * self.at.batch != prod(v.sizes) or len(v.sizes) > 1 and (
                v.sizes[0] != self.at.batch):
            raise Miss(f"has leading dimensions {v.sizes}, not batch and heads", out)
        queries, keys, values = (sources(self.at, side.node, side.arrange, scaled=side is not v)
                                 for side in (q, k, v))
        both = {o.heads for o in keys} & {o.heads for o in values}
        if not both or heads not in {o.heads for o in queries}:
            raise Miss("has queries, keys and values whose heads do not match", node)
        q_, k_, v_ = (next(o for o in found if o.heads == h) for found, h in (
            (queries, heads), (keys, min(both)), (values, min(both))))
        order = tuple((*v.batch, ROW, DEPTH).index(n) for n in result)
        mask = self.masks.classify(node, terms, causal)
        return Site(node, out, q_, k_, v_, v.sizes, order, mask, scale * q_.factor * k_.factor,
                    softcap, sinks and per_head(self.at, sinks, heads))


def _finds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except Miss:
        return False
    return True


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of an aten op by their names, those that have a value."""
    schema = getattr(node.target, "_schema", None)
    if not kind(node) or schema is None:
        return {}
    named = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    return {n: x for n, x in {**named, **node.kwargs}.items() if x is not None}
