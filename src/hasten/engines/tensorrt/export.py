"""Exports a transformer to an ONNX graph without a second copy of its weights in memory.

The step is exported with fake tensors, which have shapes but no values, so the output of torch.onnx
is small for every model. Then the weights are rounded, quantised if requested, and written to
`model.onnx.data` one at a time; `model.onnx` refers to them. Both files depend only on the weights,
the scales and the versions of torch and onnxscript: repeated exports are byte-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.manifest import Shapes
from hasten.engines.tensorrt.nodes import Amax, scales_of, swap, translation, weight_codes
from hasten.engines.tensorrt.packages import needed
from hasten.engines.tensorrt.step import INPUTS, OUTPUT, Watched, sample
from hasten.errors import EngineError
from hasten.families.family import Family
from hasten.log import quiet
from hasten.quantization.plan import adapted_layers
from hasten.structural_copy import replace_tensors, share_weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""The dtype of a precision, except for FP8 codes and the float32 arithmetic of norms."""

OPSET = 20  # 19 added FP8 to QuantizeLinear, 20 added Gelu
TRACED = 4, 6  # height and width of the traced inputs in image tokens; any values work
SMALL = 4096  # bytes: larger constants are not folded
PREFIX = "transformer."


def export_onnx(
    transformer: Any,
    family: Family,
    precision: str,
    amax: Mapping[str, Amax] | None,
    shapes: Shapes,
    folder: Path,
) -> None:
    """Export a `Step` to `model.onnx` and `model.onnx.data`.

    Args:
        transformer: A transformer in any floating-point dtype, on any device; it is not changed.
        family: Its family.
        precision: "bf16", "fp16" or "fp8".
        amax: For fp8, the calibrated values of every quantisable linear.
        shapes: The sizes of the engine; only the text length is used.
        folder: An empty folder.

    Raises:
        EngineError: The transformer has adapters or tensors without values, the calibration belongs
            to another model, or the step cannot be exported.
        UnsupportedError: A package is missing, or the transformer is offloaded or compiled.
        OSError: The folder cannot be written.
    """
    _refuse(transformer, family, precision, amax)
    model, states = _graph(transformer, family, precision, amax or {}, shapes)
    _simplify(model, _fill_in(model, _tensors(transformer), DTYPES[precision], amax or {}))
    _hide(model, states)
    _strip(model)
    needed("onnx_ir").save(model, folder / GRAPH, external_data=DATA)


def in_precision(
    transformer: Any, precision: str, amax: Mapping[str, Amax] | None = None
) -> nn.Module:
    """Build the torch equivalent of a graph of this precision on the CPU.

    It is a structural copy in the precision's dtype, with FP8 linears for the names in `amax`.
    `.float()` of the copy changes no values and is equivalent to the graph's float32 version.
    """
    converted = in_dtype(transformer, DTYPES[precision])
    swap(converted, amax or {})
    return converted


def in_dtype(transformer: Any, dtype: torch.dtype) -> nn.Module:
    """A structural copy in a dtype on the CPU; tensors that need no conversion are shared."""
    converted: nn.Module = _rebuilt(
        transformer, lambda tensor: tensor.detach().to("cpu", _dtype_for(tensor, dtype))
    )
    return converted


def refuse_adapters(transformer: nn.Module) -> None:
    """Raise EngineError if layers have LoRA adapters that are not fused into their weights."""
    if adapted := adapted_layers(transformer):
        raise EngineError(
            f"{len(adapted)} layers have LoRA adapters ({adapted[0]}, …), which would not be "
            "exported",
            "call pipe.fuse_lora() and pipe.unload_lora_weights() before exporting",
        )


def _refuse(
    transformer: Any, family: Family, precision: str, amax: Mapping[str, Amax] | None
) -> None:
    """Raise EngineError for what cannot be exported."""
    if precision not in DTYPES:
        raise EngineError(f"unknown precision {precision!r}", f"use one of {', '.join(DTYPES)}")
    refuse_adapters(transformer)
    empty = [name for name, tensor in _tensors(transformer).items() if tensor.is_meta]
    if empty:
        raise EngineError(
            f"{len(empty)} tensors of the transformer have no values; the first is {empty[0]}",
            "load the complete model before exporting it: device_map=None, nothing offloaded",
        )
    names = {name for name, _ in family.quantizable(transformer)} if precision == "fp8" else set()
    if names != set(amax or {}):
        odd = sorted(names ^ set(amax or {}))
        raise EngineError(
            f"the calibration does not match this model in {precision}: {len(odd)} linears "
            f"differ; the first is {odd[0]}",
            "calibrate this model for fp8; omit the calibration for other precisions",
        )


