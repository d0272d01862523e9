"""An exported graph is held to torch: what is right passes, one wrong number does not."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.engines.tensorrt import verify as verify_module
from hasten.engines.tensorrt.export import export_onnx
from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.manifest import Shapes, SizeErrors, Verification
from hasten.engines.tensorrt.nodes import Amax
from hasten.engines.tensorrt.step import OUTPUT, Step, sample, state_name
from hasten.engines.tensorrt.verify import (
    AFTER,
    BLOCK_BARS,
    WHOLE_BARS,
    relative_distance,
    sizes,
    verify,
)
from hasten.errors import EngineError
from hasten.log import forward_log
from tests.engines.tensorrt.conftest import FAMILY, SHAPES, amax_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BLOCKS = ("transformer_blocks.0", "single_transformer_blocks.0")
PRECISIONS = ("bf16", "fp16", "fp8")
Export = Callable[[str], Path]
Run = Callable[..., Verification]


@pytest.fixture
def amax(transformer: Any) -> dict[str, Amax]:
    return amax_of(transformer)


@pytest.fixture
def copied(exported: Export, tmp_path: Path) -> Export:
    """A folder of that precision to spoil."""
    return lambda precision: shutil.copytree(exported(precision), tmp_path / "copy")


@pytest.fixture
def run(transformer: Any, amax: dict[str, Amax], tmp_path: Path) -> Run:
    """Verify the graph in a folder."""

    def run(folder: Path, precision: str, **changed: Any) -> Verification:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        given = {
            "transformer": transformer,
            "amax": amax if precision == "fp8" else None,
            "shapes": SHAPES,
            **changed,
        }
        return verify(
            family=FAMILY, graph=folder / GRAPH, precision=precision, scratch=scratch, **given
        )

    return run


def spoil(folder: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change one tensor of the exported weights in place; `change` sees its bytes, element by
    element."""
    graph = onnx.load(folder / GRAPH, load_external_data=False)
    tensor = next(one for one in graph.graph.initializer if one.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    width = length // (tensor.dims[0] * tensor.dims[1])
    raw = bytearray((folder / DATA).read_bytes())
    part = torch.tensor(raw[offset : offset + length], dtype=torch.uint8).view(-1, width)
    change(part)
    raw[offset : offset + length] = bytes(part.flatten().tolist())
    (folder / DATA).write_bytes(raw)


def negate_one(part: torch.Tensor) -> None:
    """The sign of the largest weight: the highest bit of its last byte."""
    magnitude = part.to(torch.int64)
    magnitude[:, -1] &= 0x7F
    order = magnitude @ (256 ** torch.arange(part.shape[1]))
    part[order.argmax(), -1] ^= 0x80


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_the_exporter_writes_passes(run: Run, exported: Export, precision: str) -> None:
    lines: list[str] = []
    with forward_log(lambda _: None, lines.append):
        found = run(exported(precision), precision)
    assert precision in found.what
    assert [(size.height, size.width) for size in found.sizes] == [(2, 2), (2, 3)]
    assert [line.split(":")[0] for line in lines] == ["2 × 2 tokens", "2 × 3 tokens"]
    for size in found.sizes:
        assert tuple(size.blocks) == (*BLOCKS, AFTER)
        assert all(error >= 0 for error in size.blocks.values())
    assert 0 < found.worst_block <= found.block_bar
    assert found.seconds > 0
    assert Verification.model_validate_json(found.model_dump_json()) == found


def test_fp8_is_held_block_by_block_and_the_rest_is_reported(run: Run, exported: Export) -> None:
    found = run(exported("fp8"), "fp8")
    assert (found.whole_bar, found.block_bar) == (None, BLOCK_BARS["fp8"])
    for size in found.sizes:
        assert size.control is not None
        assert size.unquantised is not None
        assert 0 < size.control < 0.2
        assert 0.005 < size.unquantised < 0.2  # FP8 has three bits of mantissa


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_are_held_as_a_whole(run: Run, exported: Export, precision: str) -> None:
    found = run(exported(precision), precision)
    assert found.whole_bar == WHOLE_BARS[precision]
    assert 0 < found.worst_whole <= found.whole_bar
    assert all(size.control is size.unquantised is None for size in found.sizes)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("transformer_blocks.0.ff.net.2.weight", BLOCKS[0]),
        ("transformer_blocks.0.attn.to_add_out.weight", BLOCKS[0]),
        ("single_transformer_blocks.0.proj_out.weight", BLOCKS[1]),
        ("proj_out.weight", AFTER),
    ],
)
def test_one_wrong_weight_is_found_and_its_block_named(
    run: Run, copied: Export, precision: str, name: str, block: str
) -> None:
    folder = copied(precision)
    spoil(folder, f"transformer.{name}", negate_one)
    with pytest.raises(EngineError) as caught:
        run(folder, precision)
    assert f"{folder / GRAPH}: {block} differs from torch" in str(caught.value)
    others = {*BLOCKS, AFTER} - {block}
    assert not any(f" {other} is not" in str(caught.value) for other in others)
    assert caught.value.fix


def test_a_weight_that_is_not_finite_is_found(run: Run, copied: Export) -> None:
    folder = copied("bf16")
    spoil(folder, "transformer.x_embedder.weight", lambda part: part[0].fill_(0xFF))
    with pytest.raises(EngineError, match="error inf"):
        run(folder, "bf16")


