"""Exports and builds on a machine without a GPU: seconds, memory, and an estimate for FLUX.1-dev.

    python -m studies.tensorrt studies/results/tensorrt/cpu-2-cores.json [commands] [depths]
    python -m studies.tensorrt --tables studies/results/tensorrt/cpu-2-cores.json

First the command a user types, on the bundled model in each precision: from nothing, once more, and
again with its cache deleted. Then FLUX.1-dev's true width at three depths under random weights, in
FP8: exported as hasten does it and as torch.onnx alone would, verified where the memory allows, and
built; every job is a process of its own. Memory is RssAnon: pages of mapped files do not count. A
line through the three depths gives the whole model. Either part can be measured by itself. Prints
the tables of docs/tensorrt.md; a row beside which other processes ran is marked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.benchmark.environment import detect
from hasten.engines.tensorrt.build import build
from hasten.engines.tensorrt.export import export_onnx, in_precision
from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.manifest import Shapes
from hasten.engines.tensorrt.nodes import Amax
from hasten.engines.tensorrt.preflight import graph_bytes
from hasten.engines.tensorrt.step import OUTPUT, Step, sample
from hasten.engines.tensorrt.verify import verify
from hasten.families.flux1 import FLUX1
from hasten.memory import PeakMemory, status_bytes
from hasten.models.architecture import FLUX_1_DEV
from hasten.models.random_weights import variance_preserving_
from hasten.process import python_command, python_environment

SCHEMA = 1
PRECISIONS = ("bf16", "fp16", "fp8")
TARGET = "sm89"
FAMILY = FLUX1
SHAPES = Shapes(text=512, least=64, best=4096, most=4096)
DEPTHS = ((1, 1), (2, 2), (4, 4))
FULL = FLUX_1_DEV.transformer["num_layers"], FLUX_1_DEV.transformer["num_single_layers"]
VERIFIED = 4  # blocks: in float32, with the model before quantisation beside it, 4 take 10 GB
BUSY = 0.2  # cores that other processes took on average, from which on a row is marked
INPUT_AMAX = 10.0  # of every linear: the weights are random, nothing is lost by guessing
GIB = 2**30


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "--job":
        print(json.dumps(JOBS[arguments[0]](*arguments[1:])))
    elif command == "--tables":
        print(tables(json.loads(Path(arguments[0]).read_text("utf-8"))))
    else:
        path = Path(command)
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in arguments or PARTS:
            _write(path, part, PARTS[part]())
        print(tables(json.loads(path.read_text("utf-8"))))


def _write(path: Path, part: str, measured: dict[str, Any]) -> None:
    """Replace one part of the results."""
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    environment = detect("tiny", "cpu", "bfloat16").environment.model_dump(mode="json")
    result = {
        **known,
        "schema": SCHEMA,
        "target": TARGET,
        part: {"environment": environment, **measured},
    }
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def commands() -> dict[str, Any]:
    """The command on the bundled model."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [_command(precision, Path(folder) / precision) for precision in PRECISIONS]
    return {"rows": rows}


