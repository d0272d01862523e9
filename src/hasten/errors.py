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
lines; from Python `str(error)` is the same text. Whatever text of a file or a library is in them,
they hold no control characters and are at most 400 characters long (a fix 1,000). `Faults` gathers
errors, so that a user sees all of them at once, each with its own fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

LONGEST_FAULT, LONGEST_FIX = 400, 1000


class Problem(NamedTuple):
    """Why something cannot work here, in one line, and what to do about it, in one line."""

    fault: str
    fix: str


class Part(NamedTuple):
    """Faults and what mends them."""

    faults: tuple[str, ...]
    fix: str

    def lines(self, before: str = "") -> list[str]:
        """As they are read; before: what stands before each fault."""
        lines = [f"{before}{fault}" for fault in self.faults]
        return [*lines, f"fix: {self.fix}"] if self.fix else lines


class HastenError(Exception):
    """Base of all of them: `faults` (one line each) and `fix` (one line, may be empty).

    parts: faults with the fix that is theirs; several where errors were gathered.
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


def printable(text: str) -> str:
    """Text with a space in place of each line break, control character and unknown code."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def one_line(text: str, longest: int = LONGEST_FAULT) -> str:
    """Text from files and libraries, fit to be printed as one line of a terminal.

    Line breaks and control codes become spaces; of longer text, the middle is left out.
    """
    text = " ".join(printable(text).split())
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]} ... {text[head + 5 - longest :]}"


def causes(error: BaseException) -> list[BaseException]:
    """The error, what led to it, what led to that, and so on."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


@contextmanager
def writing(path: object, fix: str) -> Iterator[None]:
    """An InputError for what the file system says while the block writes to `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}", fix) from None


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
        """A lone error as it was; several as one, each line of theirs once: an InputError where
        any is of bad input, else an UnsupportedError."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            bad_input = any(error.exit_code == InputError.exit_code for error in self.errors)
            kind = InputError if bad_input else UnsupportedError
            raise _gathered(kind, (part for error in self.errors for part in error.parts))


def unsupported(problems: Iterable[tuple[str, str]]) -> HastenError:
    """One error of all that cannot work: faults, each with its fix."""
    return _gathered(UnsupportedError, (Part((fault,), fix) for fault, fix in problems))


def _gathered(kind: type[HastenError], parts: Iterable[Part]) -> HastenError:
    parts = _by_fix(parts)
    faults = [fault for part in parts for fault in part.faults]
    return kind(faults, join_fixes(part.fix for part in parts), parts=parts)


def _by_fix(parts: Iterable[Part]) -> list[Part]:
    """Each fault once, and what has the same fix together."""
    seen: set[str] = set()
    by_fix: dict[str, list[str]] = {}
    for part in parts:
        new = [fault for fault in part.faults if fault not in seen]
        seen.update(new)
        if new:
            by_fix.setdefault(part.fix, []).extend(new)
    return [Part(tuple(faults), fix) for fix, faults in by_fix.items()]


def join_fixes(fixes: Iterable[str]) -> str:
    """Several fixes as one line, none of them twice."""
    return "; ".join(dict.fromkeys(fix for fix in fixes if fix))
