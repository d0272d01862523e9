"""The README is short, begins with FLUX.1-dev, and its links hold. What runs it: docs/."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text("utf-8")


def test_a_pipeline_of_flux_1_dev_is_optimised_in_the_first_twenty_lines() -> None:
    first = "\n".join(TEXT.splitlines()[:20])
    (code,) = re.findall(r"```python\n(.*?)```", first, re.DOTALL)
    assert "black-forest-labs/FLUX.1-dev" in code
    assert "hasten.optimize(" in code
    assert len(code.splitlines()) < 10


def test_it_is_short() -> None:
    assert len(TEXT.split()) <= 1000
    assert len(TEXT.splitlines()) <= 110


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text("utf-8"))
    assert links
    for link in links:
        assert link.startswith("https://") or (README.parent / link).exists(), link
