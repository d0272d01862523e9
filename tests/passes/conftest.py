"""What the tests of several passes share."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and counted, and run as they are: generating code takes most of the
    time, and what only counts compilations needs none."""
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda graph, _inputs, **_options: graph.forward
    )
