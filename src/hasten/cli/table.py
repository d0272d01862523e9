"""Tables on stdout: fitted to a terminal, plain aligned text (never wrapped) when piped."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> None:
    """Print rows of text. `right` has one letter a column: `r` aligns it to the right."""
    right = right.ljust(len(head))
    if sys.stdout.isatty():
        _print_fitted(head, rows, right)
        return
    for line in [head, *rows]:
        cells = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(line, _widths(head, rows), right, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _widths(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(head, *rows, strict=True)]


def _print_fitted(head: Sequence[str], rows: Sequence[Sequence[str]], right: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title, side in zip(head, right, strict=True):
        table.add_column(Text(title), justify="right" if side == "r" else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    Console().print(table)
