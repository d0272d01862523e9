"""The record of an applied pass: its line in the summary and how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hasten.errors import UnsupportedError
from hasten.step.protocols import Component


def no_counts() -> str:
    """The `live` line of a pass without counts: empty."""
    return ""


@dataclass(frozen=True)
class Applied:
    """One applied pass.

    `undo`, `renew` and `live` are bound methods, partials or objects, never closures: a deep copy
    of an optimised pipeline copies them with the modules that they refer to.

    Attributes:
        name: The recipe's section.
        description: One line on the changes.
        undo: Reverts the changes as far as possible; None if nothing can be reverted.
        unchanged: Pairs of a part that was not changed and the reason.
        cannot_undo: Why some changes cannot be undone; empty if all can.
        fell_back: Whether the recipe requested a change of the unchanged parts with "auto". Results
            report such parts.
        live: Returns current counts and bytes for the summary.
        notes: Further notes that belong with every result.
        renew: Puts back what a deep copy of a module does not copy, such as compiled code.
    """

    name: str
    description: str
    undo: Callable[[], object] | None
    unchanged: tuple[tuple[str, str], ...] = ()
    cannot_undo: str = ""
    fell_back: bool = False
    live: Callable[[], str] = no_counts
    notes: tuple[str, ...] = ()
    renew: Callable[[], object] | None = None


class Replaced:
    """A replaced attribute of one instance; calling this object restores the previous value."""

    def __init__(self, owner: Any, name: str, value: object) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.own = name in _own(owner)
        self.before = _own(owner).get(name)
        setattr(owner, name, value)

    def __call__(self) -> None:
        """Restore the previous value, unless the attribute has been replaced again."""
        if _own(self.owner).get(self.name) is not self.value:
            return
        if self.own:
            setattr(self.owner, self.name, self.before)
        else:
            delattr(self.owner, self.name)


def _own(owner: object) -> dict[str, Any]:
    """An instance's own attributes, including submodules."""
    return {**owner.__dict__.get("_modules", {}), **owner.__dict__}


def replace_attribute(owner: object, name: str, value: object) -> Replaced:
    """Set an attribute of this instance only.

    Returns:
        A callable that restores the previous value.
    """
    return Replaced(owner, name, value)


def undo_all(applied: Sequence[Applied]) -> list[str]:
    """Undo passes, newest first.

    Returns:
        One line for each pass that cannot be undone.
    """
    failures = []
    for done in reversed(applied):
        if done.undo is not None:
            done.undo()
        if done.cannot_undo:
            failures.append(f"{done.name} cannot be undone: {done.cannot_undo}")
    return failures


def refuse_as_weights(module: Component) -> None:
    """Make a quantised module refuse operations that need its weights: saving, and adapters."""
    module.save_pretrained = _refuse_to_save
    if hasattr(module, "load_lora_adapter"):
        module.load_lora_adapter = _refuse_adapters


def _refuse_to_save(*_: object, **__: object) -> NoReturn:
    raise UnsupportedError(
        "the weights are quantised, and a file of their codes would be loaded as plain weights",
        "save the pipeline before it is optimised, and optimise it again after loading",
    )


def _refuse_adapters(*_: object, **__: object) -> NoReturn:
    raise UnsupportedError(
        "the weights are quantised, and an adapter cannot be added to their codes",
        "load the pipeline again; then, before optimize(): pipe.load_lora_weights(...), "
        "pipe.fuse_lora(), pipe.unload_lora_weights()",
    )
