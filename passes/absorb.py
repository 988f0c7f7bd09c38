"""Rewrites one attention so that it reads cached tensors from which K and V would be computed.

    q . (W z)  ->  (q W) . z             a linear behind K is absorbed into q
    (p . z) W^T                          one behind V into what follows attention
    rope(W z)                            is rebuilt from z at read (kvc.attention's basis, cos, sin)
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from kvcompile.ir import ATTENTION, argument
from kvcompile.store import Store
from kvcompile.structure.elements import width
from kvcompile.structure.layout import Layout, Made, Segment
from kvcompile.structure.sources import split_bias, weight_of
from kvcompile.structure.writer import Writer

aten = torch.ops.aten


class Absorber(Writer):
    """Writes the nodes of one layer before and after its attention."""

    def __init__(self, gm: GraphModule, node: Node) -> None:
        super().__init__(gm, node)
        self.node = node

    def rewrite(self, layout: Layout, k: Made, v: Made, kept: dict[tuple, Node]) -> None:
        """Change q, k and v of the attention, and what follows it. `kept`: what other layers with
        the same K and V have made already."""
        node, graph = self.node, self.gm.graph
        with graph.inserting_before(node):
            keys = self.cached(layout, layout.k, kept)
            if not layout.v_in_k:
                values = self.cached(layout, layout.v, kept)
            elif (keys, "v") in kept:
                values = kept[keys, "v"]
            else:
                values = self.call(aten.slice.Tensor, keys, -1, 0, layout.v.shape[1])
                kept[keys, "v"] = values
            query, extra = argument(node, "q"), {}
            if k.rope is not None:
                extra = self.rebuild(layout, k)
            elif not self.same(layout.k, k):
                query = self.absorbed(query, layout.k, k)
        store = Store.parse(argument(node, "store"))
        if layout.v_in_k:
            extra["store"] = str(store.with_v_in_k())
        before = node.meta["val"]
        node.args = (query, keys, values, *node.args[3:])
        node.kwargs = {**node.kwargs, **extra}
        if self.same(layout.v, v):
            return
        with graph.inserting_after(node):
            marker = graph.call_function(aten.alias.default, (node,))
        node.replace_all_uses_with(marker)
        marker.args = (node,)
        with self.mode:
            args: Any = map_arg(node.args, _val)
            kwargs: Any = map_arg(node.kwargs, _val)
            node.meta = {**node.meta, "val": ATTENTION(*args, **kwargs)}
        with graph.inserting_before(marker):
            out = self.expanded(node, layout.v, v)
            for step in (aten.transpose.int, aten.contiguous.default, aten.transpose.int):
                out = self.call(step, out, *((1, 2) if step is aten.transpose.int else ()))
        assert out.meta["val"].shape == before.shape and out.meta["val"].stride() == before.stride()
        marker.replace_all_uses_with(out)
        graph.erase_node(marker)

    def same(self, layout: Tensor, made: Made) -> bool:
        """Whether the side lies in the cache as it is: head by head, channel by channel."""
        if made.rope is not None or not made.plain or layout.shape[0] != made.heads:
            return False
        reads = torch.cat([s.reads for s in made.segments], 1)
        return torch.equal(reads, layout)

    def cached(self, layout: Layout, numbers: Tensor, kept: dict[tuple, Node]) -> Node:
        """[B, groups, S, n]: these numbers of the cached tensors."""
        wanted, parts, at = numbers.flatten(), [], 0
        for n in layout.nodes:
            size = width(n)
            if bool(((wanted >= at) & (wanted < at + size)).any()):  # it is used at all
                parts.append((n, at, size))
            at += size
        ids = torch.cat([torch.arange(at, at + size) for _, at, size in parts])
        order = torch.searchsorted(ids, wanted)
        key = (tuple(n for n, *_ in parts), tuple(order.tolist()), numbers.shape[0])
        if key not in kept:
            tokens = [self.per_token(n) for n, *_ in parts]
            x = tokens[0] if len(parts) == 1 else self.call(aten.cat.default, tokens, -1)
            if not torch.equal(order, torch.arange(len(ids))):
                x = self.call(aten.index_select.default, x, -1, self.constant(order))
            x = self.call(aten.unflatten.int, x, -1, [numbers.shape[0], -1])
            kept[key] = self.call(aten.transpose.int, x, 1, 2)
        return kept[key]

    def per_token(self, node: Node) -> Node:
        """`node` as [B, S, channels]."""
        shape = node.meta["val"].shape
        fixed = [d for d, n in enumerate(shape) if isinstance(n, int)]
        moving = [d for d in range(len(shape)) if d not in fixed]
        if len(moving) == 1:  # [B * S, channels]
            rows = argument(self.node, "positions").meta["val"].shape
            sizes = [self.call(aten.sym_size.int, argument(self.node, "positions"), d)
                     for d in range(len(rows))]
            return self.call(aten.reshape.default, node, [*sizes, -1])
        order = [*moving, *fixed]
        if order != list(range(len(shape))):
            node = self.call(aten.permute.default, node, order)
        if len(fixed) > 1:
            node = self.call(aten.flatten.using_ints, node, 2, -1)
        return node

    def weight(self, segment: Segment, layout: Tensor) -> tuple[Node | None, int, int]:
        """weight [heads, len, n] and (at, n): the stored numbers that it multiplies; None: one."""
        at = _positions(segment.reads, layout)
        first, n = int(at[0, 0]), at.shape[1]
        straight = bool((at == torch.arange(first, first + n)).all())
        if not segment.linears:
            if straight:
                return None, first, n
            chosen = torch.nn.functional.one_hot(at, layout.shape[1])
            dtype = argument(self.node, "k").meta["val"].dtype
            return self.constant(chosen.to(dtype)), 0, layout.shape[1]
        if straight and (view := self.view(segment)):
            return view, first, n
        whole, names = [], dict[str, None]()
        for h, linear in enumerate(segment.linears):
            name, transposed = weight_of(split_bias(linear)[0])
            names[name] = None
            w = self.tensor(name).t() if transposed else self.tensor(name)
            rows = w[segment.rows[h] : segment.rows[h] + segment.length]
            out = rows.new_zeros(segment.length, layout.shape[1])
            whole.append(out.index_copy_(1, at[h].to(out.device), rows))
        made = torch.stack(whole)
        if not straight:
            first, n = 0, layout.shape[1]
        return self.constant(made[..., first : first + n].contiguous(), tuple(names)), first, n

    def view(self, segment: Segment) -> Node | None:
        """The weight as a view of the model's own, where one linear has all heads' rows."""
        heads, rows = len(segment.rows), segment.rows
        product = split_bias(segment.linears[0])[0]
        value = segment.linears[0].meta["val"]
        if len(set(segment.linears)) > 1 or value.shape[-1] % heads:
            return None
        each = int(value.shape[-1]) // heads
        if any(row != rows[0] + h * each for h, row in enumerate(rows)) or (
                rows[0] + segment.length > each):
            return None
        name, transposed = weight_of(product)
        weight = self.attribute(name)
        if transposed:
            weight = self.call(aten.t.default, weight)
        weight = self.call(aten.unflatten.int, weight, 0, [heads, each])
        if segment.length < each:
            weight = self.call(aten.slice.Tensor, weight, 1, rows[0], rows[0] + segment.length)
        return weight

    def bias(self, made: Made) -> Node | None:
        """[heads, dim] that is added to the side, if anything is."""
        if not any(split_bias(n)[1] for s in made.segments for n in s.linears):
            return None
        out, names = None, dict[str, None]()
        for s in made.segments:
            for h, linear in enumerate(s.linears):
                name = split_bias(linear)[1]
                if name is None:
                    continue
                names[name] = None
                value = self.tensor(name)
                if out is None:
                    out = value.new_zeros(made.heads, made.dim)
                out[h, s.start : s.start + s.length] = value[s.rows[h] : s.rows[h] + s.length]
        return None if out is None else self.constant(out, tuple(names))

    def absorbed(self, query: Node, layout: Tensor, made: Made) -> Node:
        """q [B, Hq, S, Dk] -> [B, Hq, S, n]: the same logits against what is cached."""
        parts: list[tuple[int, int, Node]] = []
        for s in made.segments:
            x = query if s.length == made.dim else self.call(
                aten.slice.Tensor, query, -1, s.start, s.start + s.length)
            weight, at, n = self.weight(s, layout)
            parts.append((at, n, x if weight is None else self.by_head(x, weight)))
        out: list[Node] = []
        end, width = 0, layout.shape[1]
        spans = sorted(parts, key=lambda p: p[:2])
        if all(a[0] + a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)):
            for at, n, x in spans:
                right = 0 if x is not spans[-1][2] else width - at - n
                if at > end or right:
                    x = self.padded(x, at - end, right)
                out.append(x)
                end = at + n
            return out[0] if len(out) == 1 else self.call(aten.cat.default, out, -1)
        total = None
        for at, n, x in spans:
            if n < width:
                x = self.padded(x, at, width - at - n)
            total = x if total is None else self.call(aten.add.Tensor, total, x)
        assert total is not None
        return total

    def padded(self, x: Node, left: int, right: int) -> Node:
        """x with zeros around its last dim. The op's own body makes symbolic sizes constant."""
        node = self.gm.graph.call_function(aten.constant_pad_nd.default, (x, [left, right]))
        val = x.meta["val"]
        node.meta = {**self.like.meta,
                     "val": val.new_empty((*val.shape[:-1], int(val.shape[-1]) + left + right))}
        return node

    def by_head(self, x: Node, weight: Node) -> Node:
        """x [B, Hq, S, d], weight [H, d, n] -> [B, Hq, S, n]."""
        heads, queries = int(weight.meta["val"].shape[0]), int(x.meta["val"].shape[1])
        if heads == queries:
            return self.call(aten.matmul.default, x, weight)
        x = self.call(aten.unflatten.int, x, 1, [heads, -1])
        x = self.call(aten.flatten.using_ints, x, 2, 3)
        x = self.call(aten.matmul.default, x, weight)
        x = self.call(aten.unflatten.int, x, 2, [queries // heads, -1])
        return self.call(aten.flatten.using_ints, x, 1, 2)

    def expanded(self, o: Node, layout: Tensor, made: Made) -> Node:
        """o [B, Hq, S, n] over cached numbers -> what it is over V, [B, Hq, S, Dv]."""
        parts = []
        for s in made.segments:
            weight, at, n = self.weight(s, layout)
            x = o if n == layout.shape[1] else self.call(aten.slice.Tensor, o, -1, at, at + n)
            if weight is not None:
                x = self.by_head(x, self.call(aten.transpose.int, weight, 1, 2))
            parts.append(x)
        out = parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, -1)
        if bias := self.bias(made):
            each = int(out.meta["val"].shape[1]) // made.heads
            bias = self.call(aten.unsqueeze.default, bias, 1)
            if each > 1:
                bias = self.call(aten.repeat_interleave.self_int, bias, each, 0)
            out = self.call(aten.add.Tensor, out, bias)
        return out

    def rebuild(self, layout: Layout, made: Made) -> dict[str, Any]:
        """The operands by which keys are rebuilt at read."""
        assert made.rope is not None
        out: dict[str, Any] = {n: argument(made.rope, n) for n in ("cos", "sin", "style")}
        (segment,) = made.segments
        weight, at, n = self.weight(segment, layout.k)
        if weight is not None or layout.groups != made.heads:
            if weight is None or n < layout.k.shape[1]:
                raise ValueError("the basis must read all that is stored")
            out["basis"] = weight
        if bias := self.bias(made):
            out["offset"] = bias
        return out

    def constant(self, value: Tensor, derived: tuple[str, ...] = ()) -> Node:
        """A new buffer; `derived` are the parameters that it was computed from."""
        device = argument(self.node, "k").meta["val"].device
        return self.buffer("placed", value.to(device), derived)


def _val(node: Node) -> Any:
    return node.meta["val"]


def _positions(reads: Tensor, layout: Tensor) -> Tensor:
    """[heads, n]: where each head's numbers stand in its group's row of `layout`."""
    per = len(reads) // len(layout)
    return torch.stack([torch.stack([(layout[h // per] == x).nonzero()[0, 0] for x in row])
                        for h, row in enumerate(reads)])
