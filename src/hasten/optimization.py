"""What was done to a transformer: one object, shared by every pipeline over it."""

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

CHANGED = "weights changed after optimising (an adapter?): the schedule was learned on other ones"


class Optimization:
    """A recipe on one transformer.

    Attributes:
        recipe: What was asked for.
        family: The transformer's.
        verdict: What `check` decided, and the passes did.
        chain: What stands before the transformer's forward.
        applied: The passes, in order.
        active: Whether they are in place.
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
        """Held by whoever runs the transformer."""
        return self.chain.lock

    @property
    def planner(self) -> Planner | None:
        """What plans the step cache's runs, where anything does."""
        cache = self.chain.layer("cache")
        return cache.policy.planner if isinstance(cache, CacheLayer) else None

    @property
    def calibrated(self) -> bool | None:
        """Whether the step cache runs a schedule learned on these very weights; None where it runs
        none that is learned."""
        planner = self.planner
        if planner is None or not planner.calibrated:
            return None if planner is None else planner.calibrated
        return not self.weights_changed()

    def apply(self, passes: Callable[[list[Applied]], None]) -> None:
        """Run the passes; undo all of them if one fails.

        Args:
            passes: Adds to the list as soon as it has changed something.
        """
        applied: list[Applied] = []
        try:
            passes(applied)
        except BaseException as error:
            for stuck in undo_all(applied):
                error.add_note(stuck)
            raise
        self.applied = applied
        self.active = True
        setattr(plain_module(self.chain.transformer), MARK, self)
        planner = self.planner
        if planner is not None and planner.calibrated and self.weights is None:
            self.weights = self._weights()  # of the first time: it may be applied again later

    def restore(self) -> list[str]:
        """Undo every pass, newest first.

        Returns:
            A line for each that cannot be undone.
        """
        with self.lock:
            stuck = undo_all(self.applied)
            self.applied = [replace(done, undo=None) for done in self.applied if done.cannot_undo]
            self.active = False
            plain_module(self.chain.transformer).__dict__.pop(MARK, None)
        return stuck

    def renew(self) -> None:
        """Put back what a deep copy leaves out."""
        for done in self.applied:
            if done.renew is not None:
                done.renew()

    def weights_changed(self) -> bool:
        """Whether the transformer's weights are no longer those that were optimised."""
        return self.weights is not None and self.weights != self._weights()

    def notes(self) -> tuple[str, ...]:
        """What a reader of figures must know of the passes."""
        notes = [*self.verdict.notes] if self.active else []
        if self.active and self.weights_changed():
            notes.append(CHANGED)
        return (*notes, *(note for done in self.applied for note in done.notes))

    def fallbacks(self) -> tuple[str, ...]:
        """What "auto" did not do, and why."""
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
    """What was done to a pipeline's transformer; None where it is plain."""
    transformer = plain_module(getattr(pipe, "transformer", None))
    optimization: Optimization | None = getattr(transformer, MARK, None)
    return optimization
