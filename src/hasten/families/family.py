"""The description of a model family, as data. Importing this module loads no model.

The transformer's own forward always runs. hasten adds layers in front of it (plans, graphs), hooks
around its blocks (residual cache) and readers in its modulation linears (table). So a family names
the parts of the transformer and does not reimplement its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import Tensor, nn

from hasten.step.constants import Conditioning, Split
from hasten.step.modulations import Modulations
from hasten.step.protocols import Transformer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of B×L×heads×head_dim queries, keys and values."""

Decode = Callable[[Any, Tensor, int, int], Tensor]
"""(pipeline, final latents P×tokens×channels, height, width) -> images, P×3×H×W in [-1, 1]."""


Encode = Callable[[Any, str, int], dict[str, Any]]
"""(pipeline, prompt, maximum text tokens) -> arguments of its call that replace the prompt."""


@dataclass(frozen=True)
class Stack:
    """A ModuleList of blocks.

    Attributes:
        name: Its attribute name in the transformer.
        returns: The arguments that a block returns, in the order in which it returns them.
    """

    name: str
    returns: tuple[str, ...] = ("hidden_states",)


class Kernels(Protocol):
    """Runs a family's blocks on fused kernels."""

    def reasons_against(
        self, transformer: Transformer, planned: Mapping[nn.Module, type]
    ) -> list[str]:
        """Why the blocks cannot run on the kernels once `planned` is applied; empty if they can.

        Args:
            transformer: The transformer.
            planned: The classes that will replace linears, by linear.
        """

    def fused(self, transformer: Transformer, modulations: Modulations, attend: Attend) -> Any:
        """Build the body of a step on the kernels.

        Returns:
            A `Body` with two further members: `changed() -> str | None`, the part that was
            replaced since; and `codes`, the dtypes of its quantised products.
        """


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: The name in messages.
        stacks: The repeated blocks, in execution order.
        output: Streams that form the output; the residual cache compares the first.
        modulations: Name patterns of linears in the blocks that process one row per step. They are
            never quantised.
        tokens: Arguments of the forward whose tokens attend to each other, B×tokens×….
        declared: Whether the family was declared rather than derived from the class.
        conditioning: How its modulations are conditioned; None without a conditioning table.
        split: Splits a step for kernels and engines; optional.
        kernels: The fused kernels; optional.
        export: The parts of a step for the export of engines; optional.
        decode: Converts final latents to images, to score schedules by their images.
        encode: Converts a prompt to embeddings, to time the sampling steps alone.
    """

    name: str
    stacks: tuple[Stack, ...] = ()
    output: tuple[str, ...] = ("hidden_states",)
    modulations: tuple[str, ...] = ("*norm*.linear", "*_mod.*", "adaLN_modulation.*")
    tokens: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    declared: bool = True
    conditioning: Conditioning | None = None
    split: Split | None = None
    kernels: Kernels | None = None
    export: Any = field(default=None, repr=False)
    decode: Decode | None = None
    encode: Encode | None = None

    def blocks(self, transformer: Transformer) -> list[tuple[str, nn.Module, Stack]]:
        """(name, block, stack) of every repeated block, in execution order."""
        return [
            (f"{stack.name}.{index}", block, stack)
            for stack in self.stacks
            for index, block in enumerate(getattr(transformer, stack.name))
        ]

    def repeated_blocks(self, transformer: Transformer) -> list[tuple[str, nn.Module]]:
        """(name, block) of every repeated block, in execution order."""
        return [(name, block) for name, block, _ in self.blocks(transformer)]

    def quantizable(self, transformer: Transformer) -> list[tuple[str, nn.Linear]]:
        """(name, linear) of every linear in the blocks except the modulations.

        A modulation processes one row per step, so quantising it saves no time, and its error would
        affect all tokens.
        """
        return [
            (f"{block_name}.{name}", module)
            for block_name, block in self.repeated_blocks(transformer)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
            and not any(fnmatchcase(name, pattern) for pattern in self.modulations)
        ]

    def modulated_norms(self, transformer: Transformer) -> list[tuple[str, nn.Module]]:
        """(name, norm) of every norm with a modulation linear; empty without `conditioning`."""
        return [] if self.conditioning is None else self.conditioning.norms(transformer)
