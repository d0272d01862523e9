"""The figures and tables that the pages quote, each read from a file below studies/results.

A page calls these functions as Jinja macros (see `hooks.py`), for example
`{{ seconds("peers/h100-presets", "balanced", "1024x1024") }}`. What is not in the results is an
error, so that a page cannot be built with a figure that nobody measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from studies.caching.figure import lpips_of, read_budgets
from studies.caching.results import package_of

from hasten.recipe import preset_names, resolve
from hasten.report.table import columns as table_columns
from hasten.report.table import format_seconds
from hasten.report.table import metric as cell_of
from hasten.results import Results, Row
from hasten.results_file import read_results
from studies import linears, quantization, tensorrt
from studies.peers import card as peers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
CARDS = (
    "presets-512",
    "presets-1024",
    "skipping",
    "computing",
    "flux-fast",
    "int8",
    "memory",
    "quality",
)
NAMES = {"schedule": "`schedule`", "interval, reuse": "`interval, reuse`", "peer": "the best peer"}
STUDIES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "quantization-blocks": ("quantization/tiny", lambda it: quantization.blocks_table(it["rows"])),
    "quantization-text": ("quantization/tiny", lambda it: quantization.text_table(it["rows"])),
    "linears": ("quantization/h100-linears", lambda it: linears.linears_table(it["rows"])),
    "encoder": ("quantization/h100-linears", lambda it: linears.encoder_table(it["text"])),
    "tensorrt": ("tensorrt/cpu-2-cores", tensorrt.tables),
    "tensorrt-pictures": ("tensorrt/tiny/results", tensorrt.pictures),
}


class Figure(float):
    """A number that prints with the digits of its kind, and counts as the number."""

    text: str

    def __new__(cls, value: float, text: str) -> Figure:
        figure = super().__new__(cls, value)
        figure.text = text
        return figure

    def __str__(self) -> str:
        return self.text


def digits(value: float, decimals: int) -> Figure:
    """A number with this many decimals, as a filter: `{{ (a / b) | digits(2) }}`."""
    return Figure(value, f"{value:.{decimals}f}")


# Rows of a benchmark. `results` is a path below studies/results without its ending; `size` is that
# of the image, for results of more than one size.


def seconds(results: str, row: str, size: str = "") -> Figure:
    """Median seconds per image."""
    value = _fact(results, row, size, "seconds")
    return Figure(value, format_seconds(value))


def speedup(results: str, row: str, size: str = "") -> Figure:
    """How many times as fast as the plain pipeline of the same run."""
    return digits(_fact(results, row, size, "speedup"), 2)


def computed(results: str, row: str, size: str = "") -> Figure:
    """Steps computed per image, the mean where images differ."""
    steps = _fact(results, row, size, "computed")
    return digits(steps, 0 if steps == int(steps) else 1)


def first_image(results: str, row: str, size: str = "") -> Figure:
    """Seconds of set-up and first call; in results of `studies.peers` loading is not in it."""
    return digits(_fact(results, row, size, "first_image"), 1)


def memory(results: str, row: str, size: str = "") -> Figure:
    """Peak memory in GiB."""
    return digits(_fact(results, row, size, "memory") / 2**30, 1)


def prompts(results: str) -> int:
    """Number of prompts."""
    return len(_benchmark(results).workload.prompts)


def lpips(results: str, row: str) -> Figure:
    """Mean LPIPS against the plain pipeline."""
    return _quality(results, row, "lpips")


def ssim(results: str, row: str) -> Figure:
    """Mean SSIM against the plain pipeline."""
    return _quality(results, row, "ssim")


def psnr(results: str, row: str) -> Figure:
    """Mean PSNR against the plain pipeline, in dB."""
    return _quality(results, row, "psnr")


def table(results: str, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> str:
    """The product's table of a benchmark, or some of its rows and columns in the order given."""
    benchmark = _benchmark(results)
    titles = {one.title: one for one in table_columns(benchmark) if columns or not one.wide}
    shown = [titles[title] for title in columns or titles]
    lines = [["recipe", *(one.title for one in shown)], [":--", *("--:" for _ in shown)]]
    for row in [_row(results, name) for name in rows] or benchmark.rows:
        cells = (one.cell(row).text.replace("<", "&lt;") for one in shown)
        lines.append([f"`{row.recipe}`", *cells])
    return _markdown(lines)


# Tables that studies make of their own results.


def card(name: str) -> str:
    """One table of `studies.peers.card`, by the names in `CARDS`."""
    return dict(zip(CARDS, peers.card().split("\n\n"), strict=True))[name]


def study(name: str) -> str:
    """The tables of a study, by the names in `STUDIES`."""
    file, make = STUDIES[name]
    return make(_json(f"{file}.json"))


def committed(file: str, index: int = 0) -> str:
    """A table of a committed Markdown report, the first one by default."""
    text = (RESULTS / file).read_text("utf-8")
    return re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)[index].rstrip("\n")


def value(file: str, path: str, decimals: int | None = None) -> Any:
    """Anything in a committed JSON file: `rows[recipe=fp8].quality.0.lpips`."""
    found = _json(file)
    for key, name, wanted in re.findall(r"([^.\[\]]+)|\[(\w+)=([^\]]*)\]", path):
        if name:
            (found,) = [entry for entry in found if str(entry[name]) == wanted]
        else:
            found = found[int(key)] if isinstance(found, list) else found[key]
    return found if decimals is None else digits(found, decimals)


# The comparison of step caches.


