"""What a pass leaves behind: a line for the summary, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Applied", "replace_attribute"]


@dataclass(frozen=True)
class Applied:
    """One applied pass.

    name: the recipe's section; what: one line of what was changed; left_alone: (what, why) pairs;
    undo: puts back what it can; cannot_undo: why that is not everything, empty where it is;
    declined: whether what was left alone is what the recipe asked for with "auto", which results
    have to say; notes: what else they have to say.
    """

    name: str
    what: str
    undo: Callable[[], None] | None
    left_alone: tuple[tuple[str, str], ...] = ()
    cannot_undo: str = ""
    declined: bool = False
    live: Callable[[], str] = field(default=lambda: "")
    notes: tuple[str, ...] = ()


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of this instance alone; calling the result puts back what was there."""
    own = name in owner.__dict__
    before = owner.__dict__.get(name)
    setattr(owner, name, value)

    def put_back() -> None:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    return put_back
