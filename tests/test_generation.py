"""Requests, the pictures drawn from them, and the PNGs that hold both."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hasten
from hasten.errors import InputError, ModelError
from hasten.generation import Request, png_bytes, render, save_png
from hasten.models import load_pipeline
from hasten.recipe import Recipe, resolve
from hasten.settings import Settings

REQUEST = Request("a red kite", "mine", resolve("cache"), 3, Settings(32, 32, 6, 3.5, 8))


def test_the_picture_is_the_pipelines(make_pipe: Callable[[], Any]) -> None:
    fast = hasten.optimize(make_pipe(), REQUEST.recipe)
    done: list[int] = []
    picture = render(fast, REQUEST, done.append)
    expected = fast(
        "a red kite",
        width=32,
        height=32,
        num_inference_steps=6,
        guidance_scale=3.5,
        max_sequence_length=8,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert picture.image.tobytes() == expected.tobytes()
    assert done == [1, 2, 3, 4, 5, 6]
    assert (picture.steps, picture.steps_computed) == (6, 4)
    assert picture.seconds > 0
    assert "recipe cache" in picture.summary


def spoiled(pipe: Any, value: float) -> Any:
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] = value
    return pipe


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(pipe: Any, value: float) -> None:
    fast = hasten.optimize(spoiled(pipe, value), "baseline")
    with pytest.raises(ModelError, match=r"first transformer\.proj_out\.weight") as caught:
        render(fast, REQUEST)
    assert "download" in caught.value.fix


def test_a_picture_that_overflows_names_likely_causes(pipe: Any) -> None:
    cache = {"kind": "schedule", "steps": 6, "compute": [0, 2], "weights": [[1.0], [1.0]]}
    recipe = Recipe.from_dict({"cache": cache})
    fast = hasten.optimize(spoiled(pipe, 3e38), recipe)
    with pytest.raises(ModelError, match="mine: the image has values that are not fin") as caught:
        render(fast, replace(REQUEST, recipe=recipe))
    assert "remove weights" in caught.value.fix
    assert "baseline" in caught.value.fix


def test_half_precision_is_a_likely_cause(saved_model: Path) -> None:
    pipe = load_pipeline(str(saved_model), device="cpu", dtype="float16")
    pipe.vae.decoder.conv_in.weight.data.fill_(6e4)
    with pytest.raises(ModelError) as caught:
        render(hasten.optimize(pipe, "baseline"), REQUEST)
    assert "--dtype bfloat16" in caught.value.fix


def test_a_png_holds_its_request() -> None:
    with Image.open(io.BytesIO(png_bytes(Image.new("RGB", (16, 16)), REQUEST))) as image:
        texts = image.text  # type: ignore[attr-defined]
    assert texts["prompt"] == "a red kite"
    assert Recipe.from_toml(texts["recipe"]) == REQUEST.recipe
    facts = json.loads(texts["hasten"])
    assert (facts["seed"], facts["steps"], facts["versions"]["hasten"]) == (
        3,
        6,
        hasten.__version__,
    )


def test_an_old_picture_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.png"
    out.write_text("old")

    def full_disk(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        save_png(out, Image.new("RGB", (16, 16)), REQUEST)
    monkeypatch.undo()
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    save_png(out, Image.new("RGB", (16, 16)), REQUEST)
    assert Image.open(out).size == (16, 16)


def test_nothing_is_written_through_a_link_that_lies_where_drafts_did(tmp_path: Path) -> None:
    import os

    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".a.png.{os.getpid()}.tmp").symlink_to(victim)
    save_png(tmp_path / "a.png", Image.new("RGB", (16, 16)), REQUEST)
    assert victim.read_text() == "mine"


def test_a_pipeline_that_fails_is_the_models_fault_in_one_line(pipe: Any) -> None:
    pipe.vae.register_to_config(scaling_factor="x")
    with pytest.raises(ModelError, match="mine: the pipeline failed: TypeError") as caught:
        render(hasten.optimize(pipe, "baseline"), REQUEST)
    assert "baseline" in caught.value.fix
