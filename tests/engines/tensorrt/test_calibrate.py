"""Largest values by Model Optimizer: the right ones, and a pipeline that stays as it was."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hasten
from hasten.calibration.activations import largest_inputs
from hasten.engines.tensorrt.calibrate import calibrate_fp8, load_amax, save_amax
from hasten.engines.tensorrt.nodes import Amax
from hasten.engines.tensorrt.preflight import METHODS
from hasten.errors import (
    AlreadyOptimizedError,
    EngineError,
    HastenError,
    InputError,
    ModelError,
    UnsupportedError,
)
from hasten.log import forward_log
from tests.engines.tensorrt.conftest import FAMILY, unchanged_globals, values_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("modelopt.torch.quantization")

SHORT = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["a red fox", "a kite"]


def state_of(pipe: Any) -> dict[str, Any]:
    """What calibration must leave as it was."""
    transformer = pipe.transformer
    return {
        "components": {name: id(component) for name, component in pipe.components.items()},
        "config": dict(pipe.config),
        "modules": [(name, type(part), id(part)) for name, part in transformer.named_modules()],
        "tensors": {name: id(x) for name, x in transformer.state_dict(keep_vars=True).items()},
        "values": [x.tolist() for x in transformer.state_dict().values()],
        "hooks": sum(
            len(part._forward_hooks) + len(part._forward_pre_hooks)
            for part in transformer.modules()
        ),
        "attributes": sorted(vars(pipe)),
    }


def draw(pipe: Any, prompts: list[str]) -> None:
    for index, prompt in enumerate(prompts):
        pipe(
            [prompt], generator=[torch.Generator().manual_seed(index)], output_type="latent",
            num_inference_steps=2, height=32, width=32, max_sequence_length=8,
        )  # fmt: skip


def test_it_finds_the_largest_inputs_and_weights(
    pipe: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    before, lines = state_of(pipe), list[str]()
    with unchanged_globals(), forward_log(lines.append, lines.append):
        amax = calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT)
    assert state_of(pipe) == before
    assert capfd.readouterr() == ("", "")
    assert lines == ["calibrating: prompt 1 of 2", "calibrating: prompt 2 of 2"]
    linears = FAMILY.quantizable(pipe.transformer)
    inputs = largest_inputs(linears, lambda: draw(pipe, PROMPTS))
    assert list(amax) == [name for name, _ in linears]
    for name, linear in linears:
        largest = inputs[name], float(linear.weight.abs().max())
        assert (amax[name].input, amax[name].weight) == largest
        assert amax[name].smooth is None


def test_a_pipeline_whose_first_argument_is_an_image(pipe: Any) -> None:
    from diffusers import FluxKontextPipeline

    components = {**pipe.components, "image_encoder": None, "feature_extractor": None}
    kontext = FluxKontextPipeline(**components)
    arguments = {**SHORT, "max_area": 32 * 32, "_auto_resize": False}
    amax = calibrate_fp8(kontext, FAMILY, ["a red kite"], **arguments)
    expected = calibrate_fp8(pipe, FAMILY, ["a red kite"], **SHORT)
    assert values_of(amax) == values_of(expected)


def test_what_it_tells_reaches_the_screen(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with forward_log(print, print):
        calibrate_fp8(pipe, FAMILY, PROMPTS[:1], **SHORT)
    assert capsys.readouterr().out == "calibrating: prompt 1 of 1\n"


def test_smoothing_makes_inputs_and_weights_equally_large(pipe: Any) -> None:
    before = state_of(pipe)
    with unchanged_globals():
        amax = calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT, method="smoothquant")
    assert state_of(pipe) == before
    plain = calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT)
    for name, linear in FAMILY.quantizable(pipe.transformer):
        found = amax[name]
        assert found.smooth is not None
        assert found.smooth.shape == (linear.in_features,)
        assert found.smooth.dtype == torch.float32
        weight = (linear.weight / found.smooth).abs().max()
        assert found.weight == pytest.approx(float(weight), rel=1e-5)
        # α = 0.5 makes both equal in every channel, where the factors are not clipped
        assert found.input == pytest.approx(found.weight, rel=1e-4)
        assert found.input != plain[name].input


@pytest.mark.parametrize("method", METHODS)
def test_repeats_are_equal(pipe: Any, method: str) -> None:
    first, again = (calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT, method=method) for _ in range(2))
    assert values_of(first) == values_of(again)
    other = calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT, method=method, seed=9)
    assert values_of(other) != values_of(first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_prompt_that_raises_leaves_the_pipeline_alone(
    pipe: Any, method: Any, error: type[BaseException]
) -> None:
    before, told = state_of(pipe), []

    def tell(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            raise error("stop")

    with pytest.raises(error, match="stop"), unchanged_globals(), forward_log(tell, tell):
        calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT, method=method)
    assert state_of(pipe) == before


def test_torch_itself_is_restored_where_the_model_raises_within_an_attention(pipe: Any) -> None:
    """Model Optimizer leaves torch's functions replaced there."""

    def interrupt(*_: Any) -> None:
        replaced.append(functional.scaled_dot_product_attention)
        raise KeyboardInterrupt

    replaced: list[Any] = []
    before = functional.scaled_dot_product_attention, torch.bmm, torch.baddbmm
    output = pipe.transformer.transformer_blocks[0].attn.to_out[0]
    output.forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT)
    assert replaced != [before[0]], "nothing was replaced: this test shows nothing"
    assert before == (functional.scaled_dot_product_attention, torch.bmm, torch.baddbmm)
    assert not hasattr(functional, "_scaled_dot_product_attention")


