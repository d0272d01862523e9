"""The presets' card for the docs: speed on the true shape, quality on the bundled model.

    python -m studies.peers.card

Prints markdown from the committed results. Ratios are against all of the plain pipeline's images in
the row's own group, and against its quickest one of the whole run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.peers.report import BASE

__all__ = ["card"]

RESULTS = Path(__file__).parents[1] / "results"
SPEED = RESULTS / "peers" / "h100-presets.json"
PEER = RESULTS / "peers" / "h100-fastest-peer.json"
FP8_PEER = RESULTS / "peers" / "h100-fp8-peer.json"
INT8 = RESULTS / "peers" / "h100-int8.json"
FLUX_FAST = RESULTS / "peers" / "h100-flux-fast.json"
MEMORY = RESULTS / "peers" / "h100-memory.json"
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
    speed = json.loads(SPEED.read_text("utf-8"))["rows"]
    tables = [_at_size(speed, size) for size in SIZES]
    skipping = _against("17 of 50 computed", PEER, BALANCED)
    computing = _against("50 of 50 computed", FP8_PEER, COMPUTING)
    whole = _against("50 of 50 computed", FLUX_FAST, WHOLE)
    codes = _against("50 of 50 computed", INT8, CODES)
    return "\n\n".join([*tables, skipping, computing, whole, codes, _memory(), _quality()])


def _at_size(rows: list[dict[str, Any]], size: str) -> str:
    measured = [row for row in rows if row["status"] == "ok"]
    bases = {row["group"]: row["sizes"][size] for row in measured if row["row"] == BASE}
    times = [base["seconds"]["median"] for base in bases.values()]
    quickest = min(sample for base in bases.values() for sample in base["seconds"]["samples"])
    span = f"{min(times):.2f}–{max(times):.2f}"
    lines = [HEAD.format(size=size), f"| plain pipeline, eager | 50 | {span} | 1 | 1 | – | 1 |"]
    for row in measured:
        if row["row"] != BASE:
            here, base = row["sizes"][size], bases[row["group"]]
            seconds = here["seconds"]["median"]
            step = here["ms_per_step"] * 50 / here["computed"]
            lines.append(
                f"| {_name(row)} | {here['computed']} | {seconds:.2f} "
                f"| {base['seconds']['median'] / seconds:.2f} | {quickest / seconds:.2f} "
                f"| {step:.1f} | {here['ms_per_step'] / base['ms_per_step']:.2f} |"
            )
    return "\n".join(lines)


def _against(title: str, path: Path, names: Sequence[str]) -> str:
    """Rows of one group; × is how many times the last one's seconds."""
    rows = {row["row"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}
    sizes = [size for size in SIZES if size in rows[names[0]]["sizes"]]
    heads = "".join(f" s / image, {size}×{size} | × |" for size in sizes)
    lines = [f"| {title} |{heads}", "| :-- |" + " --: | --: |" * len(sizes)]
    for name in names:
        cells = [_name(rows[name])]
        for size in sizes:
            own, peer = (rows[one]["sizes"][size]["seconds"]["median"] for one in (name, names[-1]))
            cells += [f"{own:.2f}", f"{peer / own:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory() -> str:
    rows = json.loads(MEMORY.read_text("utf-8"))["rows"]
    lines = [
        "| memory in the loop at 1024×1024, GiB | used | held beside it |",
        "| :-- | --: | --: |",
    ]
    for row in rows:
        if row["status"] == "ok":
            used, held = row["sizes"]["1024"]["peak_bytes"], row["held_bytes"]
            lines.append(f"| {_name(row)} | {used / 2**30:.1f} | {_gib(held)} |")
    return "\n".join(lines)


def _quality() -> str:
    found = [row for path in QUALITY for row in json.loads(path.read_text("utf-8"))["rows"]]
    rows = {row["recipe"]: row for row in found}
    lines = [
        "| bundled model | LPIPS | SSIM | PSNR dB | prompts |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for name in SCORED:
        quality = rows[name]["quality"][0]
        lines.append(
            f"| `{name}` | {quality['lpips']:.5f} | {quality['ssim']:.4f} "
            f"| {quality['psnr']:.1f} | {quality['n']} |"
        )
    return "\n".join(lines)


def _gib(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**30:.1f}"


def _name(row: dict[str, Any]) -> str:
    name = row["row"].removeprefix("hasten:")
    return name if row["row"] == name else f"`{Path(name).stem}`"


if __name__ == "__main__":
    print(card())
