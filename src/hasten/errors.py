"""Every error that `hasten` raises on purpose.

HastenError                 base class: a message and a fix
├── RecipeError             a recipe is not valid: unknown key, bad value, impossible combination
├── InputError              a file, directory, prompt set or option is not usable
├── UnsupportedError        valid, but this machine, model or library version cannot do it
├── ModelError              a model cannot be found, read or recognised
├── EngineError             an engine could not be exported, verified, built or run
├── AlreadyOptimizedError   the pipeline (or the transformer it shares) is already optimised
└── CallError               an optimised pipeline was called in an unsupported order or shape

An error has one or more faults, one line each, and a fix. The command line prints exactly these
lines, and `str(error)` is the same text. A fault is at most 400 characters long and a fix at most
1,000. Neither has control characters, even where it quotes a file or a library. `Faults` gathers
errors, so that a user sees all of them at once, each with its own fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

LONGEST_FAULT, LONGEST_FIX = 400, 1000


class Problem(NamedTuple):
    """Why something cannot work here (`fault`) and what to do about it (`fix`), one line each."""

    fault: str
    fix: str


class Part(NamedTuple):
    """Faults that share a fix."""

    faults: tuple[str, ...]
    fix: str

    def lines(self, prefix: str = "") -> list[str]:
        """The lines to print: each fault after `prefix`, then the fix if there is one."""
        lines = [f"{prefix}{fault}" for fault in self.faults]
        return [*lines, f"fix: {self.fix}"] if self.fix else lines


class HastenError(Exception):
    """Base class of all errors of hasten.

    Attributes:
        faults: What is wrong, one line per fault.
        fix: What to do about it, one line; may be empty.
        parts: The faults grouped by fix; more than one part where errors were gathered.
        exit_code: Exit status of the command line.
    """

    exit_code = 1

    def __init__(
        self, faults: str | Sequence[str], fix: str = "", *, parts: Sequence[Part] = ()
    ) -> None:
        faults = (faults,) if isinstance(faults, str) else tuple(faults)
        self.parts = tuple(
            Part(tuple(map(one_line, part.faults)), one_line(part.fix, LONGEST_FIX))
            for part in tuple(parts) or (Part(faults, fix),)
        )
        self.faults: tuple[str, ...] = tuple(map(one_line, faults))
        self.fix = one_line(fix, LONGEST_FIX)
        super().__init__("\n".join(line for part in self.parts for line in part.lines()))

    def __reduce__(self) -> Any:
        return partial(type(self), parts=self.parts), (self.faults, self.fix)


class RecipeError(HastenError):
    """The recipe is not valid; every fault is listed at once."""

    exit_code = 2


class InputError(HastenError):
    """A path, file or option value cannot be used. Nothing was written."""

    exit_code = 2


class UnsupportedError(HastenError):
    """The recipe is valid but cannot run here. The fix names the closest recipe that works."""


class ModelError(HastenError):
    """The model cannot be found, is incomplete, is gated, or is of no known family."""


class EngineError(HastenError):
    """A stage of an engine's export failed, or a call does not fit the engine.

    No incomplete file is left. The next run continues from the last finished stage.
    """


class AlreadyOptimizedError(HastenError):
    """The pipeline is already optimised; restore it first."""


class CallError(HastenError):
    """The transformer was called in an order or with shapes that the step cache cannot follow."""


def printable(text: str) -> str:
    """Replace each line break, control character and unassigned code point by a space."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def one_line(text: str, longest: int = LONGEST_FAULT) -> str:
    """Make text from files and libraries safe to print as one line of a terminal.

    Line breaks and control characters become spaces. The middle of text that is longer than
    `longest` characters is left out.
    """
    text = " ".join(printable(text).split())
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head].rstrip()} ... {text[head + 5 - longest :].lstrip()}"


def causes(error: BaseException) -> list[BaseException]:
    """The error and its chain of causes and contexts, the error itself first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


@contextmanager
def writing(path: object, fix: str) -> Iterator[None]:
    """Turn an OSError of the block, which writes to `path`, into an InputError with `fix`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}", fix) from None


class Faults:
    """Collects errors, so that all of them can be raised as one.

    `gather()` records an error of its block; execution continues after the block.
    """

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
        """Raise what was collected; do nothing if there is nothing.

        Raises:
            HastenError: A single error is raised as it is. Several become one error without
                duplicate lines: an InputError if any of them has the exit code of one, else an
                UnsupportedError.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            bad_input = any(error.exit_code == InputError.exit_code for error in self.errors)
            kind = InputError if bad_input else UnsupportedError
            raise _gathered(kind, (part for error in self.errors for part in error.parts))


def unsupported(problems: Iterable[tuple[str, str]]) -> HastenError:
    """One UnsupportedError of all `problems`, each a fault and its fix."""
    return _gathered(UnsupportedError, (Part((fault,), fix) for fault, fix in problems))


def _gathered(kind: type[HastenError], parts: Iterable[Part]) -> HastenError:
    parts = _by_fix(parts)
    faults = [fault for part in parts for fault in part.faults]
    return kind(faults, join_fixes(part.fix for part in parts), parts=parts)


def _by_fix(parts: Iterable[Part]) -> list[Part]:
    """The faults grouped by fix, without duplicates."""
    seen: set[str] = set()
    by_fix: dict[str, list[str]] = {}
    for part in parts:
        new = [fault for fault in part.faults if fault not in seen]
        seen.update(new)
        if new:
            by_fix.setdefault(part.fix, []).extend(new)
    return [Part(tuple(faults), fix) for fix, faults in by_fix.items()]


def join_fixes(fixes: Iterable[str]) -> str:
    """Join fixes into one line, without duplicates."""
    return "; ".join(dict.fromkeys(fix for fix in fixes if fix))
