"""From a transformer to a graph: the same function, the same bytes, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.engines.tensorrt import export
from hasten.engines.tensorrt.export import export_onnx, in_precision
from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.manifest import Shapes
from hasten.engines.tensorrt.nodes import Amax, QdqLinear
from hasten.engines.tensorrt.step import INPUTS, OUTPUT
from hasten.errors import EngineError, UnsupportedError
from tests.engines.tensorrt.conftest import (
    FAMILY,
    SHAPES,
    amax_of,
    small_transformer,
    unchanged_globals,
)
from tests.engines.tensorrt.test_store import files_up_to

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")

Exported = Callable[[str], Path]
PRECISIONS = ("bf16", "fp16", "fp8")


def values_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every initialiser."""
    values = ir.load(folder / GRAPH).graph.initializers
    return {name: value.const_value.tobytes() for name, value in values.items()}


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_takes_and_gives_what_a_step_does(exported: Exported, precision: str) -> None:
    model = onnx.load(exported(precision) / GRAPH, load_external_data=False)
    tensors = {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    kind = "FLOAT16" if precision == "fp16" else "BFLOAT16"
    tokens = ["image_tokens + 8", 24]
    assert list(tensors) == [*INPUTS, OUTPUT]
    assert tensors == {
        "latents": (kind, [1, "image_tokens", 16]),
        "text": (kind, [1, 8, 48]),
        "row": (kind, [1, 48 * (6 + 6 + 3 + 2)]),
        "cos": ("FLOAT", tokens),
        "sin": ("FLOAT", tokens),
        "velocity": (kind, [1, "image_tokens", 16]),
    }
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert {path.name for path in exported(precision).iterdir()} == {GRAPH, DATA}


def test_every_quantisable_linear_is_fp8_and_nothing_else(exported: Exported) -> None:
    graph = onnx.load(exported("fp8") / GRAPH, load_external_data=False).graph
    fp8 = onnx.TensorProto.FLOAT8E4M3FN
    codes = {tensor.name for tensor in graph.initializer if tensor.data_type == fp8 and tensor.dims}
    names = [name for name, _ in FAMILY.quantizable(small_transformer())]
    assert codes == {f"transformer.{name}.weight" for name in names}
    read = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert codes <= set(read)
    quantised = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == len(read) - len(codes) == len(names)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_written_weights_are_those_of_the_module(exported: Exported, precision: str) -> None:
    model = small_transformer()
    twin = in_precision(model, precision, amax_of(model) if precision == "fp8" else None)
    expected = {f"transformer.{name}": tensor for name, tensor in twin.state_dict().items()}
    found = values_of(exported(precision))
    written = found.keys() & expected.keys()
    for name in written:
        assert found[name] == bytes_of(expected[name]), name
    absent = {name for name in expected.keys() - written if not name.endswith(("_scale", "_zero"))}
    unused = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
    outside = ("transformer.context_embedder", "transformer.time_text_embed")
    assert all(any(part in name for part in (*unused, *outside)) for name in absent), absent
    assert not any(part in name for part in (*unused, *outside) for name in written)


def test_a_float32_copy_has_the_values_of_the_precision(transformer: Any) -> None:
    twin = in_precision(transformer, "fp8", amax_of(transformer))
    narrow = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    for name, tensor in twin.float().state_dict().items():
        assert torch.equal(tensor.float(), narrow[name].float())
    assert {tensor.dtype for tensor in transformer.state_dict().values()} == {torch.float32}


def test_sharing_survives_the_change_of_precision(transformer: Any) -> None:
    attention = transformer.transformer_blocks[0].attn
    attention.to_k.weight = attention.to_q.weight
    twin: Any = in_precision(transformer, "bf16")
    tied = twin.transformer_blocks[0].attn
    assert tied.to_k.weight is tied.to_q.weight
    assert tied.to_k.weight is not attention.to_q.weight
    assert tied.to_v.weight is not tied.to_q.weight


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_repeats_are_byte_identical(exported: Exported, precision: str, tmp_path: Path) -> None:
    """Whatever the profile, and wherever the files go."""
    model = small_transformer()
    shapes = Shapes(text=SHAPES.text, least=1, best=1, most=1024)
    amax = amax_of(model) if precision == "fp8" else None
    export_onnx(model, FAMILY, precision, amax, shapes, tmp_path)
    for name in (GRAPH, DATA):
        assert (tmp_path / name).read_bytes() == (exported(precision) / name).read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_file_says_where_it_was_made(exported: Exported, precision: str) -> None:
    written = (exported(precision) / GRAPH).read_bytes()
    places = (Path(export.__file__).parent, Path(torch.__file__).parent, exported(precision))
    words = (*map(str, places), ".py", "site-packages", "stack_trace", "pkg.torch", "Traceback")
    assert [word for word in words if word.encode() in written] == []


def test_tied_weights_are_written_right(tmp_path: Path) -> None:
    """The same parameter under two names, plain and quantised by two calibrations."""
    model = small_transformer()
    attention = model.transformer_blocks[0].attn
    attention.to_k.weight = attention.to_q.weight
    attention.norm_k.weight = attention.norm_q.weight
    amax = amax_of(model)
    name = "transformer_blocks.0.attn.to_k"
    amax[name] = Amax(amax[name].input, 2 * amax[name].weight)
    export_onnx(model, FAMILY, "fp8", amax, SHAPES, tmp_path)
    found = values_of(tmp_path)
    twin = in_precision(model, "fp8", amax).state_dict()
    for linear in ("to_q", "to_k"):
        key = f"transformer_blocks.0.attn.{linear}.weight"
        assert found[f"transformer.{key}"] == bytes_of(twin[key])
    codes = [twin[f"transformer_blocks.0.attn.{linear}.weight"] for linear in ("to_q", "to_k")]
    assert bytes_of(codes[0]) != bytes_of(codes[1])
    prefix = "transformer.transformer_blocks.0.attn.norm_"
    once = [found[f"{prefix}{side}.weight"] for side in "qk" if f"{prefix}{side}.weight" in found]
    assert once == [bytes_of(twin["transformer_blocks.0.attn.norm_q.weight"])]


def test_smoothing_is_in_the_graph(tmp_path: Path, transformer: Any) -> None:
    smooth = torch.rand(48) + 0.5
    name = "transformer_blocks.0.attn.to_q"
    amax = {**amax_of(transformer), name: Amax(4.0, 2.0, smooth)}
    export_onnx(transformer, FAMILY, "fp8", amax, SHAPES, tmp_path)
    assert values_of(tmp_path)[f"transformer.{name}.smooth"] == bytes_of(smooth.bfloat16())


def test_nothing_is_left_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = small_transformer()
    modules, tensors = dict(model.named_modules()), dict(model.state_dict(keep_vars=True))
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with unchanged_globals():
        export_onnx(model, FAMILY, "fp8", amax_of(model), SHAPES, tmp_path)
    assert dict(model.named_modules()) == modules
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name]
        assert torch.equal(tensor, values[name])
    for module in model.modules():
        assert not isinstance(module, QdqLinear)
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert capfd.readouterr() == ("", "")