def schedule_lpips(model: str, method: str, budget: int) -> Figure:
    """Mean LPIPS of a method within a budget of evaluations; model "tiny" or "teacher"."""
    return digits(_caching(model, budget)[method][0], 5)


def schedule_ratio(model: str, budget: int, against: str = "peer") -> Figure:
    """LPIPS of the learned schedule over that of another method, or of the best peer."""
    points = _caching(model, budget)
    peers = [distance for distance, package in points.values() if package != "hasten"]
    other = min(peers) if against == "peer" else points[against][0]
    return digits(points["schedule"][0] / other, 3)


def schedule_ratios() -> str:
    """For both models and each budget, `schedule` over `interval, reuse` and over the best peer."""
    budgets = list(read_budgets(RESULTS / "caching", "tiny"))
    lines = [
        ["evaluations", *(f"≤ {budget}" for budget in budgets)],
        ["---", *("---:" for _ in budgets)],
    ]
    for called, model in (("bundled", "tiny"), ("second", "teacher")):
        for against in ("interval, reuse", "peer"):
            ratios = [str(schedule_ratio(model, budget, against)) for budget in budgets]
            lines.append([f"{called} model: times that of {NAMES[against]}", *ratios])
    return _markdown(lines)


def presets() -> str:
    """Every preset with its description."""
    lines = [["preset", "what it does"], [":--", ":--"]]
    lines += [[f"`{name}`", resolve(name).description] for name in preset_names()]
    return _markdown(lines)


QUALITY = {"int8": "tiny-h100-int8"}  # the others: tiny-h100
NEEDS = {"fp8": "Ada, Hopper, Blackwell", "int8": "Turing or later"}


def fastest_presets() -> str:
    """The README's table: the presets on FLUX.1-dev's shape, the fastest first."""
    lines = [
        ["preset", "what it does", "50 steps", "28 steps", "LPIPS on a trained model", "GPU"],
        [":--", ":--", "--:", "--:", "--:", ":--"],
    ]
    for name in ("max", "balanced", "fp8", "int8", "lossless", "compile", "baseline"):
        recipe = resolve(name)
        times = [
            f"{seconds(folder, name)} s ({speedup(folder, name)}×)"
            for folder in ("presets/1024-50", "presets/1024-28")
        ]
        scored = _benchmark(QUALITY.get(name, "tiny-h100")).rows
        quality = next(
            (row.quality_against("baseline") for row in scored if row.recipe == name), None
        )
        distance = "–" if quality is None or quality.lpips is None else f"{quality.lpips:.4f}"
        needs = NEEDS[recipe.quantize.scheme] if recipe.quantize else "any"
        lines.append([f"`{name}`", recipe.description, *times, distance, needs])
    return _markdown(lines)


MACROS: tuple[Callable[..., Any], ...] = (
    seconds,
    speedup,
    computed,
    first_image,
    memory,
    prompts,
    lpips,
    ssim,
    psnr,
    table,
    card,
    study,
    committed,
    value,
    schedule_lpips,
    schedule_ratio,
    schedule_ratios,
    presets,
    fastest_presets,
)


def _fact(results: str, row: str, size: str, name: str) -> float:
    facts = _facts(_row(results, row, size))
    if facts[name] is None:
        raise KeyError(f"{results}: row {row!r} has no {name}")
    return facts[name]


def _facts(row: Row) -> dict[str, Any]:
    steps, setup, call = row.steps_computed, row.setup_seconds, row.first_image_seconds
    loading = row.extra.get("load s", 0.0)
    return {
        "seconds": row.seconds_per_image and row.seconds_per_image.median,
        "speedup": row.speedup,
        "computed": steps and steps.mean,
        "first_image": None if setup is None or call is None else setup + call - loading,
        "memory": row.peak_memory_bytes,
    }


def _row(results: str, name: str, size: str = "") -> Row:
    """A row of a benchmark; one of several sizes has a folder for each size and group."""
    if size:
        folders = sorted((RESULTS / results).glob(f"{size.partition('x')[0]}*"))
        rows = [row for one in folders for row in read_results(one / "results.json").rows]
    else:
        rows = list(_benchmark(results).rows)
    plain = "baseline" if name == "diffusers" else name
    return rows[_position([_short(row.recipe) for row in rows], plain, results)]


def _short(name: str) -> str:
    """The recipe's name in that of a row: `hasten:studies/peers/recipes/fp8-lean.toml`."""
    return Path(name.removeprefix("hasten:")).name.removesuffix(".toml")


def _position(names: list[str], name: str, where: str) -> int:
    if name not in names:
        raise KeyError(f"{where}: no row {name!r}; there are {', '.join(names)}")
    return names.index(name)


def _quality(results: str, row: str, metric: str) -> Figure:
    quality = _row(results, row).quality_against("baseline")
    value = getattr(quality, metric, None)
    if value is None:
        raise KeyError(f"{results}: row {row!r} has no {metric}")
    return Figure(value, cell_of(_row(results, row), metric).text)


def _caching(model: str, budget: int) -> dict[str, tuple[float, str]]:
    """LPIPS and package of every method that has a point within the budget."""
    rows = _benchmark(f"caching/{model}-{budget}").rows[1:]
    return {
        row.recipe: (lpips_of(row), package_of(row.recipe)) for row in rows if row.status == "ok"
    }


def _benchmark(results: str) -> Results:
    return read_results(RESULTS / results / "results.json")


def _json(file: str) -> Any:
    return json.loads((RESULTS / file).read_text("utf-8"))


def _markdown(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
