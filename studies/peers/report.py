"""Results of `studies.peers.run` as a table, from their JSON alone.

    python -m studies.peers.report DIR/peers.json

Prints it and writes DIR/peers.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["markdown", "speedup", "write_report"]

Row = dict[str, Any]
BASE = "diffusers"
OWN = "hasten"
GIB = 2**30
HEAD = """# Whole images side by side: `{model}`

{gpu}, torch {torch}, CUDA {cuda}, {dtype}, batch 1, {steps} steps, median of {rounds} rounds in
turns; text embeddings given, every image its own, VAE included. × is how much faster than
`{base}` in the same group; a row's ms/step is its whole loop over all {steps} steps, skipped ones
included. Memory: most allocated in the loop + what the allocator holds beside it (pools of CUDA
graphs, fragments), both in the ratio. First image: from weights on the device, in a new process
with empty compile caches. Distance: of the final latents from `{base}`'s, same input.
"""


def write_report(path: Path) -> str:
    """Write the table beside the results file, and return it."""
    text = markdown(json.loads(path.read_text("utf-8")))
    path.with_suffix(".md").write_text(text, "utf-8")
    return text


def markdown(results: Row) -> str:
    """All sizes, then starts, what could not run, and what each row is."""
    workload, environment = results["workload"], results["environment"]
    head = HEAD.format(
        model=workload["model"],
        gpu=environment.get("gpu") or environment.get("cpu"),
        torch=environment["torch"],
        cuda=environment.get("cuda") or "none",
        dtype=workload["dtype"],
        steps=workload["steps"],
        rounds=workload["rounds"],
        base=BASE,
    )
    parts = [
        *(_at_size(results["rows"], size) for size in workload["sizes"]),
        _starts(results["rows"], workload["sizes"]),
        _missing(results),
        _packages(environment),
    ]
    return "\n".join([head, *("\n".join([*part, ""]) for part in parts)])


def _at_size(rows: list[Row], size: int) -> Iterator[str]:
    yield f"## {size}×{size}"
    yield ""
    yield (
        "| row | computed | s/image | 10–90 % | n | × | ms/step | of base | memory, GiB "
        "| of base | distance |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        if row["sizes"][str(size)]["seconds"] is not None:
            yield _line(row, _base_of(rows, row), size)
    comparisons = [*_against_peers(rows, size)]
    if comparisons:
        yield from ["", "Against the fastest peer that computes as many steps:", ""]
        yield from comparisons


def _line(row: Row, base: Row | None, size: int) -> str:
    here = row["sizes"][str(size)]
    there = base["sizes"][str(size)] if base else None
    seconds = here["seconds"]
    name = row["row"] if row["row"] != BASE else f"{BASE} (group {row['group']})"
    cells = [
        name,
        str(here["computed"]),
        f"{seconds['median']:.3f}",
        f"{seconds['p10']:.3f}–{seconds['p90']:.3f}",
        str(seconds["n"]),
        _ratio(there and there["seconds"] and there["seconds"]["median"], seconds["median"], "×"),
        f"{here['ms_per_step']:.1f}",
        _ratio(here["ms_per_step"], there and there["ms_per_step"], ""),
        _memory(here["peak_bytes"], row["held_bytes"]),
        _ratio(_total(row, size), base and _total(base, size), ""),
        "–" if here["latent_distance"] is None else f"{here['latent_distance']:.3f}",
    ]
    return "| " + " | ".join(cells) + (" |" if here["finite"] else " | not finite")


def _base_of(rows: list[Row], row: Row) -> Row | None:
    """The base row of the same group."""
    return next((one for one in rows if one["row"] == BASE and one["group"] == row["group"]), None)


def _ratio(above: float | None, below: float | None, unit: str) -> str:
    return f"{above / below:.2f}{unit}" if above and below else "–"


def _memory(peak: int, held: int | None) -> str:
    return f"{peak / GIB:.1f}" + (f" + {held / GIB:.1f}" if held else "")


def _total(row: Row, size: int) -> int | None:
    """Peak and pools together, as far as both are known."""
    peak, held = row["sizes"][str(size)]["peak_bytes"], row["held_bytes"]
    return None if peak is None or held is None else peak + held


def speedup(rows: list[Row], row: Row, size: int) -> float | None:
    """How many times faster a whole image is than the base's of the same group."""
    base = _base_of(rows, row)
    here = row["sizes"][str(size)]["seconds"]
    there = base["sizes"][str(size)]["seconds"] if base else None
    return there["median"] / here["median"] if here and there else None


