"""The table: one line per row of the results, how its numbers are written, and its notes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from hasten.memory import format_bytes
from hasten.results import BASELINE, Environment, Results, Row, StepsComputed, Workload

QUALITY_ONLY = (
    "for its quality only: onnxruntime draws with the engine's graph on a CPU, and what it takes "
    "there says nothing of an engine"
)
MISSING = "–"
# A baseline that moved by more than this makes every speed-up doubtful.
STEADY = 0.05


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number it sorts by (None sorts last in either direction)."""

    text: str
    value: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """`best` says which way is better; `wide` columns are only shown where there is room."""

    key: str
    title: str
    cell: Callable[[Row], Cell]
    best: str = ""
    wide: bool = False


def headline(results: Results) -> str:
    """What was compared: the two fastest rows by name, ours first, and how many others."""
    rows = [row for row in results.rows if row.role != "baseline"]
    rows = [row for row in rows if row.status == "ok"] or rows
    ours = [row for row in rows if row.role == "recipe"]
    named = sorted(ours or rows, key=lambda row: -(row.speedup or 0.0))[:2]
    names = [row.recipe for row in named]
    others = len(rows) - len(names)
    if others:
        names.append(f"{others} other{'s' * (others > 1)}")
    if not names:
        return "The plain pipeline alone"
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    return f"{listed} against the plain pipeline"


def measured_on(results: Results) -> str:
    """The workload and the device in one line."""
    work, here, count = results.workload, results.environment, len(results.workload.prompts)
    device = here.gpu or (here.cpu if here.device == "cpu" else None) or here.device
    return (
        f"{work.model}, {work.width} × {work.height}, {work.steps} steps, {work.dtype}, {device}; "
        f"median of {count} prompt{'s' * (count != 1)}"
    )


def row_facts(row: Row) -> list[str]:
    """What must not be missing where a speed-up is shown: seconds, LPIPS, a plan not calibrated."""
    lpips = metric(row, "lpips")
    facts = [f"{_seconds(row).text} s"]
    if lpips.value is not None:
        facts.append(f"LPIPS {lpips.text}")
    if row.calibrated is False:
        facts.append("calibrated: false")
    return facts


def not_drawn(results: Results) -> list[str]:
    """Why rows have no speed-up to draw, one text each."""
    return [
        f"{row.recipe}, {QUALITY_ONLY if row.role == 'graph' else f'{row.status}: {row.reason}'}"
        for row in results.rows
        if row.status != "ok" or row.role == "graph"
    ]


def columns(results: Results) -> list[Column]:
    """The columns these results can fill, without the recipe's name and the notes."""
    timed = _any_timed(results)
    chosen = [
        Column("seconds", "s / image", _if_timed(_seconds), "low"),
        Column("speedup", "speed-up", lambda row: speedup(row, results), "high"),
    ]
    chosen = chosen if timed else []
    chosen.append(Column("steps", "steps computed", _steps, "low"))
    for name, (title, best, _) in METRICS.items():
        if name != "ms_ssim" or any(metric(row, name).value is not None for row in results.rows):
            chosen.append(Column(name, title, partial(metric, name=name), best))
    for reference in other_references(results):
        cell = partial(metric, name="lpips", reference=reference)
        chosen.append(Column(f"lpips-{reference}", f"LPIPS vs {reference}", cell, "low"))
    if timed:
        chosen.append(Column("memory", "peak memory", _if_timed(_memory), "low"))
    for name in dict.fromkeys(name for row in results.rows for name in row.extra):
        chosen.append(Column(f"extra-{name}", name, partial(_extra, name=name)))
    if any(row.transformer_ms_per_step is not None for row in results.rows):
        chosen.append(Column("step", "ms / step", _if_timed(_step), "low", wide=True))
    if any(row.setup_seconds is not None for row in results.rows):
        chosen.append(Column("setup", "setup s", _if_timed(_setup), "low", wide=True))
    return chosen


def other_references(results: Results) -> list[str]:
    """Rows other than the baseline that pictures were scored against, in order of appearance."""
    references = dict.fromkeys(entry.reference for row in results.rows for entry in row.quality)
    return [name for name in references if name != BASELINE]


def metric(row: Row, name: str, reference: str = BASELINE) -> Cell:
    """The mean of one metric over a row's prompts; the reference itself has none."""
    if row.recipe == reference:
        return Cell("reference")
    quality = row.quality_against(reference)
    value: float | None = getattr(quality, name) if quality else None
    return _number(value, METRICS[name][2])


def speedup(row: Row, results: Results) -> Cell:
    """A row's speed-up, as fine as the benchmark's drift allows."""
    return _number(row.speedup, lambda value: format_speedup(value, results.uncertainty))


