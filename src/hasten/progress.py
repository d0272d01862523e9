"""Bars for work called from Python: one line in a notebook or a terminal, none in a pipe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with what is happening, how much of it is done, and of how much."""


def bar(stage: str, total: int | None, *, wanted: bool = True) -> Any:
    """A progress bar of tqdm, which is removed when it is closed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses a package in some notebooks
        from tqdm.auto import tqdm

    notebook = type(sys.stderr).__module__.startswith("ipykernel")
    return tqdm(
        desc=stage,
        total=total,
        disable=not (wanted and (notebook or sys.stderr.isatty())),
        leave=False,
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}",
    )


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """What to call with progress: the caller's function, or else one that moves a bar."""
    if progress is not None:
        yield progress
        return
    with bar("starting", None) as line:

        def show(stage: str, done: int, total: int) -> None:
            line.n, line.total = done, total
            line.set_description_str(stage)

        yield show
