"""The results file: whole after every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Store"]

SCHEMA = 1


class Store:
    """`header` says what is measured where."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header

    def save(self, rows: list[dict[str, Any]], seconds: float, *, finished: bool) -> None:
        """Write all there is; a run that is cut off leaves the last whole file."""
        state = {"finished": finished, "seconds": round(seconds, 1), "rows": rows}
        data = {"schema": SCHEMA, **self.header, **state}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(data, indent=1, default=str) + "\n", "utf-8")
        temporary.replace(self.path)