def depths() -> dict[str, Any]:
    """True width at reduced depth, and the whole model by lines through that."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [_depth(double, single, Path(folder)) for double, single in DEPTHS]
    whole = graph_bytes(_transformer(*FULL, "meta"), FAMILY, "fp8")
    return {"rows": rows, "full": extrapolated(rows, whole, sum(FULL))}


PARTS = {"commands": commands, "depths": depths}


# The command


def _command(precision: str, folder: Path) -> dict[str, Any]:
    """`hasten export tensorrt` on the bundled model, three times."""
    folder.mkdir()
    others = _Others()
    cache, out = folder / "cache", folder / "out"
    first = _export(precision, cache, out)
    engine, manifest = (out / "engine.plan").read_bytes(), _manifest(out)
    repeat = _export(precision, cache, out)
    shutil.rmtree(cache)
    _export(precision, cache, folder / "again")
    row = {
        "precision": precision,
        "others": others.cores(),
        "seconds": first,
        "repeat_seconds": repeat,
        "rebuilt_is_identical": (folder / "again" / "engine.plan").read_bytes() == engine,
        "engine_bytes": len(engine),
        "stages": manifest["stages"],
        "verification": manifest["verification"],
    }
    _say(f"tiny {precision}: {first:.1f} s, repeated {repeat:.1f} s")
    return row


def _export(precision: str, cache: Path, out: Path) -> float:
    """Seconds of the whole process."""
    arguments = ["--model", "tiny", "--precision", precision, "--target", TARGET, "--out", str(out)]
    start = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-c", "from hasten.cli import main; main()"),
            *("export", "tensorrt", *arguments),
        ],
        env={**python_environment(), "HASTEN_CACHE": str(cache)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def _manifest(out: Path) -> Any:
    return json.loads((out / "manifest.json").read_text("utf-8"))


# True width at reduced depth


def _depth(double: int, single: int, folder: Path) -> dict[str, Any]:
    """One depth: weights, both exports, the check and the build, each in a process of its own."""
    others, place = _Others(), folder / f"{double}-{single}"
    place.mkdir()
    here = (str(double), str(single), str(place))
    _job("weights", *here)
    row: dict[str, Any] = {"double": double, "single": single}
    for job in ("streamed", "naive"):
        row[job] = _job(job, *here)
    graph = place / "streamed" / GRAPH
    row["graph_bytes"] = graph.with_name(DATA).stat().st_size
    row["verified"] = _job("verified", *here) if double + single <= VERIFIED else None
    row["built"] = build(graph, place / "engine.plan", [TARGET], SHAPES)._asdict()
    row["others"] = others.cores()
    shutil.rmtree(place)
    _say(f"{double} + {single} blocks: done")
    return row


def _job(name: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        python_command("studies.tensorrt", "--job", name, *arguments),
        env=python_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _weights(double: str, single: str, place: str) -> dict[str, Any]:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    transformer = variance_preserving_(_transformer(int(double), int(single), "cpu"))
    save_file(transformer.state_dict(), Path(place) / "weights.safetensors")
    return {}


def _streamed(double: str, single: str, place: str) -> dict[str, Any]:
    """hasten's export, which never has all weights in memory at the same time."""
    transformer, amax = _mapped(int(double), int(single), Path(place))
    folder = Path(place) / "streamed"
    folder.mkdir()
    return _measured(lambda: export_onnx(transformer, FAMILY, "fp8", amax, SHAPES, folder))


def _naive(double: str, single: str, place: str) -> dict[str, Any]:
    """The export of torch.onnx: the whole quantised model, with its weights."""
    transformer, amax = _mapped(int(double), int(single), Path(place))
    folder = Path(place) / "naive"
    folder.mkdir()

    def export() -> None:
        inputs = sample(transformer, FAMILY, SHAPES, 4, 6, torch.bfloat16, seed=0)
        program = torch.onnx.export(
            Step(in_precision(transformer, "fp8", amax), FAMILY).eval(),
            kwargs=inputs,
            dynamo=True,
            opset_version=20,
            input_names=list(inputs),
            output_names=[OUTPUT],
            dynamic_shapes=SHAPES.dynamic(),
            verbose=False,
        )
        program.save(folder / GRAPH, external_data=True)

    with torch.no_grad():
        return _measured(export)


def _verified(double: str, single: str, place: str) -> dict[str, Any]:
    transformer, amax = _mapped(int(double), int(single), Path(place))
    graph, scratch = Path(place) / "streamed" / GRAPH, Path(place) / "scratch"
    scratch.mkdir()
    found: dict[str, Any] = {}

    def check() -> None:
        told = verify(transformer, FAMILY, graph, "fp8", amax, SHAPES, scratch)
        found.update(told.model_dump(mode="json"))

    measured = _measured(check)
    return {**measured, "verification": found}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "weights": _weights,
    "streamed": _streamed,
    "naive": _naive,
    "verified": _verified,
}


