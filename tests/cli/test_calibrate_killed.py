"""`hasten calibrate` killed at some moment: nothing half-written, and --resume ends the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hasten.cli import main
from hasten.sealed import unseal

PROGRAM = [sys.executable, "-c", "import sys; from hasten.cli import main; sys.exit(main())"]
TRIALS = 12  # a third of those that the calibration below makes


def arguments(model: Path, out: Path) -> list[str]:
    prompts = out.with_name("prompts.txt")
    prompts.write_text("".join(f"red word{number}\n" for number in range(4, 16)))
    given = ["--model", model, "--prompts", prompts, "--limit", "2", "--steps", "12", "--out", out]
    return [*map(str, given), "--device", "cpu", "--budget", "3", "--climb", "90"]


def stop_after(running: subprocess.Popen[str], state: Path, trials: int, number: int) -> None:
    """Send a signal once this many trials are kept, or at once when the first recording is."""
    file = state / "calibration.json"
    while running.poll() is None:
        recorded = any(state.glob("recording-*"))
        if recorded and (not trials or (file.is_file() and _trials(file) >= trials)):
            running.send_signal(number)
            return
        time.sleep(0.002)


def _trials(file: Path) -> int:
    return len(unseal(file.read_bytes())["trials"])


@pytest.fixture(scope="module")
def uninterrupted(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("whole") / "schedule.toml"
    assert main(["calibrate", *arguments(saved_model, out)]) == 0
    return out.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_calibration_is_resumed_to_the_same_recipe(
    saved_model: Path, tmp_path: Path, uninterrupted: str, number: signal.Signals
) -> None:
    out = tmp_path / "schedule.toml"
    state = tmp_path / "schedule.toml.partial"
    calibrate = ["calibrate", *arguments(saved_model, out)]
    trials = random.Random(int(number)).randrange(TRIALS)
    running = subprocess.Popen(
        [*PROGRAM, *calibrate], text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    stop_after(running, state, trials, number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == (-number if number == signal.SIGKILL else 130)
    if number != signal.SIGKILL:
        assert err.splitlines() == [
            f"{state} keeps what is done; --resume continues there",
            "error: interrupted",
        ]
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
    assert not out.exists()
    assert main([*calibrate, "--resume"]) == 0
    assert out.read_text("utf-8") == uninterrupted
    assert sorted(tmp_path.iterdir()) == [tmp_path / "prompts.txt", out]