def test_a_failure_leaves_the_transformer(tmp_path: Path, transformer: Any) -> None:
    with files_up_to(1000), pytest.raises(OSError, match="File too large"), unchanged_globals():
        export_onnx(transformer, FAMILY, "bf16", None, SHAPES, tmp_path)
    assert not any("forward" in module.__dict__ for module in transformer.modules())


def test_what_cannot_be_traced_is_refused(tmp_path: Path, transformer: Any) -> None:
    class Causal(nn.Module):
        """Another attention than the model's."""

        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            heads = hidden_states.unflatten(-1, (2, 24)).transpose(1, 2)
            made = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            both = made.transpose(1, 2).flatten(2)
            return both, both[:, : SHAPES.text]

    transformer.transformer_blocks[0].attn = Causal()
    with pytest.raises(EngineError, match="attention with a mask") as caught, unchanged_globals():
        export_onnx(transformer, FAMILY, "bf16", None, SHAPES, tmp_path)
    assert "its original attention processors" in caught.value.fix
    assert list(tmp_path.iterdir()) == []

    class Counting(Causal):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if float(hidden_states.sum()) > 0:
                return hidden_states, hidden_states
            return hidden_states, hidden_states * 2

    transformer.transformer_blocks[0].attn = Counting()
    with pytest.raises(EngineError, match="cannot be exported to ONNX: ") as caught:
        export_onnx(transformer, FAMILY, "bf16", None, SHAPES, tmp_path)
    assert len(caught.value.faults[0].splitlines()) == 1


