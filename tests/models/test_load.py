"""Loading: names, defaults, and one clear error for each way in which it can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

import hasten
from hasten.errors import HastenError, InputError, ModelError
from hasten.machine import DTYPES
from hasten.models import has_random_weights, load_pipeline
from hasten.models.defaults import (
    TINY_DIR,
    ModelDefaults,
    check_model,
    defaults_for,
    model_directory,
)

tiny = pytest.mark.skipif(
    not (TINY_DIR / "model_index.json").exists(), reason="the bundled model is not in this checkout"
)


@tiny
def test_the_bundled_model_loads_and_its_defaults_reach_the_call() -> None:
    pipe = load_pipeline("tiny", device="cpu")
    assert not has_random_weights(pipe)
    fast = hasten.optimize(pipe, "baseline")
    latents = fast("a drawing of a red apple", num_inference_steps=2, output_type="latent").images
    assert latents.shape == (1, 64, 64)
    assert fast.last_run.steps == 2


@tiny
@pytest.mark.parametrize("victim", ["transformer", "vae"])
def test_a_truncated_file_is_named_corrupt(tmp_path: Path, victim: str) -> None:
    broken = tmp_path / "model"
    shutil.copytree(TINY_DIR, broken)
    weights = next((broken / victim).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="truncated or corrupt") as caught:
        load_pipeline(str(broken), device="cpu")
    assert len(caught.value.faults) == 1
    assert "\n" not in caught.value.faults[0]


@tiny
def test_a_missing_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(TINY_DIR, broken)
    for weights in (broken / "transformer").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ModelError) as caught:
        load_pipeline(str(broken), device="cpu")
    assert len(caught.value.faults) == 1
    assert caught.value.fix


@pytest.mark.parametrize("look", [check_model, load_pipeline])
def test_names_that_cannot_be_a_model(look: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        look(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        look(str(tmp_path))
    with pytest.raises(ModelError, match="no such model directory"):
        look("notamodel")
    with pytest.raises(InputError, match=r"use one of shape:flux\.1-dev"):
        look("shape:nonesuch")


def test_names_that_may_be_a_model(saved_model: Path) -> None:
    for name in (str(saved_model), "owner/name", "shape:flux.1-dev"):
        check_model(name)


def test_a_bundled_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hasten.models.defaults.TINY_DIR", tmp_path / "nowhere")
    with pytest.raises(ModelError, match="missing from this installation"):
        check_model("tiny")


def raising(error: Exception) -> Callable[..., Any]:
    def from_pretrained(*_: Any, **__: Any) -> Any:
        raise OSError("could not load") from error

    return from_pretrained


@pytest.mark.parametrize(
    ("error", "fault", "fix"),
    [
        (GatedRepoError, "the model is gated", "HF_TOKEN"),
        (RepositoryNotFoundError, "no such pipeline on the hub", "spelling"),
        (LocalEntryNotFoundError, "hub cannot be reached", "HF_HUB_OFFLINE"),
        (MemoryError, "not enough memory to load it", "--dtype bfloat16"),
        (ConnectionError, "hub cannot be reached", "local directory"),
        (RuntimeError, "cannot be loaded: OSError", "from_pretrained"),
    ],
)
def test_failures_each_get_their_fix(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], fault: str, fix: str
) -> None:
    made = error.__new__(error)
    Exception.__init__(made, "first line\nsecond line")
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", raising(made))
    with pytest.raises(ModelError, match=fault) as caught:
        load_pipeline("black-forest-labs/FLUX.1-dev", device="cpu")
    assert fix in caught.value.fix
    assert "\n" not in caught.value.faults[0]


def test_devices_and_dtypes() -> None:
    model = "shape:flux.1-dev"
    with pytest.raises(InputError, match="'quantum' is not one of"):
        load_pipeline(model, device="quantum")
    with pytest.raises(InputError, match="not a dtype"):
        load_pipeline(model, device="cpu", dtype="float3")
    with pytest.raises(InputError, match="cuda:99"):
        load_pipeline(model, device="cuda:99")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_torchs(saved_model: Path, dtype: str) -> None:
    for given in (dtype, getattr(torch, dtype)):
        pipe = load_pipeline(str(saved_model), device="cpu", dtype=given)
        assert pipe.transformer.dtype is getattr(torch, dtype)


def test_defaults(tmp_path: Path) -> None:
    assert defaults_for("black-forest-labs/FLUX.1-dev") == ModelDefaults()
    assert defaults_for("shape:flux.1-dev").width == 512
    (tmp_path / "hasten.json").write_text(json.dumps({"width": 64, "height": 96, "steps": 8}))
    assert defaults_for(str(tmp_path)).height == 96
    (tmp_path / "hasten.json").write_text(json.dumps({"width": 65}))
    with pytest.raises(ModelError, match="correct the file"):
        defaults_for(str(tmp_path))


def test_which_names_are_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_directory("tiny") == TINY_DIR
    assert model_directory("shape:flux.1-dev") is None
    assert model_directory("black-forest-labs/FLUX.1-dev") is None
    assert model_directory("./here") == Path("here")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert model_directory("a/b") == Path("a/b")


@pytest.mark.parametrize(
    ("name", "kind", "fix"),
    [
        ("flux1-dev.safetensors", "a file of weights,", "from_single_file("),
        ("flux1-dev-Q4_K_S.gguf", "a file of GGUF weights", "GGUFQuantizationConfig"),
        ("notes.txt", "a file", "save_pretrained"),
    ],
)
def test_a_single_file_is_called_what_it_is(tmp_path: Path, name: str, kind: str, fix: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=f"{name}: {kind}") as caught:
        check_model(str(tmp_path / name))
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"steps": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"guidance": 1e999}', "guidance: Input should be less than or equal to 100"),
        ('{"guidance": NaN}', "guidance"),
        ('{"stepz": 1}', "stepz: Extra inputs are not permitted"),
        ("[]", "it: Input should be"),
        ("", "not valid JSON"),
    ],
    ids=lambda text: text[:12],
)
def test_defaults_that_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "hasten.json").write_text(content)
    with pytest.raises(ModelError, match=words) as caught:
        defaults_for(str(tmp_path))
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nosuchuser/m", "a\x1b[2Jb"])
def test_names_that_no_system_takes(name: str) -> None:
    with pytest.raises(HastenError) as caught:
        check_model(name)
    assert caught.value.faults[0].isprintable()


def test_loading_is_silent_in_a_pipe_and_leaves_the_libraries_as_they_were(
    saved_model: Path,
) -> None:
    program = (
        "import logging, sys, warnings, hasten\n"
        "filters = list(warnings.filters)\n"
        "pipe = hasten.load_pipeline(sys.argv[1], device='cpu')\n"
        "from diffusers.utils import logging as diffusers\n"
        "from transformers.utils import logging as transformers\n"
        "assert diffusers.is_progress_bar_enabled() and transformers.is_progress_bar_enabled()\n"
        "assert logging.getLogger('diffusers').level == logging.WARNING\n"
        "assert logging.getLogger('transformers').level == logging.WARNING\n"
        "assert not getattr(pipe, '_progress_bar_config', {}).get('disable')\n"
    )
    environment = {name: value for name, value in os.environ.items() if "VERBOSITY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved_model)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
