"""Graph modules whose Python is written when they are first called.

A graph is copied after every pass and changed in between; torch.fx would write and compile the
text of each of them, which took a quarter of `optimize`.
"""

from typing import Any

from torch.fx import GraphModule
from torch.fx.graph import PythonCode


class LazyGraphModule(GraphModule):
    """A GraphModule whose `recompile` only forgets; `code` and `forward` write the Python."""

    def recompile(self) -> PythonCode:
        own: Any = type(self)  # torch.fx gives every graph module a class of its own
        if "forward" in vars(own):
            del own.forward
        self.__dict__.pop("_code", None)
        return PythonCode("", {}, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().recompile()
        return self.forward(*args, **kwargs)

    @property
    def code(self) -> str:
        if "_code" not in self.__dict__:
            super().recompile()
        return super().code
