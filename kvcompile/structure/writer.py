"""New nodes of a captured graph, with the values that analyses read, and new buffers of it."""

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg


class Writer:
    """Writes nodes that are said to come from the line of the model that `like` comes from."""

    def __init__(self, gm: GraphModule, like: Node) -> None:
        self.gm, self.like = gm, like
        self.mode = like.meta["val"].fake_mode

    def call(self, target: Any, *args: Any) -> Node:
        """A call, where the graph inserts nodes."""
        node = self.gm.graph.call_function(target, args)
        with self.mode:
            node.meta = {**self.like.meta,
                         "val": target(*map_arg(args, lambda n: n.meta["val"]))}
        return node

    def tensor(self, name: str) -> Tensor:
        """The values of a parameter or buffer."""
        value: Any = self.gm
        for part in name.split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value.detach()

    def attribute(self, name: str) -> Node:
        """A parameter or buffer as a node."""
        node = self.gm.graph.get_attr(name)
        node.meta = {"val": self.mode.from_tensor(self.tensor(name), static_shapes=True)}
        return node

    def buffer(self, name: str, value: Tensor, derived: tuple[str, ...] = ()) -> Node:
        """A new buffer; `derived` are the parameters (or buffers made of some) that its values were
        computed from."""
        known = self.gm.meta.setdefault("derived", {})
        derived = tuple(dict.fromkeys(x for n in derived for x in known.get(n, (n,))))
        number, stem = 0, name
        while hasattr(self.gm, name):
            name, number = f"{stem}_{number + 1}", number + 1
        self.gm.register_buffer(name, value.contiguous(), persistent=False)
        node = self.attribute(name)
        known[name] = node.meta["derived"] = derived
        return node
