"""Where K and V come from: K[head, channel] <- a row of a weight, through norms and rope.

Between a projection and attention nearly every op only moves elements. Run on tensors that number
the projections' outputs, these ops tell exactly which output row lands in which channel of which
head: fused, interleaved and latent projections need no case of their own. Norms and rope change
values in place and are recorded. Anything else refuses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvcompile.ir import ROPE, argument
from kvcompile.rewrite import Refused
from kvcompile.structure.movement import CASTS, LARGE, Planes, Probe, constant, feeds, moves, packet
from kvcompile.structure.norms import Norm, find_norm

aten = torch.ops.aten

PRODUCTS = {aten.mm, aten.matmul}
RESHAPES = {aten.view, aten._unsafe_view, aten.reshape}


@dataclass(frozen=True, eq=False)
class Linear:
    """A projection, and which of its output rows make which elements of the node asked about.

    `rows[head, channel]` (in `below`: `rows[channel]`) is the output row; -1: another entry makes
    this element. `path` are the nodes passed from the projection on, in order of execution, and
    `norms` and `rope` those of them that change values. `below` are the projections, if any, that
    make `input` by the same kinds of steps: MLA's down-projection, or a factored weight.
    """

    node: Node
    input: Node
    weight: str
    bias: str | None
    transposed: bool  # the weight is [in, out] (addmm, mm), not [out, in]
    rows: Tensor
    path: tuple[Node, ...]
    norms: tuple[Norm, ...]
    rope: Node | None
    below: tuple["Linear", ...]

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels that this entry makes, in any head."""
        made = (self.rows >= 0).reshape(-1, self.rows.shape[-1]).any(0)
        return tuple(made.nonzero().flatten().tolist())

    @property
    def reshape(self) -> Node | None:
        """The node that splits the projection's output into heads."""
        ranks = [(n, len(n.meta["val"].shape)) for n in self.path]
        return next((n for n, rank in ranks if rank > 3), None)

    @property
    def affine(self) -> tuple[int, int, int] | None:
        """(start, per head, per channel): row = start + head * per head + i * per channel.

        `i` counts `channels`. None: the rows follow no such rule, and only `rows` tells them.
        """
        rows = self.rows.reshape(-1, self.rows.shape[-1])[:, list(self.channels)]
        start = int(rows[0, 0])
        head = int(rows[1, 0]) - start if rows.shape[0] > 1 else 0
        channel = int(rows[0, 1]) - start if rows.shape[1] > 1 else 1
        heads, channels = (torch.arange(n) for n in rows.shape)
        fits = torch.equal(rows, start + heads[:, None] * head + channels * channel)
        return (start, head, channel) if fits else None

    @property
    def span(self) -> tuple[int, int] | None:
        """(start, stop) if the rows are taken in order and without gaps."""
        rows = self.rows[self.rows >= 0]
        start, stop = int(rows[0]), int(rows[0]) + rows.numel()
        return (start, stop) if torch.equal(rows, torch.arange(start, stop)) else None

    def __str__(self) -> str:
        if self.span:
            return f"{self.weight}[{self.span[0]}:{self.span[1]}]"
        if self.affine:
            return "{}[{} + {} head + {} channel]".format(self.weight, *self.affine)
        return f"{self.weight}{self.rows.tolist()}"


@dataclass(frozen=True, eq=False)
class Source:
    """What makes `node`, the q, k or v [B, H, S, D] of an attention node."""

    node: Node
    linears: tuple[Linear, ...]  # in order of their first channel

    def __str__(self) -> str:
        return ", ".join(map(str, self.linears))


def sources(node: Node, layer: int = 0) -> Source | Refused:
    """The projections that make `node`, the q, k or v of an attention node, or why it has none.

    The graph must be canonical: rope explicit.
    """
    walk = _Walk(Probe())
    try:
        if walk.probe.shape(node).numel() > LARGE:
            raise _Stop(node, f"'{node.name}' has too large a fixed size to follow; trace with "
                              "symbolic sizes")
        return Source(node, walk.linears(node, lambda x: x.transpose(1, 2).flatten(0, 1)))
    except _Stop as stop:
        return Refused(layer, stop.reason, stop.node.name)


class _Stop(Exception):
    def __init__(self, node: Node, reason: str) -> None:
        self.node, self.reason = node, reason


