"""Train the bundled model: `python -m training.train --pack training/work/pack.zip --run DIR`.

Phases run in order and a finished one is skipped, so the same command, given again, goes on where
the last call stopped. `--minutes` ends the call; `--seconds flow=600` sets a phase's training time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging

from training.autoencoder import train_autoencoder
from training.bundle import bundle
from training.classifier import train_classifier
from training.data import Pack, load_pack
from training.distill import train_distill
from training.evaluate import evaluate
from training.flow import train_flow
from training.latents import encode_latents
from training.package import package
from training.run import Run
from training.shrink import train_shrink

__all__ = ["BUDGETS", "PHASES", "main"]

BUDGETS = {
    "classifier": 45.0,
    "autoencoder": 130.0,
    "flow": 540.0,
    "distill": 110.0,
    "shrink": 100.0,
}
LEAST_SECONDS = 60.0  # a phase is not begun with less of the call left: compiling takes that
SMOKE_SECONDS = 1.5
SMOKE_THINGS = 6
TIMED: dict[str, Callable[[Run, Pack, float], None]] = {
    "classifier": train_classifier,
    "autoencoder": train_autoencoder,
    "flow": train_flow,
    "distill": train_distill,
    "shrink": train_shrink,
}
UNTIMED: dict[str, Callable[[Run, Pack], None]] = {
    "latents": encode_latents,
    "evaluate": evaluate,
    "package": package,
}
PHASES = (
    "classifier",
    "autoencoder",
    "latents",
    "flow",
    "distill",
    "shrink",
    "evaluate",
    "package",
)


def run_phase(run: Run, pack: Pack, phase: str, budget: float) -> bool:
    """Run one phase; False if the call's time ended before the phase did."""
    started = time.monotonic()
    if run.finished(phase) is not None:
        return True
    if run.deadline - started < (0.0 if run.smoke else LEAST_SECONDS):
        return False
    if phase in TIMED:
        TIMED[phase](run, pack, budget)
    else:
        UNTIMED[phase](run, pack)
    print(f"[{phase}] took {time.monotonic() - started:.1f} s in this call", flush=True)
    return run.finished(phase) is not None


def summary(run: Run) -> str:
    lines = []
    for phase in PHASES:
        numbers = run.finished(phase)
        told = "-" if numbers is None else "  ".join(f"{k}={v:.4g}" for k, v in numbers.items())
        lines.append(f"{phase:12s} {told}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="directory of checkpoints")
    parser.add_argument("--phase", default="all", help=f"all, or some of {','.join(PHASES)}")
    parser.add_argument("--minutes", type=float, default=1e6, help="end this call after so long")
    parser.add_argument("--seconds", nargs="*", default=[], metavar="PHASE=S")
    parser.add_argument("--bundle", type=Path, help="write the results there, in parts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="everything tiny, for a CPU test")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def budgets(given: list[str], *, smoke: bool) -> dict[str, float]:
    chosen = dict.fromkeys(BUDGETS, SMOKE_SECONDS) if smoke else dict(BUDGETS)
    for item in given:
        phase, _, seconds = item.partition("=")
        if phase not in chosen:
            raise SystemExit(f"--seconds {item}: the timed phases are {', '.join(chosen)}")
        chosen[phase] = float(seconds)
    return chosen


def main() -> None:
    started = time.monotonic()
    given = arguments()
    phases = PHASES if given.phase == "all" else tuple(given.phase.split(","))
    unknown = set(phases) - set(PHASES)
    if unknown:
        raise SystemExit(f"--phase {given.phase}: the phases are {', '.join(PHASES)}")
    diffusers_logging.set_verbosity_error()
    # Its backward pass crashed at these shapes (head width 48, 96 tokens).
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device(given.device)
    deadline = started + 60 * given.minutes
    run = Run(given.run, device, deadline, given.seed, given.smoke, given.compile)
    pack = load_pack(given.pack, device, limit=SMOKE_THINGS if given.smoke else None)
    seconds = budgets(given.seconds, smoke=given.smoke)
    run.path("arguments.json").write_text(json.dumps(vars(given), default=str, indent=2))
    print(f"[train] ready after {time.monotonic() - started:.1f} s on {device}", flush=True)
    for phase in phases:
        if not run_phase(run, pack, phase, seconds.get(phase, 0.0)):
            print(f"[{phase}] stopped by the end of the call; give the command again", flush=True)
            break
    if given.bundle is not None:
        bundle(run, given.bundle)
    print(summary(run), flush=True)
    print(f"[train] {time.monotonic() - started:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
