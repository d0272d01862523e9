"""The environment as recorded, and the commit only of hasten's own checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import hasten
from hasten.benchmark.environment import commit, detect, detect_in_process
from hasten.errors import HastenError, UnsupportedError


def test_this_machine() -> None:
    here = detect("tiny", "cpu", "auto")
    assert (here.device, here.dtype, here.fault) == ("cpu", "float32", None)
    assert here.environment.torch == torch.__version__
    assert here.environment.cpu
    assert here.environment.threads == torch.get_num_threads()
    assert here.environment.date.endswith("+00:00")


def test_from_another_process_it_is_the_same() -> None:
    there, here = detect_in_process("tiny", "cpu", "bfloat16"), detect("tiny", "cpu", "bfloat16")
    assert there.dtype == "bfloat16"
    assert there.environment.torch == here.environment.torch


def test_a_python_that_cannot_look_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.benchmark.environment.bound_command", lambda *_: ["false"])
    with pytest.raises(HastenError, match="no error output") as caught:
        detect_in_process("tiny", "cpu", "auto")
    assert len(caught.value.faults) == 1


def test_the_commit_is_that_of_a_checkout_that_tracks_hasten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "hasten" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("")
    monkeypatch.setattr(hasten, "__file__", str(package))
    assert commit() is None
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "somebody else's")
    assert commit() is None
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "hasten")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert commit() == head
    package.write_text("changed = True")
    assert commit() == f"{head}-dirty"


def _git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *author, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_model_that_does_not_fit_is_refused_before_any_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hasten.models.load.free_memory", lambda: 2**30)
    monkeypatch.setattr("hasten.benchmark.plan.detect_in_process", detect)
    with pytest.raises(UnsupportedError, match=r"takes 62\.8 GiB of memory") as caught:
        hasten.bench("shape:flux.1-dev", device="cpu", out=tmp_path / "out")
    assert len(caught.value.faults) == 1
    assert not (tmp_path / "out").exists()
