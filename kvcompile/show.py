"""What people see: tables as plain text of one width, and progress where a terminal shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

from rich.console import Console, RenderableType

WIDTH = 100


def as_text(thing: RenderableType, width: int = WIDTH) -> str:
    """`thing` as lines without colour, the same in every terminal."""
    out = StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(thing)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


@contextmanager
def progress(what: str, unless: bool = False) -> Iterator[None]:
    """`what` on stderr while it takes its time; nothing if stderr is no terminal, or `unless`."""
    console = Console(stderr=True)
    if unless or not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
