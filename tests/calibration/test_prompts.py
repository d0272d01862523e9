"""A schedule is not scored on what taught it."""

from __future__ import annotations

import pytest

from hasten.prompts import prompt_hash, read_prompts
from hasten.schedules import shipped


@pytest.mark.parametrize("name", ["tiny", "general"])
def test_the_default_prompts_of_calibrate_and_bench_are_disjoint(name: str) -> None:
    learned = {prompt.casefold() for prompt in read_prompts(f"{name}-calibration")}
    assert len(learned) == 48
    assert learned.isdisjoint(prompt.casefold() for prompt in read_prompts(name))


def test_shipped_schedules_name_their_prompts() -> None:
    """The first 48 of the bundled set, as studies/README.md says; its table is of the last 50."""
    tiny = [prompt_hash(prompt) for prompt in read_prompts("tiny")]
    of_models = [schedule for schedule in shipped() if schedule.fingerprint is not None]
    assert len(of_models) == 8
    for schedule in of_models:
        assert schedule.prompts == tuple(tiny[:48])
        assert set(schedule.prompts).isdisjoint(tiny[-50:])