def _graph(
    transformer: Any, family: Family, precision: str, amax: Mapping[str, Amax], shapes: Shapes
) -> tuple[Any, Sequence[str]]:
    """Export the step with fake weights.

    Returns:
        An onnx_ir.Model whose outputs are the velocity and the outputs of each block, and the names
        for the latter.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    needed("onnx_ir")
    needed("onnxscript")
    dtype = DTYPES[precision]
    with FakeTensorMode(allow_non_fake_inputs=False), quiet(), torch.no_grad():
        ghost = _rebuilt(transformer, lambda tensor: _hollow(tensor, dtype))
        swap(ghost, {name: _hollow_amax(largest) for name, largest in amax.items()})
        step = Watched(ghost, family).eval()
        inputs = sample(ghost, family, shapes, *TRACED, dtype, seed=0)
        try:
            program = torch.onnx.export(
                step,
                kwargs=inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=INPUTS,
                output_names=[OUTPUT],
                dynamic_shapes=shapes.dynamic(),
                custom_translation_table=translation(),
                optimize=False,  # it would read the weights
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise _cannot_export(error) from error
    assert program is not None
    return program.model, step.names


def _cannot_export(error: BaseException) -> EngineError:
    """The one-line form of an exporter's error, from its first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, EngineError):
        return error
    first = (str(error).splitlines() or [""])[0]
    return EngineError(
        f"the transformer cannot be exported to ONNX: {type(error).__name__}: {first}",
        "export the plain transformer, not optimised and without custom processors",
    )


def _rebuilt(transformer: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """A structural copy with `make(tensor)` for every tensor; tied tensors stay tied."""

    def rebuild(tensor: Tensor) -> Tensor:
        converted = make(tensor)
        return nn.Parameter(converted, False) if isinstance(tensor, nn.Parameter) else converted

    return replace_tensors(share_weights(transformer), rebuild)


def _hollow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In fake tensor mode: a tensor of the same shape on the CPU."""
    return torch.empty(tensor.shape, dtype=_dtype_for(tensor, dtype), device="cpu")


def _hollow_amax(amax: Amax) -> Amax:
    """In fake tensor mode: the same values with factors of the same shape."""
    return replace(amax, smooth=None if amax.smooth is None else torch.empty(amax.smooth.shape))


def _dtype_for(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in a model of dtype `dtype`; integers are unchanged."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def _fill_in(
    model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, amax: Mapping[str, Amax]
) -> frozenset[str]:
    """Give the fake initialisers their values, computed when written; return their names."""
    from torch._subclasses.fake_tensor import FakeTensor

    ir = needed("onnx_ir")
    adapters = needed("onnx_ir.tensor_adapters")

    def values(name: str) -> Any:
        tensor = _weight(name.removeprefix(PREFIX), tensors, dtype, amax)
        return adapters.TorchTensor(tensor, name)

    filled = set()
    for name, value in model.graph.initializers.items():
        hollow = value.const_value
        if isinstance(getattr(hollow, "raw", None), FakeTensor):
            value.const_value = ir.LazyTensor(
                partial(values, name), dtype=hollow.dtype, shape=hollow.shape, name=name
            )
            filled.add(name)
    return frozenset(filled)


def _weight(
    name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, amax: Mapping[str, Amax]
) -> Tensor:
    """A parameter or buffer of the transformer, with the values of `in_precision`."""
    owner, _, leaf = name.rpartition(".")
    scales = scales_of(amax[owner], dtype, torch.device("cpu")) if owner in amax else {}
    if leaf in scales:
        tensor: Tensor = scales[leaf]
        return tensor
    tensor = tensors[name].detach()
    tensor = tensor.to("cpu", _dtype_for(tensor, dtype))
    if not scales or leaf == "bias":
        return tensor
    return weight_codes(tensor, scales["weight_scale"], scales["smooth"])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones appear under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _simplify(model: Any, weights: frozenset[str]) -> None:
    """Fold constants, except those computed from weights."""

    def should_fold(node: Any) -> bool | None:
        from_weights = any(value is not None and value.name in weights for value in node.inputs)
        return False if from_weights else None

    with quiet():
        needed("onnxscript.optimizer").optimize_ir(
            model, input_size_limit=SMALL, output_size_limit=SMALL, should_fold=should_fold
        )


def _hide(model: Any, states: Sequence[str]) -> None:
    """Turn the block outputs into inner values with these names; remove nodes that become unused.

    Being graph outputs kept them separate tensors during the simplification.
    """
    for value, name in zip(model.graph.outputs[1:], states, strict=True):
        value.name = name
    del model.graph.outputs[1:]
    needed("onnx_ir.passes.common").RemoveUnusedNodesPass()(model)


def _strip(model: Any) -> None:
    """Remove metadata on the source of each node, which contains absolute paths."""
    needed("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    outputs = (value for node in graph.all_nodes() for value in node.outputs)
    for noted in (model, *graph.inputs, *graph.initializers.values(), *outputs):
        noted.metadata_props.clear()
