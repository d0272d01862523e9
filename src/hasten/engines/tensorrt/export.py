"""From a transformer to an ONNX graph, without ever holding a second copy of its weights.

The step is exported with tensors that have shapes and no values, so what torch.onnx makes is small
whatever the model. Then each weight is rounded, quantised where it is to be, and written to
`model.onnx.data`, one at a time; `model.onnx` refers to it. Both files depend on the weights, the
scales and the versions of torch and onnxscript, and on nothing else: repeats are byte-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.graph import hide, label, place
from hasten.engines.tensorrt.manifest import Shapes
from hasten.engines.tensorrt.nodes import Amax, QdqLinear, swap, translation
from hasten.engines.tensorrt.packages import needed
from hasten.engines.tensorrt.step import INPUTS, OUTPUT, Watched, sample
from hasten.errors import EngineError
from hasten.families.family import Family
from hasten.log import quiet
from hasten.structural_copy import share_weights

__all__ = [
    "DATA",
    "DTYPES",
    "GRAPH",
    "export_onnx",
    "in_float32",
    "in_precision",
    "refuse_adapters",
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""A precision's dtype of everything that is not FP8 or, as norms' insides are, float32."""

OPSET = 20  # 19 brought FP8 to QuantizeLinear, 20 brought Gelu
TRACED = 4, 6  # image tokens of the inputs to trace with; any will do
SMALL = 4096  # bytes of a constant that may be computed in advance and kept in the graph
PREFIX = "transformer."


def export_onnx(
    transformer: Any,
    family: Family,
    precision: str,
    amax: Mapping[str, Amax] | None,
    shapes: Shapes,
    folder: Path,
) -> None:
    """Write `model.onnx` and `model.onnx.data` of a `Step`.

    Args:
        transformer: In any floating-point dtype, on any device; it stays as it is.
        family: Its family.
        precision: bf16, fp16 or fp8.
        amax: For fp8, of every quantisable linear.
        shapes: Only their text length matters.
        folder: An empty folder.

    Raises:
        EngineError: Adapters, tensors without values, a calibration of another model, or a step
            that cannot be exported.
        UnsupportedError: A package is missing, or the transformer is offloaded or compiled.
        OSError: The folder cannot be written.
    """
    _refuse(transformer, family, precision, amax)
    model = _graph(transformer, family, precision, amax or {}, shapes)
    weights = _Weights(transformer, DTYPES[precision], amax or {})
    written = _write_weights(model, weights, folder / DATA)
    _simplify(model, written)
    hide(model)
    _strip(model)
    needed("onnx_ir").save(model, folder / GRAPH)


def in_precision(
    transformer: Any, precision: str, amax: Mapping[str, Amax] | None = None
) -> nn.Module:
    """The transformer that a graph of this precision computes, in torch.

    A structural copy in the precision's dtype with FP8 linears where `amax` names them. Tensors
    that are in that dtype already are shared with the original. `.float()` of the copy changes no
    value: it is what the graph's float32 twin computes.
    """
    dtype = DTYPES[precision]
    twin: nn.Module = _rebuilt(transformer, lambda tensor: tensor.detach().to(_kept(tensor, dtype)))
    swap(twin, amax or {})
    return twin


def in_float32(transformer: Any) -> nn.Module:
    """A structural copy in float32 on the CPU; tensors that are both already are shared."""
    twin: nn.Module = _rebuilt(
        transformer, lambda tensor: tensor.detach().to("cpu", _kept(tensor, torch.float32))
    )
    return twin


def refuse_adapters(transformer: nn.Module) -> None:
    """EngineError where layers carry adapters (LoRA) that are not part of their weights."""
    adapted = [
        name for name, module in transformer.named_modules() if hasattr(module, "base_layer")
    ]
    if adapted:
        raise EngineError(
            f"{len(adapted)} layers carry LoRA adapters ({adapted[0]}, …), which an engine would "
            "lose",
            "pipe.fuse_lora() and then pipe.unload_lora_weights() before exporting",
        )


def _refuse(
    transformer: Any, family: Family, precision: str, amax: Mapping[str, Amax] | None
) -> None:
    """Raise EngineError for what cannot be exported."""
    if precision not in DTYPES:
        raise EngineError(f"no precision is called {precision!r}", f"one of {', '.join(DTYPES)}")
    refuse_adapters(transformer)
    empty = [name for name, tensor in _tensors(transformer).items() if tensor.is_meta]
    if empty:
        raise EngineError(
            f"{len(empty)} tensors of the transformer have no values, the first is {empty[0]}",
            "load the whole model before exporting it: device_map=None, nothing offloaded",
        )
    names = {name for name, _ in family.quantizable(transformer)} if precision == "fp8" else set()
    if names != set(amax or {}):
        odd = sorted(names ^ set(amax or {}))
        raise EngineError(
            f"the calibration does not belong to this model in {precision}: {len(odd)} linears "
            f"differ, the first is {odd[0]}",
            "calibrate this model, for fp8 only",
        )