def test_adapters_are_refused(tmp_path: Path, transformer: Any) -> None:
    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer

    attention = transformer.transformer_blocks[0].attn
    attention.to_q = Adapter(attention.to_q)
    with pytest.raises(EngineError, match=r"1 layers have LoRA .*blocks\.0\.attn\.to_q") as caught:
        export_onnx(transformer, FAMILY, "bf16", None, SHAPES, tmp_path)
    assert "fuse_lora()" in caught.value.fix
    assert "unload_lora_weights()" in caught.value.fix


def test_tensors_without_values_are_refused(tmp_path: Path, transformer: Any) -> None:
    transformer.proj_out.to("meta")
    with pytest.raises(EngineError, match=r"2 tensors .* no values; .* proj_out\.weight"):
        export_onnx(transformer, FAMILY, "bf16", None, SHAPES, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "change", "fault"),
    [
        ("fp8", lambda amax: None, "does not match this model in fp8: 17 linears"),
        ("fp8", lambda amax: dict(list(amax.items())[1:]), "1 linears"),
        ("fp8", lambda amax: {**amax, "proj_out": Amax(1.0, 1.0)}, r"1 linears .* proj_out"),
        ("bf16", lambda amax: amax, "in bf16: 17 linears"),
        ("int4", lambda amax: None, "unknown precision 'int4'"),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    tmp_path: Path,
    transformer: Any,
    precision: str,
    change: Callable[[dict[str, Amax]], dict[str, Amax] | None],
    fault: str,
) -> None:
    amax = change(amax_of(transformer))
    with pytest.raises(EngineError, match=fault):
        export_onnx(transformer, FAMILY, precision, amax, SHAPES, tmp_path)


@pytest.mark.parametrize("package", ["onnx_ir", "onnxscript"])
def test_a_missing_package_says_how_to_install_it(
    tmp_path: Path, transformer: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedError, match=f"{package} is not installed") as caught:
        export_onnx(transformer, FAMILY, "bf16", None, SHAPES, tmp_path)
    assert caught.value.fix == "pip install 'hasten[tensorrt]'"
    assert list(tmp_path.iterdir()) == []


def test_importing_the_stages_imports_no_heavy_package() -> None:
    stages = ("step", "nodes", "calibrate", "export", "graph")
    code = "import sys\n" + "".join(f"import hasten.engines.tensorrt.{name}\n" for name in stages)
    heavy = "onnx", "onnx_ir", "onnxscript", "onnxruntime", "modelopt", "tensorrt_rtx"
    code += f"assert not sys.modules.keys() & set({heavy!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_new_process_hears_nothing_of_the_libraries(tmp_path: Path) -> None:
    pytest.importorskip("modelopt.torch.quantization")
    code = f"""
import sys, warnings
from pathlib import Path
from tests.conftest import SMALL
from tests.engines.tensorrt.conftest import FAMILY, SHAPES, unchanged_globals
from hasten.models.random_weights import build_shape
import torch
pipe = build_shape(SMALL, torch.device("cpu"), torch.float32)
sys.stderr.flush()
before = list(warnings.filters)
from hasten.engines.tensorrt.calibrate import calibrate_fp8
from hasten.engines.tensorrt.export import export_onnx
print("begin", flush=True)
print("begin", file=sys.stderr, flush=True)
with unchanged_globals():
    amax = calibrate_fp8(pipe, FAMILY, ["a fox"], num_inference_steps=1, height=32, width=32,
                 max_sequence_length=8)
    export_onnx(pipe.transformer, FAMILY, "fp8", amax, SHAPES, Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.partition("begin\n")[2] == ""
    assert done.stderr.partition("begin\n")[2] == ""