def _measured(work: Callable[[], None]) -> dict[str, Any]:
    """Seconds, by the clock and of all cores; this process's memory before and its peak, in bytes.

    The seconds of the cores hardly depend on what else the machine is doing.
    """
    before, start, cores = status_bytes("RssAnon"), time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        work()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cores,
        "bytes_before": before,
        "peak_bytes": memory.bytes,
    }


def _mapped(double: int, single: int, place: Path) -> tuple[Any, dict[str, Amax]]:
    """The model with its weights mapped from their file, and scales for it."""
    from safetensors.torch import load_file

    transformer = _transformer(double, single, "meta")
    weights = load_file(place / "weights.safetensors")
    transformer.load_state_dict(weights, assign=True)
    amax = {
        name: Amax(INPUT_AMAX, float(linear.weight.abs().max()))
        for name, linear in FAMILY.quantizable(transformer)
    }
    return transformer, amax


def _transformer(double: int, single: int, device: str) -> Any:
    """FLUX.1-dev's width in bfloat16, this many blocks of either kind."""
    from diffusers import FluxTransformer2DModel

    config = {**FLUX_1_DEV.transformer, "num_layers": double, "num_single_layers": single}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return FluxTransformer2DModel(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


# From three depths to the whole model


def extrapolated(depths: list[dict[str, Any]], graph_bytes: int, blocks: int) -> dict[str, Any]:
    """The whole model by lines through the depths: export seconds go with the blocks, everything
    else with the bytes of the graph's weights. Each has its slope, and the largest distance of a
    measured point from its line."""
    counts = [row["double"] + row["single"] for row in depths]
    sizes = [row["graph_bytes"] for row in depths]
    lines = {
        "export_seconds": (counts, [row["streamed"]["seconds"] for row in depths], blocks),
        "export_peak_bytes": (
            sizes,
            [row["streamed"]["peak_bytes"] for row in depths],
            graph_bytes,
        ),
        "build_seconds": (sizes, [row["built"]["seconds"] for row in depths], graph_bytes),
        "build_peak_bytes": (sizes, [row["built"]["peak_bytes"] for row in depths], graph_bytes),
        "engine_bytes": (sizes, [row["built"]["bytes"] for row in depths], graph_bytes),
    }
    found: dict[str, Any] = {"blocks": blocks, "graph_bytes": graph_bytes}
    for name, (xs, ys, at) in lines.items():
        slope, start = np.polyfit(xs, ys, 1)
        off = max(abs(slope * x + start - y) for x, y in zip(xs, ys, strict=True))
        found[name] = {
            "value": float(slope * at + start),
            "slope": float(slope),
            "start": float(start),
            "largest_residual": float(off),
        }
    return found


# Tables


def tables(result: dict[str, Any]) -> str:
    """The tables of docs/tensorrt.md, in Markdown."""
    rows, parts = [], []
    if part := result.get("commands"):
        rows += part["rows"]
        parts += [_command_table(part["rows"]), _verification_table(part["rows"])]
    if part := result.get("depths"):
        rows += part["rows"]
        busy = any(row["others"] > BUSY for row in part["rows"])
        parts += [_depth_table(part["rows"]), _full_table(part["full"], "*" * busy)]
    if any(row["others"] > BUSY for row in rows):
        parts.append(f"\\* other processes ran: they took more than {BUSY} cores on average")
    return "\n\n".join(parts)


def pictures(result: dict[str, Any]) -> str:
    """The table of a `hasten bench` with engines: quality, or the reason for not running."""
    lines = ["| recipe | computed | LPIPS | SSIM | PSNR dB | |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        if row["status"] != "ok":
            reason = row["reason"].partition("; fix:")[0]
            lines.append(f"| `{row['recipe']}` | – | – | – | – | {row['status']}: {reason} |")
        elif row["recipe"] not in ("baseline", "baseline-again"):
            seen, steps = row["quality"][0], row["steps_computed"]["mean"]
            lines.append(
                f"| `{row['recipe']}` | {steps:.0f} | {seen['lpips']:.4f} | {seen['ssim']:.4f} "
                f"| {seen['psnr']:.1f} | {seen['n']} prompts |"
            )
    return "\n".join(lines)


def _command_table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(stage["name"] for row in rows for stage in row["stages"]))
    lines = [
        f"| `tiny` | {' | '.join(names)} | all, s | repeated, s | engine, MB | rebuilt |",
        "|---" * (len(names) + 5) + "|",
    ]
    for row in rows:
        stages = {stage["name"]: stage for stage in row["stages"]}
        cells = [_stage(stages.get(name)) for name in names]
        same = "identical" if row["rebuilt_is_identical"] else "DIFFERS"
        lines.append(
            f"| {row['precision']}{_mark(row)} | {' | '.join(cells)} | {row['seconds']:.1f} "
            f"| {row['repeat_seconds']:.1f} | {row['engine_bytes'] / 1e6:.1f} | {same} |"
        )
    return "\n".join(lines)


def _stage(stage: dict[str, Any] | None) -> str:
    if stage is None:
        return "–"
    peak = "" if stage["peak_bytes"] is None else f", {stage['peak_bytes'] / GIB:.2f} GiB"
    return f"{stage['seconds']:.1f} s{peak}"


def _verification_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| `tiny` | tokens | velocity | worst block | torch, nudged | to unquantised |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for size in row["verification"]["sizes"]:
            errors = [size["whole"], max(size["blocks"].values())]
            errors += [size["control"], size["unquantised"]]
            cells = " | ".join("–" if error is None else f"{error:.1e}" for error in errors)
            lines.append(f"| {row['precision']} | {size['height']}×{size['width']} | {cells} |")
    return "\n".join(lines)


def _depth_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| FLUX.1-dev wide | graph, GB | export, s | its peak, GiB | torch.onnx alone, s "
        "| its peak, GiB | verify, s | its peak, GiB | build, s | its peak, GiB | engine, GB |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        jobs = (row["streamed"], row["naive"], row["verified"], row["built"])
        cells = " | ".join(_seconds_and_peak(job) for job in jobs)
        lines.append(
            f"| {row['double']} + {row['single']} blocks{_mark(row)} "
            f"| {row['graph_bytes'] / 1e9:.2f} | {cells} | {row['built']['bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def _seconds_and_peak(job: dict[str, Any] | None) -> str:
    if job is None:
        return "– | –"
    return f"{job['seconds']:.1f} | {job['peak_bytes'] / GIB:.2f}"


def _full_table(full: dict[str, Any], mark: str) -> str:
    value = {name: line["value"] for name, line in full.items() if isinstance(line, dict)}
    slope = {name: line["slope"] for name, line in full.items() if isinstance(line, dict)}
    export = f"{value['export_seconds']:.0f} s ({slope['export_seconds']:.1f} s a block)"
    build = f"{value['build_seconds']:.0f} s ({slope['build_seconds'] * 1e9:.1f} s a GB)"
    peak = f"{value['build_peak_bytes'] / GIB:.1f} GiB ({slope['build_peak_bytes']:.2f}"
    return "\n".join(
        [
            f"| FLUX.1-dev in FP8, {full['blocks']} blocks, extrapolated | |",
            "|---|---|",
            f"| weights in the graph | {full['graph_bytes'] / 1e9:.2f} GB |",
            f"| export{mark} | {export}, {value['export_peak_bytes'] / GIB:.1f} GiB |",
            f"| build{mark} | {build}, {peak} × the weights and more) |",
            f"| engine | {value['engine_bytes'] / 1e9:.2f} GB |",
        ]
    )


def _mark(row: dict[str, Any]) -> str:
    return "*" if row["others"] > BUSY else ""


class _Others:
    """What other processes of this machine take of its cores, from now on."""

    def __init__(self) -> None:
        self.began, self.busy = time.perf_counter(), self._busy()

    def cores(self) -> float:
        return (self._busy() - self.busy) / (time.perf_counter() - self.began)

    def _busy(self) -> float:
        """CPU seconds since the machine was started, without those of ours that have ended."""
        ticks = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        idle = int(ticks[3]) + int(ticks[4])
        everything = sum(map(int, ticks[:8])) - idle
        return everything / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