def test_another_scale_is_found_and_its_block_named(
    run: Run, exported: Export, amax: dict[str, Amax]
) -> None:
    name = "single_transformer_blocks.0.proj_mlp"
    other = {**amax, name: replace(amax[name], input=amax[name].input * 1.3)}
    with pytest.raises(EngineError, match=BLOCKS[1]):
        run(exported("fp8"), "fp8", amax=other)


def test_a_graph_of_fewer_blocks_is_another_model(
    run: Run, transformer: Any, exported: Export
) -> None:
    transformer.transformer_blocks.append(copy.deepcopy(transformer.transformer_blocks[0]))
    with pytest.raises(
        EngineError, match=r"no output of transformer_blocks\.1: it belongs to another model"
    ):
        run(exported("bf16"), "bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("file", [GRAPH, DATA])
@pytest.mark.parametrize("left", ["none", "half", "empty"])
def test_a_corrupt_graph_is_one_clear_error(
    run: Run, copied: Export, precision: str, file: str, left: str
) -> None:
    folder = copied(precision)
    if left == "none":
        (folder / file).unlink()
    else:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: len(whole) // 2] if left == "half" else b"")
    with pytest.raises(EngineError, match=str(folder)) as caught:
        run(folder, precision)
    assert len(caught.value.faults) == 1
    assert "export" in caught.value.fix


@pytest.mark.parametrize("wrong", [False, True])
def test_the_transformer_is_left_as_it_was(
    run: Run, transformer: Any, amax: dict[str, Amax], exported: Export, wrong: bool
) -> None:
    modules = dict(transformer.named_modules())
    tensors = {name: (tensor, tensor.clone()) for name, tensor in transformer.state_dict().items()}
    if wrong:
        with pytest.raises(EngineError):
            run(exported("fp8"), "fp8", amax={name: Amax(1.0, 1.0) for name in amax})
    else:
        run(exported("fp8"), "fp8")
    assert dict(transformer.named_modules()) == modules
    for name, tensor in transformer.state_dict().items():
        kept, values = tensors[name]
        assert tensor.data_ptr() == kept.data_ptr()
        assert torch.equal(tensor, values)
    assert not any(module._forward_hooks for module in transformer.modules())


def test_a_graph_gives_the_velocity_alone_and_names_its_states(exported: Export) -> None:
    for precision in PRECISIONS:
        graph = onnx.load(exported(precision) / GRAPH, load_external_data=False).graph
        assert [value.name for value in graph.output] == [OUTPUT]
        values = {name for node in graph.node for name in node.output}
        read = {name for node in graph.node for name in node.input}
        states = {state_name(block, at) for block in BLOCKS for at in (0, 1)}
        last_text = state_name(BLOCKS[1], 0)
        assert states & values == states - {last_text}  # nothing comes of the text at the end
        assert states - {last_text} <= read


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (64, 8192, ((8, 8), (8, 12))),
        (64, 80, ((8, 8), (8, 10))),
        (64, 64, ((8, 8), (1, 64))),
        (7, 100, ((1, 7), (2, 5))),
        (1, 1, ((1, 1), (1, 1))),
    ],
)
def test_sizes_lie_within_the_profile(least: int, most: int, expected: Any) -> None:
    assert sizes(Shapes(text=4, least=least, best=least, most=most)) == expected


def test_relative_error_is_of_the_expected_norm() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_distance(expected * 1.5, expected) == pytest.approx(0.5)
    assert relative_distance(expected, expected) == 0
    for value in (math.nan, math.inf):
        assert relative_distance(torch.tensor([value, 0]), expected) == math.inf
    assert relative_distance(torch.zeros(2), torch.zeros(2)) == math.inf  # nothing to measure it by


@torch.no_grad()
def scales(model: Any, shapes: Shapes) -> dict[str, Amax]:
    """The largest input and weight of every quantisable linear on one random sample."""
    found: dict[str, Amax] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda module, given, name=name: found.update(
                {name: Amax(float(given[0].abs().max()), float(module.weight.abs().max()))}
            )
        )
        for name, linear in FAMILY.quantizable(model)
    ]
    inputs = sample(model, FAMILY, shapes, 8, 8, torch.float32, seed=1)
    step = Step(model, FAMILY)
    step(**inputs)
    for hook in hooks:
        hook.remove()
    step.readers.detach()
    return found


@pytest.mark.slow
def test_the_bundled_model_in_fp8(tmp_path: Path) -> None:
    """The bar holds with room on trained weights, where the whole graph would miss it."""
    from hasten.models.load import load_pipeline

    model = load_pipeline("tiny", device="cpu", dtype="float32").transformer
    shapes = Shapes(text=32, least=64, best=64, most=256)
    amax = scales(model, shapes)
    folder, scratch = tmp_path / "graph", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    export_onnx(model, FAMILY, "fp8", amax, shapes, folder)
    found = verify(model, FAMILY, folder / GRAPH, "fp8", amax, shapes, scratch)
    assert found.worst_block <= found.block_bar / 2
    for size in found.sizes:
        assert len(size.blocks) == 12
        assert size.control is not None
        assert size.whole < 5 * size.control


def test_a_velocity_that_is_not_finite_is_refused_in_every_precision(tmp_path: Path) -> None:
    """fp8 has no bar on the whole, and its last layer lies behind the last block."""
    size = SizeErrors(height=1, width=1, whole=float("inf"), blocks={"a": 0.0})
    for bar in (None, 0.002):
        found = Verification(what="", whole_bar=bar, block_bar=1, sizes=(size,), seconds=1)
        with pytest.raises(EngineError, match="the velocity is not finite at 1 × 1 tokens"):
            verify_module._check_limits(found, tmp_path)
