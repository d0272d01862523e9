"""The base of all errors, and faults gathered over several looks at the input."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import (
    EngineError,
    Faults,
    HastenError,
    InputError,
    ModelError,
    RecipeError,
    UnsupportedError,
    join_fixes,
    one_line,
    unsupported,
)


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
    assert caught.value.fix == "mend a"


def several() -> HastenError:
    """Two faults with one fix, around one with another."""
    faults = Faults()
    for fault, fix in (("a", "mend a"), ("b", "mend b"), ("c", "mend a"), ("d", "")):
        faults.add(fault, fix)
    with pytest.raises(InputError) as caught:
        faults.raise_any()
    return caught.value


def test_each_fault_keeps_its_own_fix() -> None:
    error = several()
    assert str(error) == "a\nc\nfix: mend a\nb\nfix: mend b\nd"
    assert error.faults == ("a", "c", "b", "d")
    assert error.fix == "mend a; mend b"
    outer = Faults()
    outer.add("b", "mend b")
    outer.errors.append(error)
    with pytest.raises(InputError) as caught:
        outer.raise_any()
    assert str(caught.value) == "b\nfix: mend b\na\nc\nfix: mend a\nd"


def test_an_error_goes_from_one_process_to_another() -> None:
    error = pickle.loads(pickle.dumps(several()))
    assert (type(error), str(error)) == (InputError, str(several()))
    assert error.parts == several().parts


@pytest.mark.parametrize(
    ("kinds", "kind"),
    [
        ((UnsupportedError, UnsupportedError), UnsupportedError),
        ((UnsupportedError, EngineError), UnsupportedError),
        ((UnsupportedError, InputError), InputError),
        ((RecipeError, ModelError), InputError),
    ],
)
def test_several_are_bad_input_where_one_is(
    kinds: tuple[type[HastenError], ...], kind: type[HastenError]
) -> None:
    faults = Faults()
    faults.errors += [each(f"{each.__name__} {n}") for n, each in enumerate(kinds)]
    with pytest.raises(HastenError) as caught:
        faults.raise_any()
    assert type(caught.value) is kind


def test_other_exceptions_pass() -> None:
    with pytest.raises(ZeroDivisionError), Faults().gather():
        raise ZeroDivisionError


def test_fixes_are_joined_without_repeats_and_empty_ones() -> None:
    assert join_fixes(["a", "", "b", "a"]) == "a; b"
    assert join_fixes([]) == ""


@given(st.text(), st.integers(20, 400))
def test_one_line_fits_and_is_printable(text: str, longest: int) -> None:
    line = one_line(text, longest)
    assert line.isprintable()
    assert len(line) <= longest
    assert one_line(line, longest) == line


def test_an_error_has_no_control_characters_and_no_endless_lines() -> None:
    error = RecipeError(["a\x1b[2Jb", "c\n" * 1000], "d\0" + "e" * 5000)
    assert error.faults[0] == "a [2Jb"
    assert all(line.isprintable() for line in str(error).splitlines())
    assert [len(line) for line in str(error).splitlines()] == [6, 399, 1005]
    both = unsupported([("x\r" * 500, "y"), ("z\x1b", "y")])
    assert all(len(line) <= 400 and line.isprintable() for line in both.faults)
    assert both.parts[0].faults == both.faults
