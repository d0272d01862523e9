"""The loop's clock and schedule, and the whole recipe at toy size."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from training.bundle import shrunk
from training.optimise import Average, Job, fit, learning_rate
from training.run import Run

from training import train

PACK = Path(__file__).parents[2] / "training" / "work" / "pack.zip"


def make_run(folder: Path, seconds: float = 60.0) -> Run:
    return Run(folder, torch.device("cpu"), time.monotonic() + seconds, smoke=True, compile=False)


def test_schedule() -> None:
    assert learning_rate(1.0, 0.0, 0, 10) == pytest.approx(0.1)
    assert learning_rate(1.0, 0.0, 9, 10) == pytest.approx(1.0)
    assert learning_rate(1.0, 0.5, 99, 10) == pytest.approx(0.505)
    assert learning_rate(1.0, 1.0, 99, 10) == pytest.approx(0.01)


def test_average_follows_a_constant() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = Average([weight], limit=0.9)
    with torch.no_grad():
        weight.fill_(1.0)
    for step in range(400):
        average.update(step)
    assert float(average.mean[0]) == pytest.approx(1.0, abs=1e-3)


def quadratic(model: nn.Linear):
    return lambda _generator: (model.weight - 3).square().sum()


def test_a_stopped_phase_goes_on_where_it_stopped(tmp_path: Path) -> None:
    job = Job("toy", 0.6, 0.1, 5, 0.9)
    model = nn.Linear(1, 1, bias=False)
    first = fit(make_run(tmp_path, 0.2), job, model, quadratic(model))
    assert 0.0 < first.progress < 1.0
    again = nn.Linear(1, 1, bias=False)
    second = fit(make_run(tmp_path), job, again, quadratic(again))
    assert second.progress == 1.0
    assert second.step > first.step
    assert again.weight.item() == pytest.approx(3.0, abs=0.05)


def test_a_checkpoint_that_travelled_goes_on_too(tmp_path: Path) -> None:
    job = Job("toy", 0.6, 0.1, 5, 0.9)
    model = nn.Linear(1, 1, bias=False)
    run = make_run(tmp_path, 0.3)
    first = fit(run, job, model, quadratic(model))
    run.save("toy.pt", shrunk("toy", run.load("toy.pt")))
    again = nn.Linear(1, 1, bias=False)
    second = fit(make_run(tmp_path), job, again, quadratic(again))
    assert second.progress == 1.0
    assert second.first_step == first.step
    assert again.weight.item() == pytest.approx(3.0, abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not PACK.exists(), reason="needs `python -m training.prepare`")
def test_every_phase_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    given = f"train --pack {PACK} --run {folder} --smoke --no-compile --bundle {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", given.split())
    train.main()
    assert (folder / "tiny_flux" / "model_index.json").exists()
    assert list((tmp_path / "out").glob("bundle.tar.*"))


@pytest.fixture(autouse=True)
def _keep_backends():
    kept = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cuda.enable_cudnn_sdp(kept[0])
    torch.set_float32_matmul_precision(kept[1])
