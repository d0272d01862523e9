"""Models that do not fit into memory, or whose files are not those of their components."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hasten.errors import ModelError, UnsupportedError
from hasten.models import load, load_pipeline
from hasten.models.architecture import FLUX_1_DEV
from hasten.models.checkpoint import converted_bytes
from hasten.models.random_weights import shape_bytes
from tests.hub_cache import write_hub_cache

GIB = 2**30
TOO_LITTLE = 1000


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "free_memory", lambda: TOO_LITTLE)


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
        assert caught.value.faults[0].endswith("of memory, and 1 KiB are free")
    load_pipeline(str(saved_model), device="cpu", dtype="float32")  # as it is stored


def test_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shape_bytes(FLUX_1_DEV, torch.bfloat16) == pytest.approx(33.7e9, rel=0.01)
    monkeypatch.setattr(load, "free_memory", lambda: 48 * GIB)
    with pytest.raises(UnsupportedError) as caught:
        load_pipeline("shape:flux.1-dev", device="cpu")
    (fault,) = caught.value.faults
    assert fault == (
        "shape:flux.1-dev: loading it in float32 takes 62.8 GiB of memory, and 48.0 GiB are free"
    )
    assert caught.value.fix == (
        "use a machine with more memory, or --dtype bfloat16, which takes 31.4 GiB"
    )
    monkeypatch.setattr(load, "free_memory", lambda: 24 * GIB)
    with pytest.raises(UnsupportedError) as caught:
        load_pipeline("shape:flux.1-dev", device="cpu")
    assert caught.value.fix == "use a machine with more memory"


def test_where_memory_cannot_be_told(saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "free_memory", lambda: None)
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
        "from hasten.models import load\n"
        "load.free_memory = lambda: 2**30\n"
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


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    """A model directory to change."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor_is_an_error(model: Path, part: str) -> None:
    change(model / part, lambda tensors: tensors.pop(max(tensors)))
    with pytest.raises(ModelError, match=rf"{part} has \d tensors? missing from its files"):
        load_pipeline(str(model), device="cpu")


@pytest.mark.parametrize("part", PARTS)
def test_an_unexpected_tensor_is_an_error(model: Path, part: str) -> None:
    change(model / part, lambda tensors: tensors.update({"b.c": torch.ones(1), "a": torch.ones(1)}))
    with pytest.raises(
        ModelError, match=f"{part} has 2 tensors in its files that .* does not have; the first is a"
    ):
        load_pipeline(str(model), device="cpu")


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_shape_is_an_error(model: Path, part: str) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if tensors[name].ndim >= 2)
        tensors[name] = tensors[name][:-1].clone()

    change(model / part, cut)
    with pytest.raises(ModelError, match="shape"):
        load_pipeline(str(model), device="cpu")


def test_faults_of_several_components_come_together(model: Path) -> None:
    for part in PARTS:
        change(model / part, lambda tensors: tensors.update({"old." + max(tensors): torch.ones(1)}))
    with pytest.raises(ModelError) as caught:
        load_pipeline(str(model), device="cpu")
    assert [fault.split(": ")[1].split()[0] for fault in caught.value.faults] == sorted(PARTS)


def test_tied_weights_and_what_the_libraries_ignore_are_legal(model: Path) -> None:
    def as_others_save_it(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        tensors["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(1)

    change(model / "text_encoder_2", as_others_save_it)
    ids = torch.arange(77)[None]
    change(
        model / "text_encoder",
        lambda tensors: tensors.update({"text_model.embeddings.position_ids": ids}),
    )
    load_pipeline(str(model), device="cpu")


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_pickles_are_refused_and_the_fix_converts_them(
    model: Path, tmp_path: Path, part: str
) -> None:
    (weights,) = (model / part).glob("*.safetensors")
    stem = "pytorch_model" if weights.stem == "model" else weights.stem
    torch.save(load_file(weights), weights.with_name(f"{stem}.bin"))
    weights.unlink()
    with pytest.raises(ModelError, match=rf"{part} has its weights in {stem}\.bin") as caught:
        load_pipeline(str(model), device="cpu")
    _, _, code = caught.value.fix.partition("convert it: ")
    code, _, _ = code.partition(", then")
    given = {
        "DiffusionPipeline": DiffusionPipeline,
        "MODEL": str(model),
        "FOLDER": str(tmp_path / "converted"),
    }
    eval(code, given)
    load_pipeline(str(tmp_path / "converted"), device="cpu")