class _Walk:
    """One walk back. Every node gets two planes: numbers of projections' outputs, and of paths."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.known: dict[Node, tuple[Tensor, Tensor]] = {}
        self.leaves: list[Node] = []
        self.starts: list[int] = [1]  # the number of each leaf's first element, and the next free
        self.paths: list[tuple[Node, ...]] = [()]
        self.norms: dict[Node, Norm] = {}

    def linears(self, node: Node, per_token: Callable[[Tensor], Tensor]) -> tuple[Linear, ...]:
        """The projections that make `node`; `per_token` lays a plane of it out as [tokens, ...]."""
        number, path = (per_token(p) for p in self.planes(node))
        if bool((number == 0).any()):
            raise _Stop(node, f"parts of '{node.name}' are never written")
        leaf = torch.bucketize(number.contiguous(), torch.tensor(self.starts), right=True) - 1
        entries: dict[tuple[int, tuple[Node, ...]], list[int]] = {}  # leaf, what changes values
        for i, p in torch.stack([leaf, path], -1).flatten(0, -2).unique(dim=0).tolist():
            changes = (n for n in self.paths[p] if n in self.norms or n.target is ROPE)
            entries.setdefault((i, tuple(changes)), []).append(p)
        out = []
        for (i, _), paths in entries.items():
            name, width = self.leaves[i].name, self.probe.shape(self.leaves[i])[-1]
            mine = (leaf == i) & torch.isin(path, torch.tensor(paths))
            token = (number - self.starts[i]) // width
            rows = torch.where(mine, (number - self.starts[i]) % width, -1)
            own = torch.arange(len(rows)).view(-1, *[1] * (rows.ndim - 1))
            if bool((mine & (token != own)).any()) or bool((rows != rows[0]).any()):
                raise _Stop(node, f"'{node.name}' mixes the tokens of '{name}'")
            passed = sorted({n for p in paths for n in self.paths[p]})
            out.append(self.linear(self.leaves[i], rows[0], tuple(passed)))
        return tuple(sorted(out, key=lambda x: x.channels))

    def linear(self, leaf: Node, rows: Tensor, path: tuple[Node, ...]) -> Linear:
        product, bias = split_bias(leaf)
        weight, transposed = weight_of(product)
        x = product.args[1 if packet(product) is aten.addmm else 0]
        assert isinstance(x, Node)
        try:
            below = _Walk(self.probe).linears(x, lambda plane: plane.flatten(0, -2))
        except _Stop:
            below = ()
        norms = tuple(self.norms[n] for n in path if n in self.norms)
        rope = next((n for n in path if n.target is ROPE), None)
        return Linear(leaf, x, weight, bias, transposed, rows, path, norms, rope, below)

    def planes(self, node: Node) -> tuple[Tensor, Tensor]:
        if node not in self.known:
            self.known[node] = self.trace(node)
        return self.known[node]

    def trace(self, node: Node) -> tuple[Tensor, Tensor]:
        if is_linear(node):
            weight_of(split_bias(node)[0])
            numbers = self.probe.numbers(node, self.starts[-1])
            self.leaves.append(node)
            self.starts.append(self.starts[-1] + numbers.numel())
            return numbers, torch.zeros_like(numbers)
        if moves(node):
            planes: Planes = self.probe.move(node, [self.planes(n) for n in feeds(node)])
            number, path = planes if len(planes) == 2 else planes * 2
            return number, self.passed(path, node)
        if packet(node) in CASTS:
            number, path = self.planes(feeds(node)[0])
            return number, self.passed(path, node)
        if node.target is ROPE:
            number, path = self.planes(argument(node, "x"))
            return number, self.passed(path, node)
        norm = find_norm(node, self.probe)
        if norm is None:
            raise _Stop(node, f"'{node.name}' ({node.target}) stands where a projection, a norm, "
                              "rope or a view was expected")
        number, path = self.planes(norm.input)
        self.norms[node] = norm
        return number, self.passed(path, node)

    def passed(self, path: Tensor, node: Node) -> Tensor:
        """The plane of paths once `node` has been passed."""
        before, index = path.unique(return_inverse=True)
        start = len(self.paths)
        self.paths += [(*self.paths[p], node) for p in before.tolist()]
        return index + start


def is_linear(node: Node) -> bool:
    op = split_bias(node)[0]
    if packet(op) in PRODUCTS:
        return isinstance(op.args[1], Node) and constant(op.args[1])
    return packet(op) in (aten.linear, aten.addmm) and not op.kwargs


def split_bias(node: Node) -> tuple[Node, str | None]:
    """The product that `node` is, and the name of the bias that is added to it."""
    product, bias = node, None
    if packet(node) is aten.linear:
        bias = (*node.args, None)[2]
    elif packet(node) is aten.addmm:
        bias = node.args[0]
    elif packet(node) is aten.add and not node.kwargs:
        for x, b in (node.args[:2], node.args[1::-1]):
            if isinstance(x, Node) and isinstance(b, Node) and b.op == "get_attr":
                while packet(x) in RESHAPES and _last(x) == _last(x.all_input_nodes[0]):
                    x = x.all_input_nodes[0]
                if packet(x) in PRODUCTS and b.meta["val"].shape == (_last(x),):
                    product, bias = x, b
    return product, str(bias.target) if isinstance(bias, Node) else None


def _last(node: Node) -> int:
    return int(node.meta["val"].shape[-1])


def weight_of(product: Node) -> tuple[str, bool]:
    """The name of the weight of `product`, and whether it is [in, out]."""
    weight = product.args[2 if packet(product) is aten.addmm else 1]
    transposed = packet(product) is not aten.linear
    while isinstance(weight, Node) and weight.op != "get_attr":
        if packet(weight) in (aten.t, aten.transpose, aten.permute):
            transposed = not transposed
        elif packet(weight) not in CASTS | {aten.alias, aten.clone, aten.detach}:
            raise _Stop(product, f"the weight of '{product.name}' is computed by '{weight.name}'")
        weight = weight.all_input_nodes[0]
    assert isinstance(weight, Node)
    return str(weight.target), transposed
