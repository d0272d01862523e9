"""What commands print: lines and tables on stdout, progress on stderr.

Whatever text of a file is among it, no control character reaches the terminal. Text for a terminal
is broken between words, text for a pipe is not broken, unless COLUMNS gives a width. Progress is a
bar where stderr is a terminal; lines about what takes minutes are printed everywhere.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, Self, TextIO

from hasten.errors import printable

UNLIMITED = 2**20  # columns of text: no table is as wide
READABLE = 24  # columns of text that sentences in a table need


def prepare_streams() -> None:
    """Make stdout and stderr take any text, whatever they are.

    What a code page or ASCII cannot show is written as an escape. A closed stream, and its file
    number, become the null device's: else the next file that is opened would get the output.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_stdout(*, only_if_unwritable: bool = False) -> None:
    """Drop what could not be written, so that Python does not try again when it exits."""
    if only_if_unwritable:
        try:
            sys.stdout.flush()
            return
        except OSError:
            pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def columns_of(stream: TextIO) -> int:
    """How wide text on this stream may be. In a pipe, an error always stays one line."""
    limited = stream.isatty() or (stream is sys.stdout and os.environ.get("COLUMNS", "").isdigit())
    return shutil.get_terminal_size().columns if limited else UNLIMITED


def print_text(text: str, *, error: bool = False) -> None:
    """Lines on stdout, or on stderr; a line that is broken goes on below its indentation."""
    stream = sys.stderr if error else sys.stdout
    width = columns_of(stream)
    for line in map(printable, text.splitlines()):
        if len(line) <= width:
            print(line, file=stream)
            continue
        broken = textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * (len(line) - len(line.lstrip())),
            break_long_words=False,
            break_on_hyphens=False,
        )
        print(*broken, sep="\n", file=stream)


def silence_library_bars() -> None:
    """No bars of the libraries' own, which they also draw into pipes and below ours."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def print_line(line: str) -> None:
    """One line that stays, on stderr, whether it is a terminal or not; above a bar."""
    print(printable(line), file=sys.stderr, flush=True)


class ProgressBar:
    """One line that changes: what is happening, how far it is, how long it took so far.

    It appears with its first stage.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=None)
        self._stage = ""
        self._total: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:  # rich before 14.3 would print an empty line into a pipe
            self._bar.stop()

    def stage(self, stage: str, total: int | None = None) -> None:
        """Begin another stage of `total` units; None where their number is not known."""
        stage = printable(stage)
        self._bar.start()
        self._bar.reset(self._task, description=stage, total=total)
        self._stage, self._total = stage, total

    def at(self, done: int) -> None:
        """`done` units of the stage are finished."""
        self.show(self._stage, done, self._total)

    def show(self, stage: str, done: int, total: int | None) -> None:
        """Stage, units done and their number in one call, as `hasten.bench` reports them."""
        self._bar.start()
        text = printable(f"{stage} {done}/{total}" if total else stage)
        self._bar.update(self._task, description=text, completed=done, total=total)


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: str = "",
    drop: Sequence[str] = (),
) -> list[str]:
    """Print rows of text on stdout, as wide as `columns_of` it, broken between words.

    Args:
        head: The titles of the columns.
        rows: The cells of each row.
        right: One letter per column: `r` aligns it to the right, and its cells are not broken.
        drop: Titles of the columns that are left out where there is no room, the first one first.

    Returns:
        The titles of the columns that were left out.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    fitted = sys.stdout.isatty()
    gap, width = 3 if fitted else 2, columns_of(sys.stdout)
    columns = {
        title: _Column(title, [printable(row[place]) for row in rows], right[place : place + 1])
        for place, title in enumerate(head)
    }
    dropped: list[str] = []
    for title in drop:
        needed = sum(column.needed(title in drop) + gap for title, column in columns.items())
        if needed - gap > width:
            dropped.append(title)
            del columns[title]
    shown = list(columns.values())
    widths = _widths(shown, width - gap * (len(shown) - 1))
    box = SIMPLE_HEAD if fitted else None
    table = Table(box=box, show_edge=False, pad_edge=False, header_style="bold")
    for column, cells in zip(shown, widths, strict=True):
        side: Any = "right" if column.right else "left"
        heading = Text(column.title)
        table.add_column(heading, justify=side, overflow="fold", min_width=cells, max_width=cells)
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*map(Text, row))
    console = Console(width=UNLIMITED, height=25)  # with both, dumb terminals too take this width
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())
    return dropped


class _Column:
    """A column's text, and how many cells of a terminal it takes at the least and at the most."""

    def __init__(self, title: str, cells: list[str], right: str) -> None:
        from rich.cells import cell_len

        self.title, self.cells, self.right = title, cells, right == "r"
        words = [title, *cells] if not self.right else [title]
        whole = cells if self.right else []
        self.least = max(map(cell_len, [*" ".join(words).split(), *whole, ""]))
        self.most = max(map(cell_len, [title, *cells]))

    def needed(self, droppable: bool) -> int:
        """Cells without which it is better left out, where it can be."""
        return max(self.least, min(self.most, READABLE)) if droppable else self.least


def _widths(columns: Sequence[_Column], room: int) -> list[int]:
    """The columns' widths: the widest one is narrowed first, and below its longest word last."""
    widths = [column.most for column in columns]
    for least in ([column.least for column in columns], [1] * len(columns)):
        while sum(widths) > room and widths != least:
            spare = [width if width > low else 0 for width, low in zip(widths, least, strict=True)]
            widths[spare.index(max(spare))] -= 1
    return widths
