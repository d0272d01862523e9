"""Candidate predictors as weight functions. Uses neither torch nor models.

A skipped step's velocity is Σ_k w_k v_k over the computed velocities, newest first. A weight
function gets their positions, newest first, and the position to fill. A position is a noise level,
or a step's number for the predictors that count steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = [
    "Weigh",
    "Weights",
    "dynamic_mode",
    "exponential",
    "extrapolation",
    "filled",
    "hermite",
    "integrated",
    "reuse",
    "taylor",
]

Weights = tuple[float, ...]
Weigh = Callable[[Sequence[float], float], Weights]
MOST_KNOWN = 5  # velocities kept
GAUSS = 0.5 / math.sqrt(3)  # Gauss–Legendre nodes 0.5 ± this, on [0, 1]: exact up to cubics


def reuse(known: Sequence[float], at: float) -> Weights:
    """The newest velocity."""
    return (1.0,)


def extrapolation(degree: int) -> Weigh:
    """The polynomial through the newest degree + 1 velocities (Lagrange), of fewer where fewer are
    known."""

    def weigh(known: Sequence[float], at: float) -> Weights:
        nodes = known[: degree + 1]
        return tuple(
            math.prod((at - other) / (node - other) for other in nodes if other != node)
            for node in nodes
        )

    return weigh


def taylor(order: int, *, contraction: float | None = None) -> Weigh:
    """Divided differences as TaylorSeer (arXiv:2503.06923) takes them, each by the newest gap, on
    a basis of monomials xⁱ/i!, or with `contraction` c of HiCache's (arXiv:2508.16984) scaled
    Hermite polynomials cⁱ Hᵢ(c x)/i!. On even gaps order 1 is the straight line.
    """

    def weigh(known: Sequence[float], at: float) -> Weights:
        differences = _differences(known, order)
        offset = at - known[0]
        total = [0.0] * len(known)
        for number, difference in enumerate(differences):
            basis = offset**number
            if contraction is not None:
                basis = contraction**number * hermite(number, contraction * offset)
            for index, part in enumerate(difference):
                total[index] += basis / math.factorial(number) * part
        return tuple(total)

    return weigh


def hermite(number: int, x: float) -> float:
    """The physicists' Hermite polynomial: 1, 2x, 4x² − 2, …"""
    before, value = 0.0, 1.0
    for n in range(number):
        before, value = value, 2 * x * value - 2 * n * before
    return value


def _differences(known: Sequence[float], order: int) -> list[list[float]]:
    """TaylorSeer's factors of orders 0, 1, … at the newest position, as weights of all velocities:
    each the change of the order below over the newest gap, divided by that gap."""
    factors: list[list[float]] = []
    for index in reversed(range(len(known))):  # oldest first, as a run meets them
        unit = [0.0] * len(known)
        unit[index] = 1.0
        fresh = [unit]
        for number in range(min(order, len(factors))):
            gap = known[index] - known[index + 1]
            pair = zip(fresh[number], factors[number], strict=True)
            fresh.append([(new - old) / gap for new, old in pair])
        factors = fresh
    return factors


def dynamic_mode(rate: float) -> Weigh:
    """The newest velocity times exp(rate · distance)."""

    def weigh(known: Sequence[float], at: float) -> Weights:
        return (math.exp(rate * (at - known[0])),)

    return weigh


def exponential(rate: float) -> Weigh:
    """The straight line through the newest two, its slope growing as exp(rate · distance): a mode
    of the differences, so the velocity may settle on a value other than 0. `rate` 0 is the line."""

    def weigh(known: Sequence[float], at: float) -> Weights:
        if len(known) < 2:
            return (1.0,)
        gap = known[0] - known[1]
        reach = at - known[0]
        grown = math.expm1(rate * reach) / rate if abs(rate * reach) > 1e-6 else reach
        slope = grown * math.exp(rate * gap / 2) / gap
        return (1 + slope, -slope)

    return weigh


def integrated(weigh: Weigh, known: Sequence[float], stop: float) -> Weights:
    """The mean of a weight function from the newest position to `stop`: what one step over the
    whole gap has to use. Of polynomials this is Adams–Bashforth on an uneven grid, exact up to
    cubics."""
    span = stop - known[0]
    both = [weigh(known, known[0] + span * node) for node in (0.5 - GAUSS, 0.5 + GAUSS)]
    return tuple((a + b) / 2 for a, b in zip(*both, strict=True))


def filled(
    path: Sequence[int],
    positions: Sequence[float],
    gap_weigh: Callable[[int], Weigh],
    *,
    whole_gap: bool = False,
) -> list[Weights]:
    """The weights of every step. `path`: the computed steps, from 0 on; `positions`: N + 1, of the
    steps and of the end; `gap_weigh(g)`: the weight function after the g-th computed step, from 0.

    A computed step uses its own velocity; with `whole_gap` all steps of a gap, that one included,
    use the mean over the gap.
    """
    rows: list[Weights] = []
    for number, start in enumerate(path):
        stop = path[number + 1] if number + 1 < len(path) else len(positions) - 1
        known = [positions[step] for step in reversed(path[: number + 1])][:MOST_KNOWN]
        weigh = gap_weigh(number)
        if whole_gap:
            rows += [integrated(weigh, known, positions[stop])] * (stop - start)
        else:
            rows += [(1.0,), *(weigh(known, positions[step]) for step in range(start + 1, stop))]
    return rows
