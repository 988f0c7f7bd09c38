"""What lies between two attentions of a graph that runs eagerly, compiled once for layers alike.

The rest of a layer and the beginning of the next one (projections, norms, rotations, the MLP) are a
score of operators, each of which reads and writes every token. Inductor makes a few loops of them
around the matrix products. That takes seconds, so that short calls run torch's operators.
"""

import logging
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from kvcompile.backend.inductor import compile_graph
from kvcompile.backend.regions import Stretch, alike
from kvcompile.ir import ATTEND, ATTENTION, BESIDE
from kvcompile.rewrite import copy_graph

log = logging.getLogger(__name__)

MANY = 1024  # tokens of a call, of all its rows together, from which on compiling is worth it
EXAMPLE = (7, 1021)  # rows and tokens of the example that is compiled for; both may vary
SIZE = torch.ops.aten.sym_size.int
Shape = list[Any]  # numbers, and sympy expressions of the sizes that vary


def between(gm: GraphModule) -> list["Between"]:
    """Put, in place, calls of `Between.run` where stretches of `gm` are that others equal."""
    op = ATTENTION if any(n.target is ATTENTION for n in gm.graph.nodes) else ATTEND
    symbols, found = _symbols(gm.graph), list[Between]()
    for stretches in alike(gm.graph, op, without=(ATTENTION, ATTEND, BESIDE)):
        made = _between(stretches[0], symbols)
        if made is None:
            log.info("what lies between attentions of %d layers runs as torch's operators: its "
                     "sizes are not of rows and tokens alone", len(stretches))
            continue
        found.append(made)
        for stretch in stretches:
            given = tuple(stretch.given[i] for i in made.needs)
            with gm.graph.inserting_before(stretch.nodes[-1]):
                stretch.replace(gm.graph.call_function(made.run, given))
    gm.graph.lint()
    return found


def covered(gm: GraphModule) -> tuple[int, int]:
    """(how many places between two attentions `between` compiles, how many there are)."""
    gm = copy_graph(gm)
    runs = {made.run for made in between(gm)}
    attentions = sum(n.target in (ATTENTION, ATTEND) for n in gm.graph.nodes)
    return sum(n.target in runs for n in gm.graph.nodes), max(attentions - 1, 0)


def laid(x: Tensor) -> Tensor:
    """x [B, .., S, ..] laid out as its dims are or with dims 1 and 2 exchanged (heads and tokens),
    whichever it is or else the first."""
    exchanged = x.dim() > 2 and x.transpose(1, 2).is_contiguous()
    return x if exchanged or x.is_contiguous() else x.contiguous()


class Between:
    """A stretch for any number of rows and tokens.

    `shapes` are those of what it is given, `sizes` two places of theirs where the numbers of rows
    and of tokens stand, `needs` which of `Stretch.given` it is given.
    """

    def __init__(self, gm: GraphModule, shapes: list[Shape], symbols: dict[sympy.Expr, int],
                 sizes: tuple[tuple[int, int], ...], needs: list[int]) -> None:
        self.gm, self.shapes, self.symbols = gm, shapes, symbols
        self.sizes, self.needs = sizes, needs
        self.fixed = [all(isinstance(n, int) for n in shape) for shape in shapes]
        self._compiled: dict[tuple, Callable] = {}

    def run(self, *given: Tensor) -> Any:
        """What is taken from the stretch."""
        rows, tokens = (given[i].shape[d] for i, d in self.sizes)
        if rows * tokens < MANY or any(x.device.type != "cpu" for x in given):
            return self.gm(*given)
        given = tuple(x if fixed else laid(x) for x, fixed in zip(given, self.fixed, strict=True))
        key = (rows > 1, *(x.stride() if fixed else x.is_contiguous()
                           for x, fixed in zip(given, self.fixed, strict=True)))
        if key not in self._compiled:
            log.info("compiling what lies between attentions for batch %s",
                     "> 1" if rows > 1 else "1")
            self._compiled[key] = self._compile(given, EXAMPLE[0] if rows > 1 else 1)
        return self._compiled[key](*given)

    def _compile(self, given: tuple[Tensor, ...], rows: int) -> Callable:
        values = {size: (rows, EXAMPLE[1])[d] for size, d in self.symbols.items()}
        inputs, dynamic = list[Tensor](), list[list[int]]()
        for x, shape, fixed in zip(given, self.shapes, self.fixed, strict=True):
            sizes = [int(sympy.sympify(n).subs(values)) for n in shape]
            if fixed:
                inputs.append(torch.empty_strided(sizes, x.stride(), dtype=x.dtype))
            elif x.is_contiguous():
                inputs.append(torch.empty(sizes, dtype=x.dtype))
            else:
                sizes[1], sizes[2] = sizes[2], sizes[1]
                inputs.append(torch.empty(sizes, dtype=x.dtype).transpose(1, 2))
            dynamic.append([d for d, n in enumerate(shape)
                            if not isinstance(n, int) and inputs[-1].shape[d] > 1])
        return compile_graph(copy_graph(self.gm), inputs, dynamic)


def _symbols(graph: Graph) -> dict[sympy.Expr, int]:
    """The sizes of token ids, positions and `valid`, [B, S], that are symbols: 0 for B, 1 for S."""
    shapes = (n.meta["val"].shape for n in graph.nodes if n.op == "placeholder" and "val" in n.meta)
    return {size.node.expr: d for shape in shapes if len(shape) == 2
            for d, size in enumerate(shape) if isinstance(size, torch.SymInt)}


def _between(stretch: Stretch, symbols: dict[sympy.Expr, int]) -> Between | None:
    """None where the sizes of what is given are of more than rows and tokens, or those two cannot
    be read off tensors that are computed."""
    gm, given = stretch.module(), stretch.given
    if not all(isinstance(n.meta.get("val"), Tensor) for n in given):
        return None
    shapes = [[n.node.expr if isinstance(n, torch.SymInt) else n for n in node.meta["val"].shape]
              for node in given]
    free = {s for shape in shapes for n in shape if not isinstance(n, int) for s in n.free_symbols}
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    known = {size: (i, d) for i, shape in enumerate(shapes) if given[i].op == "call_function"
             for d, size in enumerate(shape) if size in symbols}
    if not free <= symbols.keys() or {symbols[size] for size in known} != {0, 1}:
        return None
    for node in gm.graph.nodes:
        size = node.meta["val"].node.expr if node.target is SIZE else None
        if size in known:  # from what is computed: the graph's own inputs may be left out
            i, d = known[size]
            node.args = (inputs[i], d)
    needs = [i for i, node in enumerate(inputs) if node.users]
    for node in inputs:
        if not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    places = {symbols[size]: (needs.index(i), d) for size, (i, d) in known.items()}
    return Between(gm, [shapes[i] for i in needs], symbols, (places[0], places[1]), needs)
