"""How numbers are written, the same in every format. Nothing here computes a result."""

from __future__ import annotations

from hasten.results import StepsComputed
from hasten.units import format_bytes

MISSING = "–"


def seconds(value: float | None) -> str:
    """Three significant digits or so, in seconds, without the unit."""
    if value is None:
        return MISSING
    decimals = sum(value < limit for limit in (100, 10, 1, 0.1))
    return f"{value:.{decimals}f}"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def speedup(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}×"


def distance(value: float | None) -> str:
    """LPIPS: four decimals below 0.1, 0 only where it is 0."""
    if value is None:
        return MISSING
    if 0 < value < 0.00005:
        return "<0.0001"
    return f"{value:.4f}" if 0 < value < 0.1 else f"{value:.3f}"


def similarity(value: float | None) -> str:
    """SSIM and MS-SSIM: 1 only where it is 1."""
    if value is None:
        return MISSING
    return ">0.999" if 0.9995 <= value < 1 else f"{value:.3f}"


def decibels(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def memory(value: int | None) -> str:
    return MISSING if value is None else format_bytes(value)


def steps(value: StepsComputed | None) -> str:
    if value is None:
        return MISSING
    if value.min == value.max:
        return f"{value.min}"
    return f"{value.mean:.1f} ({value.min}–{value.max})"


def percent_change(ratio: float) -> str:
    """1.012 -> "+1.2 %"."""
    return f"{(ratio - 1) * 100:+.1f} %".replace("-", "−")
