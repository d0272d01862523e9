"""Conflicts are found before anything is touched, all of them at once, each with its fix."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import FluxImg2ImgPipeline

import hasten
from hasten.check import check, problems
from hasten.errors import Problem, UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.machine import Machine, machine
from hasten.models.fingerprint import fingerprint
from hasten.recipe import Recipe, resolve


class NoCompiler:
    """A machine with nothing to compile with."""

    def compile_problem(self, device_type: str) -> Problem:
        return Problem("no C++ compiler", "apt-get install g++ python3-dev")


class Capable:
    """A machine on which every compilation works."""

    def compile_problem(self, device_type: str) -> None:
        return None


BOTH = Recipe.from_dict({"compile": {}, "cache": {}, "offload": {"kind": "model"}})


def test_no_problem_on_a_capable_machine() -> None:
    assert problems(BOTH, Capable(), "cuda") == []  # type: ignore[arg-type]


def test_each_problem_has_its_fix_and_names_a_recipe_that_works() -> None:
    found = problems(BOTH, NoCompiler(), "cpu")  # type: ignore[arg-type]
    assert [problem.fault.split()[0] for problem in found] == ["no", "offload.kind"]
    assert "g++" in found[0].fix
    assert "'cache'" in found[0].fix


def test_check_raises_all_problems_at_once(pipe: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check(BOTH, pipe, FLUX1, NoCompiler())  # type: ignore[arg-type]
    assert len(caught.value.faults) == 2


def test_compiled_blocks_are_not_compiled_again(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].compile()
    with pytest.raises(UnsupportedError, match="already compiled"):
        check(resolve("compile"), pipe, FLUX1, Capable())  # type: ignore[arg-type]


def test_a_scheduler_that_does_not_know_its_step_cannot_be_cached(pipe: Any) -> None:
    class Stepless:
        pass

    pipe.scheduler = Stepless()
    with pytest.raises(UnsupportedError, match="no step_index or no sigmas"):
        check(resolve("cache"), pipe, FLUX1, Capable())  # type: ignore[arg-type]


def test_presets_that_need_no_compiler_work_on_this_machine() -> None:
    here: Machine = machine()
    for name in ("baseline", "cache", "fewer-steps"):
        assert problems(resolve(name), here, "cpu") == []


def test_a_schedule_of_another_model_is_refused_unless_forced(pipe: Any) -> None:
    schedule = {"kind": "schedule", "steps": 4, "compute": [0, 2], "fingerprint": "0" * 16}
    recipe = Recipe.from_dict({"cache": schedule})
    with pytest.raises(UnsupportedError, match="learned on another model") as caught:
        hasten.optimize(pipe, recipe)
    assert "--force" in caught.value.fix
    assert "force=True" in caught.value.fix
    fast = hasten.optimize(pipe, recipe, force=True)
    twin = fast.from_pipe(FluxImg2ImgPipeline)
    for forced in (fast, twin):
        assert "schedule learned on another model, used by force" in forced.notes
        assert "note: schedule learned on another model, used by force" in forced.summary()
        assert "calibrated: false" in forced.summary()
        assert forced.calibrated is False
    fast.restore()
    assert not any("force" in note for note in fast.notes)
    own = Recipe.from_dict({"cache": {**schedule, "fingerprint": fingerprint(pipe.transformer)}})
    fast = hasten.optimize(pipe, own, force=True)
    assert fast.calibrated is True
    assert not any("force" in note for note in fast.notes), "force was given and not needed"
