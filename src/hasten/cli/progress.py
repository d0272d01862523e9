"""Progress on stderr: a bar where that is a terminal, lines for what takes minutes everywhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self


def silence_library_bars() -> None:
    """No bars of the libraries' own, which they also draw into pipes and below ours."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def print_line(line: str) -> None:
    """One line that stays, on stderr, whether it is a terminal or not; above a bar."""
    print(line, file=sys.stderr, flush=True)


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._bar.disable:  # rich before 14.3 would print an empty line into a pipe
            self._bar.stop()

    def stage(self, what: str, total: int | None = None) -> None:
        """Begin another stage of `total` units; None where their number is not known."""
        self._bar.start()
        self._bar.reset(self._task, description=what, total=total)
        self._what, self._total = what, total

    def at(self, done: int) -> None:
        """`done` units of the stage are finished."""
        self.show(self._what, done, self._total)

    def show(self, what: str, done: int, total: int | None) -> None:
        """Stage, units done and their number in one call, as `hasten.bench` reports them."""
        self._bar.start()
        text = f"{what} {done}/{total}" if total else what
        self._bar.update(self._task, description=text, completed=done, total=total)