def _graph(
    transformer: Any, family: Family, precision: str, amax: Mapping[str, Amax], shapes: Shapes
) -> Any:
    """The step as an onnx_ir.Model whose weights have shapes and no values, and whose outputs are
    the velocity and what each block gives."""
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
    label(program.model, step.names)
    return program.model


def _cannot_export(error: BaseException) -> EngineError:
    """What is behind an error of the exporter's, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, EngineError):
        return error
    first = (str(error).splitlines() or [""])[0]
    return EngineError(
        f"the transformer cannot be exported to ONNX: {type(error).__name__}: {first}",
        "export the plain transformer, neither optimised nor with processors of your own",
    )


def _rebuilt(transformer: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """A structural copy with `make(tensor)` for every tensor; what was shared is shared again."""
    twin = share_weights(transformer)
    made: dict[int, Tensor] = {}
    for module in twin.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, False) if is_parameter else new
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
    return twin


def _hollow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Under fake tensors: one of this shape, on the CPU."""
    return torch.empty(tensor.shape, dtype=_kept(tensor, dtype), device="cpu")


def _hollow_amax(amax: Amax) -> Amax:
    """Under fake tensors: one whose factors have no values."""
    if amax.smooth is None:
        return amax
    return Amax(amax.input, amax.weight, torch.empty(amax.smooth.shape))


def _kept(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor has in a model of this dtype: integers stay what they are."""
    return dtype if tensor.is_floating_point() else tensor.dtype


class _Weights:
    """The values of a graph's initialisers by name, made on access, as `in_precision` has them.

    The tensors of one linear are made together and kept until another linear's are accessed.
    """

    def __init__(
        self, transformer: nn.Module, dtype: torch.dtype, amax: Mapping[str, Amax]
    ) -> None:
        self.tensors = _tensors(transformer)
        self.dtype = dtype
        self.amax = amax
        self.linear: tuple[str, QdqLinear] | None = None

    def __getitem__(self, name: str) -> Tensor:
        name = name.removeprefix(PREFIX)
        owner, _, leaf = name.rpartition(".")
        if owner not in self.amax:
            return self._cast(name)
        if self.linear is None or self.linear[0] != owner:
            self.linear = None  # before the next is made
            self.linear = owner, QdqLinear(self._cast(f"{owner}.weight"), None, self.amax[owner])
        if leaf == "bias":
            return self._cast(name)
        tensor: Tensor = getattr(self.linear[1], leaf)
        return tensor

    def _cast(self, name: str) -> Tensor:
        tensor = self.tensors[name].detach()
        return tensor.to("cpu", _kept(tensor, self.dtype))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _write_weights(model: Any, weights: _Weights, path: Path) -> frozenset[str]:
    """Write the values of the hollow initialisers to a file alongside the graph; their names."""
    from torch._subclasses.fake_tensor import FakeTensor

    ir = needed("onnx_ir")
    hollow = {
        name: value
        for name, value in model.graph.initializers.items()
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor)
    }
    with path.open("wb") as file:
        for name, value in hollow.items():
            values = _bytes(weights[name])
            assert len(values) == value.const_value.nbytes, name
            offset = place(file, len(values))
            file.write(values)
            value.const_value = ir.ExternalTensor(
                path.name,
                offset,
                len(values),
                value.const_value.dtype,
                shape=value.shape,
                name=name,
                base_dir=str(path.parent),
            )
    return frozenset(hollow)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _simplify(model: Any, weights: frozenset[str]) -> None:
    """Compute what is constant in advance, but nothing that starts from a weight."""

    def should_fold(node: Any) -> bool | None:
        from_weights = any(value is not None and value.name in weights for value in node.inputs)
        return False if from_weights else None

    with quiet():
        needed("onnxscript.optimizer").optimize_ir(
            model, input_size_limit=SMALL, output_size_limit=SMALL, should_fold=should_fold
        )


def _strip(model: Any) -> None:
    """Remove notes about where in the source each node came from: they hold absolute paths."""
    model.metadata_props.clear()
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
