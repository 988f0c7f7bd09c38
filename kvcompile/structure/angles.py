"""Cosines and sines for the tokens that are stored: what a graph computes from positions, again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from kvcompile.ir import argument
from kvcompile.structure.movement import origin

NAME = "positions_by_number"
SIZE = torch.ops.aten.sym_size.int


class Angles:
    """Copies what lies between positions [B, S] and a table on a new input [B, N] of positions."""

    def __init__(self, graph: Graph, attention: Sequence[Node]) -> None:
        self.graph = graph
        self.positions = {origin(argument(n, "positions")) for n in attention}
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        with graph.inserting_after(inputs[-1]):
            self.input = graph.placeholder(NAME)
        self.columns = [n for n in inputs if len(getattr(n.meta.get("val"), "shape", ())) == 2]
        self.copies: dict[Node, Node] = {n: self.input for n in self.positions}

    def by_number(self, table: Node) -> Node:
        """`table` for the tokens of every number; to be called where its copy may stand."""
        if table not in self.copies:
            self.copies[table] = table
            if table.target is SIZE and table.args[0] in self.columns and table.args[1] == 1:
                self.copies[table] = self.graph.call_function(SIZE, (self.input, 1))
            elif table.op == "call_function":
                args: Any = map_arg(table.args, self.by_number)
                kwargs: Any = map_arg(table.kwargs, self.by_number)
                if (args, kwargs) != (table.args, table.kwargs):
                    target: Any = table.target
                    self.copies[table] = self.graph.call_function(target, args, kwargs)
        return self.copies[table]