def _against_peers(rows: list[Row], size: int) -> Iterator[str]:
    """Each of hasten's rows beside the fastest peer that computes as many steps; the ratio is of
    both speed-ups, since the two may have run in different groups."""
    fast = {id(row): found for row in rows if (found := speedup(rows, row, size))}
    for row in rows:
        if row["package"] != OWN or id(row) not in fast:
            continue
        steps = _computed(row, size)
        peers = [
            peer for peer in rows
            if peer["package"] != OWN and id(peer) in fast and _computed(peer, size) == steps
        ]  # fmt: skip
        if not peers:
            continue
        best = max(peers, key=lambda peer: fast[id(peer)])
        ratio = fast[id(row)] / fast[id(best)]
        yield f"- {row['row']}, {steps} computed: {ratio:.2f} times as fast as {best['row']}"


def _computed(row: Row, size: int) -> int:
    return int(row["sizes"][str(size)]["computed"])


def _starts(rows: list[Row], sizes: list[int]) -> Iterator[str]:
    """First images; a further size's cost beyond a usual image of that size."""
    yield "## First images"
    yield ""
    first, *others = sizes
    yield (
        "| row | setup, s | first image, s | "
        + "".join(f"extra at {size}, s | " for size in others)
        + "with warm caches: first image, s |"
        + "".join(f" extra at {size}, s |" for size in others)
    )
    yield "|---|" + "---:|" * (3 + 2 * len(others))
    for row in rows:
        begun = row["sizes"][str(first)]["first_image_seconds"]
        if begun is None or (row["row"] == BASE and row["group"]):
            continue
        cold = _start(row, row["setup_seconds"], _firsts(row), sizes)
        warm = row["warm_start"] or {}
        again = _start(row, warm.get("setup_seconds"), warm.get("first_image_seconds"), sizes)
        yield f"| {row['row']} | {row['setup_seconds']:.1f} | " + " | ".join([*cold, *again]) + " |"


def _firsts(row: Row) -> dict[str, float | None]:
    return {size: entry["first_image_seconds"] for size, entry in row["sizes"].items()}


def _start(
    row: Row, setup: float | None, firsts: dict[str, float | None] | None, sizes: list[int]
) -> list[str]:
    """Setup and image at the first size, then what each further size took beyond its median."""
    if setup is None or firsts is None:
        return ["–"] * len(sizes)
    begun = firsts[str(sizes[0])]
    cells = ["–" if begun is None else f"{setup + begun:.1f}"]
    for size in sizes[1:]:
        first, usual = firsts[str(size)], row["sizes"][str(size)]["seconds"]
        known = first is not None and usual is not None
        cells.append(f"{first - usual['median']:.1f}" if known else "–")
    return cells


def _missing(results: Row) -> Iterable[str]:
    gone = [
        f"- {row['row']}: {row['status']}: {row['reason']}"
        for row in results["rows"]
        if row["status"] != "ok" or row["reason"]
    ]
    cut = [] if results["finished"] else ["- The run was cut off; this is what there was of it."]
    return ["## Not measured, or not in full", "", *gone, *cut] if gone or cut else []


def _packages(environment: Row) -> Iterator[str]:
    packages = environment.get("packages", {})
    there = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    absent = ", ".join(name for name, version in packages.items() if not version)
    yield f"Packages: {there}. Not installed: {absent or 'none'}. Each row's recipe is in the JSON."


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
