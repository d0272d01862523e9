"""The `hasten` command. Thin: every command imports what it needs when it runs."""

from __future__ import annotations

from hasten.cli.app import main

__all__ = ["main"]
