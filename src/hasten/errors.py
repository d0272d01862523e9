"""Every error `hasten` raises on purpose.

HastenError                 base: one message, one fix
├── RecipeError             a recipe is not valid: unknown key, bad value, impossible combination
├── InputError              a file, directory, prompt set or option is not usable
├── UnsupportedError        valid, but this machine, model or library version cannot do it
├── ModelError              a model cannot be found, read or recognised
├── EngineError             an engine could not be exported, verified, built or run
├── AlreadyOptimizedError   the pipeline (or the transformer it shares) is optimised already
└── CallError               an optimised pipeline was driven in a way that cannot be followed

An error carries its faults, one line each, and one fix. The command line prints exactly these
lines; from Python `str(error)` is the same text. `Faults` gathers errors of bad input, so that a
user sees all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

__all__ = [
    "AlreadyOptimizedError",
    "CallError",
    "EngineError",
    "Faults",
    "HastenError",
    "InputError",
    "ModelError",
    "RecipeError",
    "UnsupportedError",
    "join_fixes",
]


class HastenError(Exception):
    """Base of all of them: `faults` (one line each) and `fix` (one line, may be empty)."""

    exit_code = 1

    def __init__(self, faults: str | Sequence[str], fix: str = "") -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        self.fix = fix
        super().__init__("\n".join([*self.faults, *([f"fix: {fix}"] if fix else [])]))

    def __reduce__(self) -> tuple[type[HastenError], tuple[tuple[str, ...], str]]:
        return type(self), (self.faults, self.fix)


class RecipeError(HastenError):
    """The recipe itself is wrong; every fault is listed at once."""

    exit_code = 2


class InputError(HastenError):
    """A path, file or option value cannot be used; nothing was written."""

    exit_code = 2


class UnsupportedError(HastenError):
    """The recipe is valid but cannot run here; the fix names the nearest recipe that works."""


class ModelError(HastenError):
    """The model cannot be found, is incomplete, is gated, or is of no known family."""


class EngineError(HastenError):
    """A stage on the way to an engine failed, or a call does not fit the engine. No half-written
    file is left; the next run goes on from the last finished stage."""


class AlreadyOptimizedError(HastenError):
    """The pipeline is optimised already; restore it first."""


class CallError(HastenError):
    """The transformer was called in an order or with shapes the step cache cannot follow."""


class Faults:
    """What is wrong so far. `gather()` notes an error of the block and goes on behind it."""

    def __init__(self) -> None:
        self.errors: list[HastenError] = []

    def add(self, fault: str, fix: str) -> None:
        self.errors.append(InputError(fault, fix))

    @contextmanager
    def gather(self) -> Iterator[None]:
        try:
            yield
        except HastenError as error:
            self.errors.append(error)

    def raise_any(self) -> None:
        """A lone error as it was; several as one InputError, each line of theirs once."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            faults = dict.fromkeys(fault for error in self.errors for fault in error.faults)
            raise InputError(list(faults), join_fixes(error.fix for error in self.errors))


def join_fixes(fixes: Iterable[str]) -> str:
    """Several fixes as one line, none of them twice."""
    return "; ".join(dict.fromkeys(fix for fix in fixes if fix))