def notes(row: Row, results: Results) -> list[str]:
    """Everything a reader must know before quoting the row, one short text each."""
    notes = []
    if row.status != "ok":
        notes.append(f"{row.status}: {row.reason}")
    if row.role == "graph":
        notes.append(QUALITY_ONLY)
    if row.calibrated is False:
        notes.append("calibrated: false")
    shared = common_notes(results)
    notes += [note for note in row.notes if note not in shared]
    if row.status == "ok":
        common = common_quality_reason(results)
        reasons = dict.fromkeys(entry.reason for entry in row.quality if entry.reason)
        notes += [f"quality: {reason}" for reason in reasons if reason != common]
        notes += _missing(row, results)
    return notes


def lacks_rival(row: Row, results: Results) -> bool:
    """Whether a recipe caches, and no row shows what as few steps give without the cache."""
    caches = "[cache]" in (row.toml or "").splitlines()
    covered = {name for other in results.rows for name in other.rival_of}
    return caches and row.role == "recipe" and row.recipe not in covered


def _missing(row: Row, results: Results) -> list[str]:
    """What a whole benchmark would have of a row that was measured, and this one has not."""
    notes = []
    work, samples = results.workload, row.seconds_per_image.n if row.seconds_per_image else 0
    if _any_timed(results) and samples < len(work.prompts) * work.rounds:
        notes.append(f"{samples // len(work.prompts)} of {work.rounds} rounds measured")
    if row.recipe != BASELINE and row.quality_against(BASELINE) is None:
        notes.append("not scored against the baseline")
    if lacks_rival(row, results):
        notes.append("its rival, as few steps without the cache, was not measured")
    return notes


def common_notes(results: Results) -> list[str]:
    """Notes that every measured row has, which are then said once, below the table."""
    measured = [row for row in results.rows if row.status == "ok"]
    if len(measured) < 2:
        return []
    return [note for note in measured[0].notes if all(note in row.notes for row in measured)]


def common_quality_reason(results: Results) -> str | None:
    """The reason that every scored row gives, which is then said once, below the table."""
    reasons = [
        entry.reason
        for row in results.rows
        if row.status == "ok" and row.recipe != BASELINE
        for entry in row.quality
    ]
    return reasons[0] if len(set(reasons)) == 1 else None


def drift_line(results: Results) -> str:
    drift, last = results.drift, results.rows[-1].seconds_per_image
    if not _any_timed(results):
        return "No speed-ups: no row has seconds per image."
    if drift is None or last is None or results.uncertainty is None:
        return (
            "Drift: not measured, the baseline was not rendered a second time. "
            "Speed-ups are over its first time alone."
        )
    steady = abs(drift - 1) <= STEADY
    return (
        f"Drift: the baseline, rendered again at the end, took {format_seconds(last.median)} s, "
        f"{format_change(drift)} against the first time. Speed-ups are over the mean of both and "
        f"known to ±{results.uncertainty * 100:.1f} %; smaller differences mean nothing."
        + ("" if steady else " The machine was not steady: measure again before quoting a number.")
    )


def workload_facts(workload: Workload) -> list[tuple[str, str]]:
    count = len(workload.prompts)
    facts = [
        ("model", workload.model),
        ("size", f"{workload.width} × {workload.height}"),
        ("steps", str(workload.steps)),
        ("guidance", "none" if workload.guidance is None else f"{workload.guidance:g}"),
        ("dtype", workload.dtype),
        ("seed", str(workload.seed)),
        ("prompts", f"{count} from {workload.prompt_source}"),
    ]
    if workload.rounds > 1:
        facts.append(("rounds", str(workload.rounds)))
    if workload.max_sequence_length is not None:
        facts.append(("text tokens", str(workload.max_sequence_length)))
    return facts


def environment_facts(environment: Environment) -> list[tuple[str, str]]:
    """Every key that is known, in the schema's order."""
    labels = {"gpu_memory_bytes": "GPU memory", "gpu": "GPU", "cpu": "CPU", "os": "OS"}
    known = environment.model_dump(exclude_none=True)
    known["date"] = known["date"].replace("T", " ")
    if "gpu_memory_bytes" in known:
        known["gpu_memory_bytes"] = format_memory(known["gpu_memory_bytes"])
    known |= known.pop("packages")
    return [(labels.get(key, key), str(value)) for key, value in known.items()]


