"""What commands print: lines and tables on stdout, progress on stderr.

Whatever text of a file is among it, no control character reaches the terminal. Progress is a bar
where stderr is a terminal; lines about what takes minutes are printed everywhere.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Self

from hasten.errors import printable

UNLIMITED = 2**20  # columns of text: no table is as wide


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


def print_text(text: str) -> None:
    """Lines on stdout."""
    for line in text.splitlines():
        print(printable(line))


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
        self._what = ""
        self._total: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:  # rich before 14.3 would print an empty line into a pipe
            self._bar.stop()

    def stage(self, what: str, total: int | None = None) -> None:
        """Begin another stage of `total` units; None where their number is not known."""
        what = printable(what)
        self._bar.start()
        self._bar.reset(self._task, description=what, total=total)
        self._what, self._total = what, total

    def at(self, done: int) -> None:
        """`done` units of the stage are finished."""
        self.show(self._what, done, self._total)

    def show(self, what: str, done: int, total: int | None) -> None:
        """Stage, units done and their number in one call, as `hasten.bench` reports them."""
        self._bar.start()
        text = printable(f"{what} {done}/{total}" if total else what)
        self._bar.update(self._task, description=text, completed=done, total=total)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> None:
    """Print rows of text on stdout: fitted to a terminal, else aligned and never wrapped.

    Args:
        head: The titles of the columns.
        rows: The cells of each row.
        right: One letter per column: `r` aligns it to the right.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    fitted = sys.stdout.isatty()
    table = Table(box=SIMPLE_HEAD if fitted else None, pad_edge=False, header_style="bold")
    for title, side in zip(head, right.ljust(len(head)), strict=True):
        table.add_column(Text(title), justify="right" if side == "r" else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text(printable(cell)) for cell in row])
    console = Console(width=None if fitted else UNLIMITED)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())
