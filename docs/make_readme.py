"""Write the table of presets into README.md, from the results: `python docs/make_readme.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- presets -->\n).*?(<!-- end of presets -->)", re.DOTALL)


def with_table(readme: str) -> str:
    """The README with the table that the results give."""
    sys.path.insert(0, str(ROOT))
    from docs.figures import fastest_presets

    return TABLE.sub(lambda match: f"{match[1]}{fastest_presets()}\n{match[2]}", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text("utf-8")), "utf-8")
