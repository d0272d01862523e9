"""The base of all errors, and faults gathered over several looks at the input."""

from __future__ import annotations

import pytest

from hasten.errors import Faults, InputError, RecipeError, join_fixes


def test_nothing_wrong_raises_nothing() -> None:
    Faults().raise_any()


def test_one_error_keeps_its_kind_and_several_become_one_without_repeats() -> None:
    faults = Faults()
    with faults.gather():
        raise RecipeError(["a", "b"], "mend a")
    with pytest.raises(RecipeError):
        faults.raise_any()
    faults.add("b", "mend b")
    faults.add("c", "mend a")
    with pytest.raises(InputError) as caught:
        faults.raise_any()
    assert caught.value.faults == ("a", "b", "c")
    assert caught.value.fix == "mend a; mend b"


def test_other_exceptions_pass() -> None:
    with pytest.raises(ZeroDivisionError), Faults().gather():
        raise ZeroDivisionError


def test_fixes_are_joined_without_repeats_and_empty_ones() -> None:
    assert join_fixes(["a", "", "b", "a"]) == "a; b"
    assert join_fixes([]) == ""
