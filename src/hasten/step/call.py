"""One call of the transformer, its output, and the protocol of layers in front of the forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from hasten.step.run import Run


class _Hole:
    """Placeholder for a tensor among the leaves of an output."""


@dataclass(frozen=True, slots=True)
class Output:
    """The return value of a forward: a tree of tensors (a tuple, an output class, nested lists).

    Attributes:
        tensors: The tree's tensors, in order.
        rest: The tree's leaves, in order, with a placeholder for each tensor.
        spec: The structure of the tree.
        computed: Whether the whole transformer ran for this output.
    """

    tensors: tuple[Tensor, ...]
    rest: tuple[object, ...]
    spec: TreeSpec
    computed: bool = True

    @classmethod
    def of(cls, value: object) -> Output:
        """Split a forward's return value into tensors and the rest."""
        leaves, spec = tree_flatten(value)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        rest = tuple(_Hole if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(tensors, rest, spec)

    @classmethod
    def of_sample(cls, sample: Tensor, *, return_dict: bool) -> Output:
        """Wrap one tensor as Diffusers' image transformers return it."""
        if not return_dict:
            return cls.of((sample,))
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return cls.of(Transformer2DModelOutput(sample=sample))

    def but(self, tensors: Sequence[Tensor], *, computed: bool = True) -> Output:
        """The same tree with other tensors."""
        return replace(self, tensors=tuple(tensors), computed=computed)

    def detached(self) -> Output:
        """The same values, detached from any autograd graph."""
        return replace(self, tensors=tuple(tensor.detach() for tensor in self.tensors))

    def value(self) -> Any:
        """Rebuild the forward's return value."""
        tensors = iter(self.tensors)
        leaves = [next(tensors) if leaf is _Hole else leaf for leaf in self.rest]
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True, slots=True)
class StepCall:
    """One call of the transformer's forward.

    Attributes:
        inputs: The forward's arguments by name, in its order, without `return_dict`.
        run: The sampling run of the call; None outside a run.
        index: Index into the scheduler's timesteps; 0 outside a run.
        branch: Identifies the call within its step: name of the cache context, shapes of the
            latents, and order among equal calls.
        return_dict: Whether the call returns an output class instead of a tuple.
        constants: Tensors that layers compute once per run in place of inputs, by name.
    """

    inputs: Mapping[str, Any]
    run: Run | None
    index: int
    branch: Hashable
    return_dict: bool = True
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Number of steps of the run before this one; 0 outside a run."""
        return 0 if self.run is None else self.index - self.run.begin

    @property
    def latents(self) -> Tensor:
        """The first tensor of the first argument."""
        tensor: Tensor = next(x for x in tree_leaves(self.first) if isinstance(x, Tensor))
        return tensor

    @property
    def first(self) -> object:
        """The first argument: the latents, as a tensor or a list of tensors."""
        return next(iter(self.inputs.values()))

    @property
    def lora_scale(self) -> float:
        """The LoRA scale that the pipeline passes in its attention arguments; 1 by default."""
        for name, value in self.inputs.items():
            if name.endswith("attention_kwargs") and value is not None:
                return float(value.get("scale", 1.0))
        return 1.0

    def but(self, inputs: Mapping[str, Any], constants: Mapping[str, Tensor]) -> StepCall:
        """The same call with other inputs and constants."""
        return replace(self, inputs=inputs, constants=constants)


Inner = Callable[[StepCall], Output]
"""The remaining layers of the chain; the last one is the transformer's own forward."""


class Layer(Protocol):
    """A layer in front of the transformer's forward: a step cache, CUDA graphs …

    A layer stores its state of a run in `run.kept[name]`, which is dropped with the run.
    """

    name: str

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        """Handle a call, with or without calling `inner`."""

    def live(self) -> str:
        """Current counts and bytes for the summary; may be empty."""
