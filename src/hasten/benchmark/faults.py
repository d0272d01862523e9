"""Faults of the input, gathered so that a user sees all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hasten.errors import HastenError, InputError

__all__ = ["Faults"]


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
            fixes = dict.fromkeys(error.fix for error in self.errors if error.fix)
            raise InputError(list(faults), "; ".join(fixes))
