"""The two products of an attention, in one notation: a label for every dimension.

    scores[bhst] = sum_d q[bhsd] k[bhtd],   out[bhse] = sum_t weights[bhst] v[bhte]
"""

import string
from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from kvcompile.structure.concrete import Miss, argument, kind, value

LETTERS = string.ascii_uppercase
ROW, DEPTH = "<", ">"
PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


class Side(NamedTuple):
    """An operand of a product, to be seen as [*batch, *last]; `sizes` are those of batch."""

    node: Node
    labels: str
    batch: str = ""
    last: str = ""
    sizes: tuple[int, ...] = ()

    def arrange(self, x: Tensor) -> Tensor:
        """A tensor of the operand's shape as [all of batch, *last].

        Batch dimensions that it lacks are repeated, and heads within their group.
        """
        x = x.permute([self.labels.index(n) for n in self.batch + self.last if n in self.labels])
        for dim in (i for i, n in enumerate(self.batch) if n not in self.labels):
            x = x.unsqueeze(dim)
        if self.batch and 1 < x.shape[-3] < self.sizes[-1]:
            x = x.repeat_interleave(self.sizes[-1] // x.shape[-3], -3)
        x = x.expand(*self.sizes, -1, -1)
        return x.reshape(-1, *x.shape[-2:])

    def size(self, label: str) -> object:
        return value(self.node).shape[self.labels.index(label)]


def product(node: Node) -> tuple[Side, Side, str]:
    """The operands of a product and the labels of its result; an addend is left aside."""
    if kind(node) == "einsum":
        equation, operands = str(node.args[0]).replace(" ", ""), node.all_input_nodes
        spelled, _, out = equation.partition("->")
        labels = spelled.split(",")
        if len(labels) != 2 or not out or "." in spelled or any(len({*x}) < len(x) for x in labels):
            raise Miss(f"einsum '{equation}' is no plain product of two tensors", node)
    else:
        first = 1 if kind(node) == "baddbmm" else 0
        operands = [argument(node, first), argument(node, first + 1)]
        ranks = [value(x).dim() for x in operands]
        if min(ranks) < 2:
            raise Miss("multiplies by a vector", node)
        batch = LETTERS[: max(ranks) - 2]
        labels = [batch[len(batch) - rank + 2 :] + own
                  for rank, own in zip(ranks, ("xy", "yz"), strict=True)]
        out = batch + "xz"
    a, b = (Side(n, x) for n, x in zip(operands, labels, strict=True))
    return a, b, out


def scores_of(node: Node) -> tuple[Side, Side]:
    """(q as [.., tokens, D], k as [.., tokens, D]) of the product that gives scores [.., S, T]."""
    a, b, out = product(node)
    q, k = (a, b) if out[-1] in b.labels else (b, a)
    summed = (set(q.labels) & set(k.labels)) - set(out)
    row, token, batch = out[-2], out[-1], out[:-2]
    if len(summed) != 1 or row in k.labels or row not in q.labels or token in q.labels:
        raise Miss("is no product of queries and keys [.., tokens, D]", node)
    depth = summed.pop()
    return q._replace(batch=batch, last=row + depth), k._replace(batch=batch, last=token + depth)


def values_of(node: Node, weights: Node) -> tuple[Side, str]:
    """(v as [.., tokens, D], labels of the result) of the product of `weights` with values.

    The result has labels of v's batch, ROW for the query and DEPTH for D, in its own order.
    """
    w, v, out = product(node)
    if w.node is not weights:
        w, v = v, w
    token, row, new = w.labels[-1], w.labels[-2], set(v.labels) - set(w.labels)
    if v.node is weights or len(new) != 1 or token in out or token not in v.labels \
            or row in v.labels or set(out) != {*w.labels[:-1], *new}:
        raise Miss("is no product of weights [.., S, T] with values [.., T, D]", node)
    depth = new.pop()
    named = out.translate({ord(row): ROW, ord(depth): DEPTH})
    return v._replace(batch=w.labels[:-2], last=token + depth), named
