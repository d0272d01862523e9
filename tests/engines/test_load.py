"""`[engine]` from recipe to pictures: exported once, then run by onnxruntime."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.engines.load import EngineBody
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest, Shapes
from hasten.engines.tensorrt.preflight import ExportOptions
from hasten.engines.tensorrt.stages import export_tensorrt
from hasten.engines.tensorrt.step import INPUTS
from hasten.errors import (
    AlreadyOptimizedError,
    EngineError,
    HastenError,
    InputError,
    UnsupportedError,
)
from hasten.models.random_weights import build_shape
from hasten.recipe import Recipe, Sampling
from tests.conftest import SMALL

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Call = Callable[..., torch.Tensor]
TEXT = 8  # tokens of the call fixture
SIZE = {"width": 128, "height": 128, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(cache))


@pytest.fixture(scope="module")
def written(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's graph in bf16, for calls of 8 text tokens. Do not change it."""
    pipe = build_shape(SMALL, torch.device("cpu"), torch.float32)
    folder = tmp_path_factory.mktemp("export") / "small"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HASTEN_CACHE", str(cache))
        export_tensorrt(
            pipe, folder, ExportOptions("bf16", (), (256, 256)), max_sequence_length=TEXT
        )
    return folder


def recipe(path: Path | None, **engine: Any) -> Recipe:
    where = {} if path is None else {"path": str(path)}
    return Recipe.from_dict(
        {"engine": {"kind": "onnxruntime", "precision": "bf16", **where, **engine}}
    )


def test_the_graph_draws_what_torch_draws(pipe: Any, call: Call, written: Path) -> None:
    expected = call(pipe, **SIZE)
    fast = hasten.optimize(pipe, recipe(written))
    drawn = call(fast, **SIZE)
    error = (drawn - expected).norm() / expected.norm()
    assert 0 < error < 0.02  # weights rounded to bfloat16, nothing else
    assert "the blocks in bf16 by onnxruntime" in fast.summary()
    assert torch.equal(call(fast.restore(), **SIZE), expected)


def test_a_cache_a_batch_and_guidance_work_on_it(pipe: Any, call: Call, written: Path) -> None:
    cached = {"cache": {"interval": 2, "start_step": 1}}
    arguments = {
        **SIZE,
        "num_images_per_prompt": 2,
        "true_cfg_scale": 2.0,
        "negative_prompt": "blurry",
    }
    plain = hasten.optimize(pipe, Recipe.from_dict(cached), copy=True)
    expected = call(plain, **arguments)
    engine = recipe(written).engine
    fast = hasten.optimize(pipe, Recipe.from_dict(cached).but(engine=engine))
    drawn = call(fast, **arguments)
    assert (drawn - expected).norm() < 0.02 * expected.norm()
    assert fast.last_run.computed == plain.last_run.computed < 4


