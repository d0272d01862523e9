"""One call of the transformer, what it returns, and what may stand before it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from hasten.step.run import Run


class _Hole:
    """Stands among the leaves of an output where a tensor belongs."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a forward returned: a tree of tensors (a tuple, an output class, lists in them).

    Attributes:
        tensors: The tree's tensors, in order.
        rest: Its leaves, in order, with a mark in the place of each tensor.
        spec: How the leaves are arranged.
        computed: Whether the whole transformer ran for it.
    """

    tensors: tuple[Tensor, ...]
    rest: tuple[object, ...]
    spec: TreeSpec
    computed: bool = True

    @classmethod
    def of(cls, value: object) -> Output:
        """Take a forward's return value apart."""
        leaves, spec = tree_flatten(value)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        rest = tuple(_Hole if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(tensors, rest, spec)

    @classmethod
    def of_sample(cls, sample: Tensor, *, return_dict: bool) -> Output:
        """One tensor, as Diffusers' image transformers return it."""
        if not return_dict:
            return cls.of((sample,))
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return cls.of(Transformer2DModelOutput(sample=sample))

    def but(self, tensors: Sequence[Tensor], *, computed: bool = True) -> Output:
        """The same tree of other tensors."""
        return replace(self, tensors=tuple(tensors), computed=computed)

    def detached(self) -> Output:
        """The same values outside of any autograd graph."""
        return replace(self, tensors=tuple(tensor.detach() for tensor in self.tensors))

    def value(self) -> Any:
        """The forward's return value again."""
        tensors = iter(self.tensors)
        leaves = [next(tensors) if leaf is _Hole else leaf for leaf in self.rest]
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True, slots=True)
class StepCall:
    """One call of the transformer's forward.

    Attributes:
        inputs: Arguments by the forward's own names, in its order, without `return_dict`.
        run: The sampling run that it belongs to; None outside of one.
        index: Index into the scheduler's timesteps; 0 outside of a run.
        branch: Which of the calls of its step: name of the cache context, shapes of the latents,
            order among equals.
        return_dict: Whether the caller wants an output class instead of a tuple.
        constants: What layers made once per run in place of inputs, by name.
    """

    inputs: Mapping[str, Any]
    run: Run | None
    index: int
    branch: Hashable
    return_dict: bool = True
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Steps of the run before this one; 0 outside of a run."""
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
        """The scale of LoRA layers, which pipelines pass in their attention arguments."""
        for name, value in self.inputs.items():
            if name.endswith("attention_kwargs") and value is not None:
                return float(value.get("scale", 1.0))
        return 1.0

    def but(self, inputs: Mapping[str, Any], constants: Mapping[str, Tensor]) -> StepCall:
        """The same call with other inputs and constants."""
        return replace(self, inputs=inputs, constants=constants)


Inner = Callable[[StepCall], Output]
"""The rest of the chain behind a layer; its end is the transformer's own forward."""


class Layer(Protocol):
    """Something that stands before the transformer's forward: a step cache, CUDA graphs …

    A layer holds what it keeps of a run in `run.kept[name]`, which is dropped with the run.
    """

    name: str

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        """Handle a call, by `inner` or without it."""

    def live(self) -> str:
        """Counts and bytes for the summary; empty where there is nothing to say."""
