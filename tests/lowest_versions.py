"""Print the oldest versions that pyproject.toml allows, one requirement per line.

`make lowest` installs them. Torch is left out: which build of it fits a machine is decided there.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    name, version = re.fullmatch(r"([a-z0-9-]+)>=([\d.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={version}")
