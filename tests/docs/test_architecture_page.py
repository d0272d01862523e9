"""The picture of a step shows the chain's real order."""

from __future__ import annotations

import re
from pathlib import Path

from hasten.step.chain import ORDER

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_the_picture_shows_the_layers_in_their_order() -> None:
    arrows = re.findall(r"^    (\w+)(?:\[.*?\])? -->(?:\|.*?\|)? (\w+)", PAGE, re.M)
    path, following = ["chain"], dict(reversed(arrows))
    while path[-1] != "forward":
        path.append(following[path[-1]])
    assert tuple(path[1:-1]) == ORDER


def test_the_table_names_every_layer_and_real_files() -> None:
    rows = re.findall(r"^\| (\w+) \| (.*?) \|", PAGE, re.M)
    assert tuple(name for name, _ in rows if name != "layer") == ORDER
    for path in re.findall(r"`((?:step|passes)/[\w/]+\.py)`", PAGE):
        assert (ROOT / "src" / "hasten" / path).is_file(), path