def poison(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.x_embedder.bias.fill_(torch.nan)


def adapt(pipe: Any) -> None:
    pipe.transformer.proj_out.base_layer = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("change", "arguments", "kind", "fault"),
    [
        (None, {"prompts": []}, InputError, "no prompts"),
        (None, {"method": "awq"}, EngineError, "unknown calibration 'awq'"),
        (poison, {}, ModelError, "Model Optimizer cannot calibrate this model: .*nan"),
        (adapt, {}, EngineError, "LoRA"),
    ],
)
def test_bad_input_is_refused(
    pipe: Any,
    change: Callable[[Any], None] | None,
    arguments: dict[str, Any],
    kind: type[HastenError],
    fault: str,
) -> None:
    if change is not None:
        change(pipe)
    transformer = pipe.transformer
    with pytest.raises(kind, match=fault), unchanged_globals():
        calibrate_fp8(pipe, FAMILY, **{"prompts": PROMPTS, **SHORT, **arguments})
    assert pipe.transformer is transformer


def test_a_linear_that_never_runs_is_refused(pipe: Any) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x

    block = pipe.transformer.transformer_blocks[0]
    block.attn.to_out[1] = Idle()
    with pytest.raises(InputError, match=r"attn\.to_out\.1\.linear never ran"):
        calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT)


def test_an_optimised_pipeline_is_refused(pipe: Any) -> None:
    hasten.optimize(pipe, "cache")
    with pytest.raises(AlreadyOptimizedError):
        calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT)


def test_without_model_optimizer_it_says_how_to_install_it(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(UnsupportedError, match="is not installed") as caught:
        calibrate_fp8(pipe, FAMILY, PROMPTS, **SHORT)
    assert caught.value.fix == "pip install 'hasten[tensorrt]'"


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    amax = {
        "blocks.0.to_q": Amax(1 / 3, 2.5e-9, torch.rand(7)),
        "blocks.0.input": Amax(448.0, 0.1),
    }
    save_amax(amax, tmp_path / "amax.safetensors")
    found = load_amax(tmp_path / "amax.safetensors")
    assert values_of(found) == values_of(amax)
    save_amax(dict(reversed(amax.items())), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "amax.safetensors").read_bytes()


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.input": torch.tensor(1.0)},
        {"a.input": torch.tensor(1.0), "a.weight": torch.ones(3)},
        {"a.input": torch.tensor(1.0), "a.weight": torch.tensor(1.0), "a.bias": torch.tensor(1.0)},
        {"plain": torch.tensor(1.0)},
    ],
)
def test_another_file_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "amax")
    with pytest.raises(InputError, match="amax is not a calibration"):
        load_amax(tmp_path / "amax")


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a calibration"):
        load_amax(tmp_path / "absent")
    (tmp_path / "text").write_text("text")
    with pytest.raises(InputError, match="is not a calibration"):
        load_amax(tmp_path / "text")