def to_markdown(results: Results) -> str:
    """A GitHub table with its workload above and drift, quality and environment below."""
    shown = [column for column in columns(results) if not column.wide]
    head = ["recipe", *[_escape(column.title) for column in shown], "notes"]
    align = [":--", *["--:" for _ in shown], ":--"]
    lines = [_facts_line(workload_facts(results.workload)), "", _line(head), _line(align)]
    for row in results.rows:
        cells = [column.cell(row).text for column in shown]
        lines.append(_line(map(_escape, [row.recipe, *cells, "; ".join(notes(row, results))])))
    if shared := common_notes(results):
        lines += ["", f"Every row: {_escape('; '.join(shared))}."]
    lines += ["", drift_line(results)]
    if reason := common_quality_reason(results):
        lines += ["", f"Quality: {_escape(reason)}."]
    if results.command:
        lines += ["", f"Command: {_escape(results.command)}"]
    lines += ["", f"Environment: {_facts_line(environment_facts(results.environment))}", ""]
    return "\n".join(lines)


def _any_timed(results: Results) -> bool:
    return any(row.seconds_per_image for row in results.rows)


def _extra(row: Row, name: str) -> Cell:
    value = row.extra.get(name)
    return Cell(MISSING if value is None else f"{value:.4g}", value)


def _if_timed(cell: Callable[[Row], Cell]) -> Callable[[Row], Cell]:
    """Nothing of a row that is there for its quality only."""
    return lambda row: Cell(MISSING) if row.role == "graph" else cell(row)


def _number(value: float | None, form: Callable[[float], str], detail: str = "") -> Cell:
    return Cell(MISSING, detail=detail) if value is None else Cell(form(value), value, detail)


def _seconds(row: Row) -> Cell:
    measured = row.seconds_per_image
    if measured is None:
        return Cell(MISSING)
    spread = f"{format_seconds(measured.p10)}–{format_seconds(measured.p90)}"
    return Cell(format_seconds(measured.median), measured.median, spread)


def _steps(row: Row) -> Cell:
    computed = row.steps_computed
    return Cell(format_steps(computed), computed.mean) if computed else Cell(MISSING)


def _memory(row: Row) -> Cell:
    weights = f"weights {format_memory(row.weights_bytes)}" if row.weights_bytes else ""
    return _number(row.peak_memory_bytes, format_memory, weights)


def _step(row: Row) -> Cell:
    return _number(row.transformer_ms_per_step, format_tenths)


def _setup(row: Row) -> Cell:
    first = row.first_image_seconds
    detail = "" if first is None else f"+ {format_seconds(first)}"
    return _number(row.setup_seconds, format_seconds, detail)


def _facts_line(facts: list[tuple[str, str]]) -> str:
    return " · ".join(f"{_escape(name)} {_escape(text)}" for name, text in facts)


def _escape(text: str) -> str:
    """Text as text: no Markdown, no HTML, no line break and no cell border inside a cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|~":
        text = text.replace(mark, f"\\{mark}")
    return text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def format_seconds(value: float) -> str:
    """Three significant digits or so, in seconds, without the unit."""
    decimals = sum(value < limit for limit in (100, 10, 1, 0.1))
    return f"{value:.{decimals}f}"


def format_tenths(value: float) -> str:
    """Milliseconds and decibels."""
    return f"{value:.1f}"


def format_speedup(value: float, uncertainty: float | None) -> str:
    """No finer than the drift allows: the last digit is the first one that is uncertain.

    Args:
        value: The speed-up.
        uncertainty: `Results.uncertainty`, a share of the value; where it is unknown, one decimal.
    """
    decimals = 1
    if uncertainty is not None:
        decimals = -math.floor(math.log10(max(value * uncertainty, 0.005)))
    return f"{value:.{min(max(decimals, 0), 2)}f}×"


def format_distance(value: float) -> str:
    """LPIPS: four decimals below 0.1, 0 only where it is 0."""
    if 0 < value < 0.00005:
        return "<0.0001"
    return f"{value:.4f}" if 0 < value < 0.1 else f"{value:.3f}"


def format_similarity(value: float) -> str:
    """SSIM and MS-SSIM: 1 only where it is 1."""
    return ">0.999" if 0.9995 <= value < 1 else f"{value:.3f}"


def format_memory(value: float) -> str:
    return format_bytes(value)


def format_steps(value: StepsComputed) -> str:
    if value.min == value.max:
        return f"{value.min}"
    return f"{value.mean:.1f} ({value.min}–{value.max})"


def format_change(ratio: float) -> str:
    """1.012 -> "+1.2 %"."""
    return f"{(ratio - 1) * 100:+.1f} %".replace("-", "−")


# Title, which way is better, and form.
METRICS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "lpips": ("LPIPS", "low", format_distance),
    "ssim": ("SSIM", "high", format_similarity),
    "psnr": ("PSNR dB", "high", format_tenths),
    "ms_ssim": ("MS-SSIM", "high", format_similarity),
}
