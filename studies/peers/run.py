"""Time whole images of rows side by side on one device.

    python -m studies.peers.run --device cuda --sizes 512 1024 --rounds 3 --out DIR
    python -m studies.peers.run --rows diffusers-compile cache-dit-fp8-compile:18,17 hasten:max
    python -m studies.peers.run --deadline 580 --setup-limit 240   # ends by then, whatever runs
    python -m studies.peers.run --warm                 # each row once more, compile caches warm
    python -m studies.peers.run --device cpu --model tiny --sizes 64 128 --steps 4 --rounds 1

Each row runs in a separate process. DIR/SIZE/results.json is complete after every stage, and at the
end a report is written next to it. DIR/logs has the output of the rows' libraries. The exit status
is 1 if not every row was measured.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from studies.peers.race import Options, Race
from studies.peers.record import Record
from studies.peers.remote import Clock
from studies.peers.results import all_results, write_all, write_reports
from studies.peers.rows import KINDS, Spec, read_spec
from studies.peers.workload import Workload

from hasten.benchmark.environment import DetectedEnvironment, detect_in_process
from hasten.errors import HastenError
from hasten.models.defaults import check_model, defaults_for
from hasten.recipe import preset_names
from hasten.report import table
from hasten.results import Environment, Results

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
PEERS = [  # rows of eight bits side by side: two of them fit beside the base in 80 GB
    "diffusers-compile",
    "cache-dit-eager",
    "diffusers-torchao-fp8",
    "cache-dit-fp8-compile",
]
PRESETS = ["lossless", "fp8", "balanced", "max"]
LAST = ["flux-fast"]  # may take its whole setup limit
PACKAGES = (
    "triton", "accelerate", "peft", "torchao", "mslk",
    "cache-dit", "flash-attn", "nvidia-cudnn-cu13",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    clock = Clock(options.deadline)
    try:
        rows = dict.fromkeys(options.rows or _default_rows())
        specs = [read_spec(text, options.computed) for text in rows]
        _check(options)
        here = _surroundings(options)
        workload = _workload(options, here)
    except (ValueError, HastenError) as error:
        raise SystemExit(str(error)) from None
    environment = _environment(here)
    command = shlex.join(["python", "-m", "studies.peers.run", *arguments])

    def written(records: Sequence[Record]) -> dict[str, Results]:
        found = all_results(records, workload, environment, command)
        write_all(found, options.out)
        return found

    records = _race(specs, workload, options, written, clock)
    found = written(records)
    write_reports(found, options.out)
    print("\n".join(table.to_markdown(one) for one in found.values()), flush=True)
    if any(record.status != "ok" for record in records):
        raise SystemExit(1)


def _race(
    specs: Sequence[Spec],
    workload: Workload,
    options: argparse.Namespace,
    write: Callable[[Sequence[Record]], object],
    clock: Clock,
) -> list[Record]:
    limits = Options(options.setup_limit, options.image_limit, options.resident, options.warm)

    def save() -> None:
        write(race.rows)

    def say(line: str) -> None:
        print(f"{clock.spent():6.1f} s  {line}", flush=True)

    race = Race(workload, limits, clock, save, say)
    before = signal.signal(signal.SIGTERM, _stop)  # for the processes to be ended with us
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            race.run(specs, Path(scratch), options.out / "logs")
    finally:
        signal.signal(signal.SIGTERM, before)
    return race.rows


def _check(options: argparse.Namespace) -> None:
    check_model(options.model)
    wrong = [size for size in options.sizes if size % 16 or size < 16]
    if wrong:
        raise ValueError(f"sizes {wrong} are not multiples of 16")
    if options.steps < 1 or options.rounds < 1:
        raise ValueError("--steps and --rounds are 1 or more")


def _surroundings(options: argparse.Namespace) -> DetectedEnvironment:
    here = detect_in_process("tiny", options.device, options.dtype)
    if here.fault:
        raise ValueError(f"{here.fault}: {here.fix}")
    return here


def _workload(options: argparse.Namespace, here: DetectedEnvironment) -> Workload:
    defaults = defaults_for(options.model)
    return Workload(
        model=options.model,
        device=here.device,
        dtype=here.dtype,
        sizes=tuple(options.sizes),
        steps=options.steps,
        rounds=options.rounds,
        tokens=defaults.max_sequence_length,
        guidance=defaults.guidance,
    )


def _environment(here: DetectedEnvironment) -> Environment:
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    return here.environment.model_copy(update={"packages": versions})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _default_rows() -> list[str]:
    own = [f"hasten:{name}" for name in PRESETS if name in preset_names()]
    return [*PEERS, *own, *LAST]


def _stop(*_: Any) -> None:
    raise SystemExit("stopped by a signal")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    known = ", ".join(KINDS)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"KIND or KIND:ARGUMENT; {known}")
    parser.add_argument("--computed", nargs="+", type=int, default=[18], metavar="K",
                        help="steps of cache-dit's masks where a row names none")  # fmt: skip
    parser.add_argument("--model", default="shape:flux.1-dev")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024], metavar="PIXELS")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resident", type=int, default=0, help="rows at once; 0: what fits")
    parser.add_argument("--setup-limit", type=float, default=300, metavar="SECONDS",
                        help="from loaded weights to the first image at the last size")  # fmt: skip
    parser.add_argument("--image-limit", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="end by then")
    parser.add_argument("--warm", action="store_true", help="measure starts with warm caches too")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "peers")
    return parser


if __name__ == "__main__":
    main()
