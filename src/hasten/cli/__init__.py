"""The `hasten` command. Thin: every command imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hasten.process import terminable

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 ok, 1 failure, 2 bad usage or bad input, 130 for
    Ctrl-C or SIGTERM, also while the commands themselves are imported."""
    try:
        with terminable():
            from hasten.cli.app import run

            return run(arguments)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