def test_without_a_path_it_is_exported_once_and_said(
    make_pipe: Callable[[], Any], call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hasten")
    asked = recipe(None, max_size="256x256").but(sampling=Sampling(max_sequence_length=TEXT))
    first = hasten.optimize(make_pipe(), asked)
    said = [record.getMessage() for record in caplog.records]
    stages = ["preflight", "export", "verify", "write"]
    assert [line.split()[0] for line in said] == ["note:", *stages]
    caplog.clear()
    second = hasten.optimize(make_pipe(), asked)
    again = [record.getMessage() for record in caplog.records]
    assert all("(cached)" in line for line in again if line.split()[0] in ("export", "verify"))
    assert torch.equal(call(first, **SIZE), call(second, **SIZE))


def other_weights(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.x_embedder.weight.mul_(1.5)


@pytest.mark.parametrize(
    ("change", "engine", "error", "fault"),
    [
        (other_weights, {}, EngineError, "exported from weights that differ"),
        (None, {"precision": "fp16"}, InputError, "has bf16, and engine.precision is 'fp16'"),
    ],
)
def test_an_export_of_something_else_is_refused_and_the_pipeline_untouched(
    pipe: Any,
    call: Call,
    written: Path,
    change: Callable[[Any], None] | None,
    engine: dict[str, Any],
    error: type[HastenError],
    fault: str,
) -> None:
    if change is not None:
        change(pipe)
    expected = call(pipe, **SIZE)
    with pytest.raises(error, match=fault) as caught:
        hasten.optimize(pipe, recipe(written, **engine))
    assert caught.value.fix
    assert torch.equal(call(pipe, **SIZE), expected)
    assert not hasattr(pipe.transformer, "_hasten_recipe")


def test_a_damaged_export_is_named(pipe: Any, written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(written, folder)
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    with pytest.raises(EngineError, match=r"model\.onnx\.data: damaged"):
        hasten.optimize(pipe, recipe(folder))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"family": "another"}, "has family another, and this pipeline has FLUX.1"),
        ({"channels": 16}, "has channels 16, and this pipeline has 64"),
        ({"text_dim": 64}, "has text_dim 64, and this pipeline has 32"),
        ({"row_width": 1}, "has row_width 1, and this pipeline has 1024"),
        ({"head_dim": 8}, "has head_dim 8, and this pipeline has 16"),
        ({"weights": "0" * 64}, "was exported from weights that differ"),
    ],
    ids=str,
)
def test_a_manifest_with_other_facts_is_refused(
    pipe: Any, written: Path, tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    """Sealed again, so that only the model itself can show it."""
    folder = tmp_path / "other"
    shutil.copytree(written, folder)
    Manifest.read(folder).model_copy(update=change).write(folder / MANIFEST)
    with pytest.raises(EngineError, match=fault) as caught:
        hasten.optimize(pipe, recipe(folder))
    assert len(caught.value.faults) == 1
    assert caught.value.fix


def test_an_edited_manifest_is_refused(pipe: Any, written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(written, folder)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"text": 8', '"text": 16'))
    with pytest.raises(InputError, match="it was damaged or edited") as caught:
        hasten.optimize(pipe, recipe(folder))
    assert "export again" in caught.value.fix


def test_a_user_that_does_not_exist_is_named(pipe: Any) -> None:
    with pytest.raises(InputError, match="no home directory for ~nosuchuser"):
        hasten.optimize(pipe, recipe(Path("~nosuchuser/engine")))


@pytest.mark.slow
def test_weights_in_half_precision_are_compared_in_it(
    make_pipe: Callable[[], Any], tmp_path: Path
) -> None:
    """float16 holds differences that bfloat16 does not."""
    pipe, other = make_pipe(), make_pipe()
    options = ExportOptions("fp16", (), verify=False)
    export_tensorrt(pipe, tmp_path / "half", options, max_sequence_length=TEXT)
    with torch.no_grad():
        other.transformer.x_embedder.weight.mul_(1 + 2**-10)
    hasten.optimize(pipe, recipe(tmp_path / "half", precision="fp16"))
    with pytest.raises(EngineError, match="exported from weights that differ"):
        hasten.optimize(other, recipe(tmp_path / "half", precision="fp16"))


def test_a_folder_without_an_export_says_what_makes_one(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no export") as caught:
        hasten.optimize(pipe, recipe(tmp_path))
    assert "hasten export tensorrt" in caught.value.fix


def test_calls_outside_of_the_profile_are_refused(pipe: Any, call: Call, written: Path) -> None:
    fast = hasten.optimize(pipe, recipe(written))
    with pytest.raises(EngineError, match="exported for 8 text tokens, and this call has 12"):
        call(fast, **SIZE, max_sequence_length=12)
    with pytest.raises(EngineError, match="pixels\\) is outside the engine") as caught:
        call(fast, width=512, height=256)
    assert "--max-size" in caught.value.fix
    assert call(fast, **SIZE).isfinite().all(), "the pipeline still works"


def test_released_weights_cannot_come_back(
    make_pipe: Callable[[], Any], call: Call, written: Path
) -> None:
    plain = make_pipe()
    expected = call(plain, **SIZE)
    fast = hasten.optimize(plain, recipe(written, release=True), copy=True)
    assert "torch weights freed" in fast.summary()
    call(fast, **SIZE)
    for _ in range(2):  # as true the second time
        with pytest.raises(HastenError, match="engine cannot be undone"):
            fast.restore()
    with pytest.raises(UnsupportedError, match="are empty"):
        export_tensorrt(fast.pipe, None, ExportOptions("bf16", ()))
    with pytest.raises(UnsupportedError, match=r"empty .*engine\.release") as caught:
        hasten.optimize(fast.pipe, "cache")
    assert "load the pipeline again" in caught.value.fix
    assert torch.equal(call(plain, **SIZE), expected)


def test_what_cannot_draw_from_a_text_is_not_calibrated(pipe: Any, tmp_path: Path) -> None:
    from diffusers import FluxImg2ImgPipeline

    other = FluxImg2ImgPipeline.from_pipe(pipe, dtype=pipe.dtype)
    options = ExportOptions("fp8", ())
    with pytest.raises(UnsupportedError, match="FluxImg2ImgPipeline needs other inputs") as caught:
        export_tensorrt(other, tmp_path / "out", options)
    assert "fast.from_pipe(FluxImg2ImgPipeline)" in caught.value.fix
    weight = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight
    weight.data = weight.data.to(torch.uint8)
    with pytest.raises(
        UnsupportedError, match="weights of the text_encoder_2 are already quantised"
    ):
        export_tensorrt(pipe, tmp_path / "out", options)
    pipe.register_modules(text_encoder_2=None)
    with pytest.raises(UnsupportedError, match="no text encoders"):
        export_tensorrt(pipe, tmp_path / "out", options)


def test_an_optimised_pipeline_is_not_exported(pipe: Any, tmp_path: Path) -> None:
    fast = hasten.optimize(pipe, "cache")
    with pytest.raises(AlreadyOptimizedError):
        export_tensorrt(fast, tmp_path / "out", ExportOptions("bf16", ()))


SHAPES = Shapes(text=3, least=4, best=6, most=8)


class Driver:
    """Answers with twice the latents in float32, and keeps what it was given."""

    what = "a driver"

    def __init__(self) -> None:
        self.given: list[dict[str, Tensor]] = []

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        self.given.append(inputs)
        return inputs["latents"].float() * 2

    def close(self) -> None:
        self.given.clear()


def inputs(image: int = 5, text: int = 3, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(image)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    rotary = torch.randn(2, text + image, 4, generator=generator)
    return [normal(batch, image, 2), normal(batch, text, 7), normal(batch, 9), *rotary]


def test_a_batch_runs_one_image_at_a_time_each_with_its_own_inputs() -> None:
    driver = Driver()
    latents, text, row, cos, sin = inputs()
    velocity = EngineBody(driver, SHAPES)(latents, text, row, cos, sin)
    assert velocity.dtype == torch.bfloat16
    assert torch.equal(velocity, latents * 2)
    assert [tuple(given) for given in driver.given] == [INPUTS, INPUTS]
    for one, given in enumerate(driver.given):
        assert torch.equal(given["text"], text[one, None])
        assert torch.equal(given["row"], row[one, None])
        assert given["cos"] is cos


@pytest.mark.parametrize(
    ("image", "text", "fault", "fix"),
    [
        (
            9,
            3,
            "48x48 (2304 pixels) is outside the engine's range: 32x32 ",
            "--max-size",
        ),
        (3, 3, "16x48 (768 pixels)", "larger width"),
        (5, 4, "exported for 3 text tokens, and this call has 4", "max_sequence_length = 3"),
    ],
)
def test_what_is_outside_the_profile_is_refused_before_the_engine_sees_it(
    image: int, text: int, fault: str, fix: str
) -> None:
    driver = Driver()
    with pytest.raises(EngineError, match=re.escape(fault)) as caught:
        EngineBody(driver, SHAPES)(*inputs(image, text))
    assert fix in caught.value.fix
    assert driver.given == []


@pytest.mark.parametrize("image", [4, 8])
def test_the_profiles_ends_are_inside(image: int) -> None:
    assert EngineBody(Driver(), SHAPES)(*inputs(image)).shape == (2, image, 2)
