"""The presets' card for the docs: speed on the true shape, quality on the bundled model.

    python -m studies.peers.card

Prints markdown from the committed results. Ratios are against all of the plain pipeline's images in
the row's own group, and against its fastest one of the whole run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hasten.results import BASELINE, Results, Row
from hasten.results_file import read_results

__all__ = ["card", "groups", "measured", "median_of"]

RESULTS = Path(__file__).parents[1] / "results"
PEERS = RESULTS / "peers"
QUALITY = [RESULTS / name / "results.json" for name in ("tiny-h100", "tiny-h100-int8")]
SIZES = ("512", "1024")
BALANCED = ("hasten:balanced", "cache-dit-fp8-untuned:17")
COMPUTING = ("hasten:fp8", "diffusers-torchao-fp8:untuned")
WHOLE = ("hasten:fp8", "flux-fast:quick")
CODES = ("hasten:int8", "hasten:fp8")
SCORED = ("lossless", "int8", "int8-balanced", "fp8", "balanced", "max")
HEAD = """| {size}×{size} | computed | s / image | × | × quickest | ms / computed step | of eager |
| :-- | --: | --: | --: | --: | --: | --: |"""


def card() -> str:
    """The tables: each size, the fastest peers, int8, memory, quality."""
    tables = [_at_size(size) for size in SIZES]
    skipping = _against("17 of 50 computed", "h100-fastest-peer", BALANCED)
    computing = _against("50 of 50 computed", "h100-fp8-peer", COMPUTING)
    whole = _against("50 of 50 computed", "h100-flux-fast", WHOLE)
    codes = _against("50 of 50 computed", "h100-int8", CODES)
    return "\n\n".join([*tables, skipping, computing, whole, codes, _memory(), _quality()])


def groups(run: str, size: str) -> list[Results]:
    """A run's results at a size, one for each group of rows that took turns."""
    return [read_results(path) for path in sorted((PEERS / run).glob(f"{size}*/results.json"))]


def measured(run: str, size: str) -> dict[str, Row]:
    """The measured rows of all groups by name, without their baselines."""
    rows = [row for group in groups(run, size) for row in group.rows[1:]]
    return {row.recipe: row for row in rows if row.status == "ok"}


def median_of(row: Row) -> float:
    """Median seconds per image of a measured row."""
    assert row.seconds_per_image is not None
    return row.seconds_per_image.median


def _at_size(size: str) -> str:
    found = groups("h100-presets", size)
    bases = [group.rows[0].seconds_per_image for group in found]
    times = [base.median for base in bases if base]
    quickest = min(sample for base in bases if base for sample in base.samples)
    span = f"{min(times):.2f}–{max(times):.2f}"
    lines = [HEAD.format(size=size), f"| plain pipeline, eager | 50 | {span} | 1 | 1 | – | 1 |"]
    for group in found:
        base, *rows = group.rows
        lines += [_line(row, base, quickest) for row in rows if row.status == "ok"]
    return "\n".join(lines)


def _line(row: Row, base: Row, quickest: float) -> str:
    seconds = median_of(row)
    assert row.steps_computed is not None
    assert row.transformer_ms_per_step is not None
    assert base.transformer_ms_per_step is not None
    computed = row.steps_computed.max
    return (
        f"| {_name(row)} | {computed} | {seconds:.2f} | {row.speedup:.2f} "
        f"| {quickest / seconds:.2f} | {row.transformer_ms_per_step * 50 / computed:.1f} "
        f"| {row.transformer_ms_per_step / base.transformer_ms_per_step:.2f} |"
    )


def _against(title: str, run: str, names: Sequence[str]) -> str:
    """Rows of one run; × is how many times the last one's seconds."""
    by_size = {size: rows for size in SIZES if (rows := measured(run, size))}
    heads = "".join(f" s / image, {size}×{size} | × |" for size in by_size)
    lines = [f"| {title} |{heads}", "| :-- |" + " --: | --: |" * len(by_size)]
    for name in names:
        cells = [_name(next(iter(by_size.values()))[name])]
        for rows in by_size.values():
            own, peer = median_of(rows[name]), median_of(rows[names[-1]])
            cells += [f"{own:.2f}", f"{peer / own:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory() -> str:
    (results,) = groups("h100-memory", "1024")
    lines = [
        "| memory in the loop at 1024×1024, GiB | used | held beside it |",
        "| :-- | --: | --: |",
    ]
    for row in results.rows:
        if row.status == "ok" and row.peak_memory_bytes is not None:
            used, held = row.peak_memory_bytes / 2**30, row.extra.get("held GiB")
            lines.append(f"| {_name(row)} | {used:.1f} | {_number(held)} |")
    return "\n".join(lines)


def _quality() -> str:
    rows = {row.recipe: row for path in QUALITY for row in read_results(path).rows}
    lines = [
        "| bundled model | LPIPS | SSIM | PSNR dB | prompts |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for name in SCORED:
        quality = rows[name].quality_against(BASELINE)
        assert quality is not None
        lines.append(
            f"| `{name}` | {quality.lpips:.5f} | {quality.ssim:.4f} "
            f"| {quality.psnr:.1f} | {quality.n} |"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _name(row: Row) -> str:
    """hasten's rows as code, the baseline described, and peers by their names."""
    if row.role == "baseline":
        return "diffusers"
    name = row.recipe.removeprefix("hasten:")
    return f"`{Path(name).stem}`" if row.role == "recipe" else name


if __name__ == "__main__":
    print(card())
