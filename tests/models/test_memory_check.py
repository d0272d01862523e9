"""A model that does not fit into memory is refused before any of it is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hasten.errors import UnsupportedError
from hasten.models import load_pipeline, room
from hasten.models.architecture import FLUX_1_DEV
from hasten.models.memory_check import converted_bytes
from hasten.models.random_weights import shape_bytes
from tests.hub_cache import write_hub_cache

GIB = 2**30
TOO_LITTLE = 1000


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: TOO_LITTLE)


def parameters(model: Path) -> int:
    pipe = load_pipeline(str(model), device="cpu")
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    return sum(weight.numel() for part in parts for weight in part.parameters())


def test_what_is_stored_in_the_dtype_takes_no_memory(saved_model: Path) -> None:
    """Its files are mapped. Of the others, each weight counts once."""
    assert converted_bytes(saved_model, torch.float32) == 0
    assert converted_bytes(saved_model, torch.bfloat16) == 2 * parameters(saved_model)


def test_files_that_no_component_is_loaded_from(saved_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved_model, model)
    before = converted_bytes(model, torch.bfloat16)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    for copy in ("diffusion_pytorch_model.fp16", "diffusion_pytorch_model-00001-of-00001"):
        shutil.copyfile(weights, weights.with_name(f"{copy}.safetensors"))
    shutil.copyfile(weights, model / "everything.safetensors")
    assert converted_bytes(model, torch.bfloat16) == before
    weights.unlink()
    assert converted_bytes(model, torch.bfloat16) == before  # of the one part


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\2" + b"\0" * 7 + b"[]", None])
def test_files_that_cannot_be_read_count_nothing(
    saved_model: Path, tmp_path: Path, content: bytes | None
) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved_model, model)
    for weights in model.rglob("*.safetensors"):
        weights.unlink() if content is None else weights.write_bytes(content)
    assert converted_bytes(model, torch.bfloat16) == 0
    (model / "model_index.json").write_text("{")
    assert converted_bytes(model, torch.bfloat16) == 0


@pytest.mark.usefixtures("little_memory")
def test_a_directory_and_a_model_of_the_hub(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hub_cache(tmp_path / "hub", "someone/small", saved_model)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for model in (str(saved_model), "someone/small"):
        with pytest.raises(UnsupportedError, match="loading it in bfloat16 takes") as caught:
            load_pipeline(model, device="cpu", dtype="bfloat16")
        assert caught.value.faults[0].endswith("of memory, and 1 KiB are free here")
    load_pipeline(str(saved_model), device="cpu", dtype="float32")  # as it is stored


def test_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shape_bytes(FLUX_1_DEV, torch.bfloat16) == pytest.approx(33.7e9, rel=0.01)
    monkeypatch.setattr(room, "free_memory", lambda: 48 * GIB)
    with pytest.raises(UnsupportedError) as caught:
        load_pipeline("shape:flux.1-dev", device="cpu")
    (fault,) = caught.value.faults
    assert fault == (
        "shape:flux.1-dev: loading it in float32 takes 62.8 GiB of memory, and 48.0 GiB are free "
        "here"
    )
    assert caught.value.fix == (
        "use a machine with more memory, or --dtype bfloat16, which takes 31.4 GiB"
    )
    monkeypatch.setattr(room, "free_memory", lambda: 24 * GIB)
    with pytest.raises(UnsupportedError) as caught:
        load_pipeline("shape:flux.1-dev", device="cpu")
    assert caught.value.fix == "use a machine with more memory"


def test_where_memory_cannot_be_told(saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: None)
    load_pipeline(str(saved_model), device="cpu", dtype="bfloat16")


@pytest.mark.parametrize(
    "command",
    [["generate", "a red kite"], ["export", "tensorrt", "--target", "none"]],
    ids=["generate", "export"],
)
def test_commands_say_so_and_take_no_memory(command: list[str], tmp_path: Path) -> None:
    """Under a limit that the weights of the shape are far beyond."""
    program = (
        "import json, sys\n"
        "from hasten.cli import main\n"
        "from hasten.memory import status_bytes\n"
        "from hasten.models import room\n"
        "room.free_memory = lambda: 2**30\n"
        "code = main(sys.argv[1:])\n"
        "print(json.dumps([code, status_bytes('VmHWM')]))\n"
    )
    given = [*command, "--model", "shape:flux.1-dev", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", program, *given],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "error: shape:flux.1-dev: loading it in float32 takes 62.8 GiB" in done.stderr
    code, peak = json.loads(done.stdout)
    assert code == 1
    assert peak < 2 * GIB
    assert list(tmp_path.iterdir()) == []
