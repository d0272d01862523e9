"""The optimisation of one transformer, shared by every pipeline that uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hasten.check import MARK, Verdict
from hasten.families.family import Family
from hasten.models.fingerprint import fingerprint, unreadable
from hasten.passes.cache.layer import CacheLayer
from hasten.passes.cache.plan import Planner
from hasten.recipe import Recipe
from hasten.step.applied import Applied, undo_all
from hasten.step.chain import RunLock, StepChain, plain_module

CHANGED = "weights changed after optimising (an adapter?): the schedule was learned on others"


class Optimization:
    """A recipe applied to one transformer.

    Attributes:
        recipe: The recipe.
        family: The transformer's family.
        verdict: The decisions of `check`, which the passes follow.
        chain: The layers in front of the transformer's forward.
        applied: The passes, in order.
        active: Whether the passes are in place.
        weights: Fingerprint of the weights when a learned schedule was first applied.
    """

    def __init__(self, recipe: Recipe, family: Family, verdict: Verdict, chain: StepChain) -> None:
        self.recipe = recipe
        self.family = family
        self.verdict = verdict
        self.chain = chain
        self.applied: list[Applied] = []
        self.active = False
        self.weights: str | None = None

    @property
    def lock(self) -> RunLock:
        """The lock that a caller holds while it runs the transformer."""
        return self.chain.lock

    @property
    def planner(self) -> Planner | None:
        """The planner of the step cache; None without one."""
        cache = self.chain.layer("cache")
        return cache.policy.planner if isinstance(cache, CacheLayer) else None

    @property
    def calibrated(self) -> bool | None:
        """Whether the step cache's schedule was learned on these weights; None without a learned
        schedule."""
        planner = self.planner
        if planner is None or not planner.calibrated:
            return None if planner is None else planner.calibrated
        return not self.weights_changed()

    def apply(self, passes: Callable[[list[Applied]], None]) -> None:
        """Run the passes; undo all of them if one fails.

        Args:
            passes: Appends each pass to the list as soon as it has changed something.
        """
        applied: list[Applied] = []
        try:
            passes(applied)
        except BaseException as error:
            for failures in undo_all(applied):
                error.add_note(failures)
            raise
        self.applied = applied
        self.active = True
        setattr(plain_module(self.chain.transformer), MARK, self)
        planner = self.planner
        if planner is not None and planner.calibrated and self.weights is None:
            self.weights = self._weights()  # of the first application: it may be applied again

    def restore(self) -> list[str]:
        """Undo every pass, newest first.

        Returns:
            One line for each pass that cannot be undone.
        """
        with self.lock:
            failures = undo_all(self.applied)
            self.applied = [replace(done, undo=None) for done in self.applied if done.cannot_undo]
            self.active = False
            plain_module(self.chain.transformer).__dict__.pop(MARK, None)
        return failures

    def renew(self) -> None:
        """Put back what a deep copy does not copy."""
        for done in self.applied:
            if done.renew is not None:
                done.renew()

    def weights_changed(self) -> bool:
        """Whether the transformer's weights have changed since they were optimised."""
        return self.weights is not None and self.weights != self._weights()

    def notes(self) -> tuple[str, ...]:
        """Notes on the passes that belong with every measurement."""
        notes = [*self.verdict.notes] if self.active else []
        if self.active and self.weights_changed():
            notes.append(CHANGED)
        return (*notes, *(note for done in self.applied for note in done.notes))

    def fallbacks(self) -> tuple[str, ...]:
        """The parts that an "auto" setting left unchanged, and why."""
        return tuple(
            f"{done.name}: {part} unchanged: {reason}"
            for done in self.applied
            if done.fell_back
            for part, reason in done.unchanged
        )

    def _weights(self) -> str | None:
        transformer = self.chain.transformer
        return None if unreadable(transformer) else fingerprint(transformer)


def optimization_of(pipe: Any) -> Optimization | None:
    """The optimisation of a pipeline's transformer; None for a plain one."""
    transformer = plain_module(getattr(pipe, "transformer", None))
    optimization: Optimization | None = getattr(transformer, MARK, None)
    return optimization
