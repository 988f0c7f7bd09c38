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
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


@contextmanager
def progress(what: str) -> Iterator[None]:
    """A line on stderr while something takes its time; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
