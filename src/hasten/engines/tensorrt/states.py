"""What flows between the blocks, under names of its own in a graph.

The exporter gives these tensors reserved names, `block/NAME/POSITION` for each output of a block,
so that a finished graph can be read block by block however its nodes came to be called.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hasten.engines.tensorrt.packages import needed
from hasten.engines.tensorrt.step import Step
from hasten.errors import EngineError

__all__ = ["Watched", "block_of", "hide", "hooked", "label", "opened", "state_name"]

PREFIX = "block/"
Blocks = Sequence[tuple[str, nn.Module]]


def state_name(block: str, position: int) -> str:
    """The name in the graph of an output of a block, counted in the order in which it gives them.

    Of FLUX.1's blocks, 0 is text (1×T×D) and 1 is image (1×S×D).
    """
    return f"{PREFIX}{block}/{position}"


def block_of(state: str) -> str:
    """The block that gives the tensor of this name."""
    return state.removeprefix(PREFIX).rpartition("/")[0]


@contextmanager
def hooked(blocks: Blocks, seen: Callable[[str, Any], Any]) -> Iterator[None]:
    """While it lasts, `seen(name, output)` is called behind each block; what it answers, unless
    None, is the block's output."""
    with ExitStack() as hooks:
        for name, block in blocks:

            def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> Any:
                return seen(name, output)

            hooks.callback(block.register_forward_hook(hook).remove)
        yield


class Watched(Step):
    """A step for the exporter: gives the velocity and, behind it, all outputs of all blocks.

    `names` are those of the latter, known once it has run. Exported with them as graph outputs,
    the tensors keep apart through optimisation; `hide` makes them inner values again.
    """

    names: tuple[str, ...] = ()

    def forward(  # type: ignore[override]
        self, latents: Tensor, text: Tensor, row: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        """Velocity 1×S×C, then per block what it gives; inputs as those of `Step`."""
        found: dict[str, Tensor] = {}

        def seen(name: str, output: tuple[Tensor, ...]) -> None:
            found.update({state_name(name, at): tensor for at, tensor in enumerate(output)})

        with hooked(self.family.repeated_blocks(self.transformer), seen):
            velocity = super().forward(latents, text, row, cos, sin)
        self.names = tuple(found)
        return velocity, *found.values()


def label(model: Any, names: Sequence[str]) -> None:
    """Name the outputs of an onnx_ir model behind the first."""
    outputs = model.graph.outputs[1:]
    for value, name in zip(outputs, names, strict=True):
        value.name = name


def hide(model: Any) -> None:
    """Leave the first output alone; the others keep their names, what only they needed goes."""
    del model.graph.outputs[1:]
    needed("onnx_ir.passes.common").RemoveUnusedNodesPass()(model)


def opened(graph: Path, folder: Path) -> tuple[Path, list[str]]:
    """A copy of a graph file, in a folder, that gives its named states as outputs; and their names.

    The weights are not copied where the file system can link them. EngineError where the file is
    no graph or names no state.
    """
    onnx = needed("onnx")
    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError and its kin share no base
        raise _unreadable(graph, str(error) or type(error).__name__) from error
    names = [name for node in model.graph.node for name in node.output if name.startswith(PREFIX)]
    if not names:
        raise _unreadable(graph, "it names no block")
    for name in names:
        model.graph.output.add().name = name
    if graph.parent != folder:
        for weights, size in _weights(model).items():
            _bring(graph.with_name(weights), folder / weights, size)
    path = folder / "opened.onnx"
    onnx.save(model, path)
    return path, names


def _weights(model: Any) -> dict[str, int]:
    """Files beside the graph that its weights are in, and how many bytes each has at least."""
    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            end = int(place["offset"]) + int(place["length"])
            sizes[place["location"]] = max(end, sizes.get(place["location"], 0))
    return sizes


def _bring(source: Path, target: Path, size: int) -> None:
    """Link a file, or copy it; EngineError where it is not there or shorter than `size`."""
    found = source.stat().st_size if source.is_file() else 0
    if found < size:
        raise _unreadable(source, f"it has {found} of {size} bytes")
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _unreadable(path: Path, why: str) -> EngineError:
    return EngineError(
        f"{path} is not a graph that this version of hasten exported: {' '.join(why.split())}",
        "delete the folder it is in and export again",
    )
