"""What hasten needs to know of a model family: data. Importing this loads no model.

The transformer's own forward always runs. hasten stands before it (plans, graphs), before its
blocks (residual cache) and in its modulation linears (table), so a family says what its parts are
called and writes nothing of its forward again.
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
"""(pipeline, final latents P×tokens×channels, height, width) -> pictures, P×3×H×W in [-1, 1]."""


Encode = Callable[[Any, str, int], dict[str, Any]]
"""(pipeline, prompt, longest text in tokens) -> arguments of its call in place of the prompt."""


@dataclass(frozen=True)
class Stack:
    """A ModuleList of blocks.

    Attributes:
        name: The transformer's attribute.
        returns: Which of its arguments a block gives back, in the order in which it does.
    """

    name: str
    returns: tuple[str, ...] = ("hidden_states",)


class Kernels(Protocol):
    """The blocks on fused kernels."""

    def reasons_against(
        self, transformer: Transformer, to_be: Mapping[nn.Module, type]
    ) -> list[str]:
        """Why the blocks cannot run on them, once these linears are quantised; empty where they
        can."""

    def fused(self, transformer: Transformer, modulations: Modulations, attend: Attend) -> Any:
        """The body: also `changed() -> str | None`, what was replaced since, and `codes`, the
        dtypes of its quantised products."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: For messages.
        stacks: Its repeated blocks, in the order in which they run.
        output: Streams that the output is made of; the residual cache compares the first.
        modulations: Patterns of linears in the blocks that see one row per step: never quantised.
        tokens: Arguments of the forward whose tokens attend to each other, B×tokens×….
        declared: Whether somebody has said all this, or it was guessed.
        conditioning: Its modulations, where a table of them pays.
        split, kernels, export: Opt-in parts; see their protocols.
        decode: Final latents to pictures, for what judges a schedule by its pictures.
        encode: A prompt to embeddings, for what times the sampling steps alone.
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
        """(name, block, its stack) of every repeated block, in the order in which they run."""
        return [
            (f"{stack.name}.{index}", block, stack)
            for stack in self.stacks
            for index, block in enumerate(getattr(transformer, stack.name))
        ]

    def repeated_blocks(self, transformer: Transformer) -> list[tuple[str, nn.Module]]:
        """(name, block) of every repeated block, in the order in which they run."""
        return [(name, block) for name, block, _ in self.blocks(transformer)]

    def quantizable(self, transformer: Transformer) -> list[tuple[str, nn.Linear]]:
        """(name, linear) of every linear in the blocks but the modulations.

        A modulation sees one row per step, so it gains nothing, and it scales all tokens at once.
        """
        return [
            (f"{block_name}.{name}", module)
            for block_name, block in self.repeated_blocks(transformer)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
            and not any(fnmatchcase(name, pattern) for pattern in self.modulations)
        ]

    def modulated_norms(self, transformer: Transformer) -> list[tuple[str, nn.Module]]:
        """(name, norm) of every norm with a modulation linear; empty where no table is declared."""
        return [] if self.conditioning is None else self.conditioning.norms(transformer)
