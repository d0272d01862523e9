"""Linears of the repeated blocks in eight bits, each original freed as it is replaced.

The largest layer goes first, so what can run out of memory does so before anything is replaced:
after it, every layer frees more than the next one takes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.errors import ModelError
from hasten.quantization.linear import QuantizedLinear, quantized
from hasten.quantization.plan import LinearPlan, Linears
from hasten.recipe import Quantize
from hasten.step.applied import Applied, refuse_as_weights
from hasten.step.protocols import Transformer


def quantize_linears(
    transformer: Transformer, plan: LinearPlan, recipe: Quantize, notes: tuple[str, ...] = ()
) -> Applied:
    """Replace linears in their parents. Takes the memory of one more layer at first, then less.

    Args:
        transformer: Whose linears are replaced.
        plan: Which linears, as `check` has decided.
        recipe: How.
        notes: What results must say of the scales.

    Raises:
        ModelError: A weight is not finite; nothing has been replaced. An error in the middle
            carries a note of how many were.
    """
    _refuse_not_finite([(name, _linear(transformer, name)) for name in plan.names])
    before = after = done = 0
    try:
        for name in sorted(plan.names, key=lambda name: -_linear(transformer, name).weight.numel()):
            old = _linear(transformer, name)
            new = quantized(old, recipe, name).train(old.training)
            before, after = before + _bytes(old), after + _bytes(new)
            _replace(transformer, name, new)
            done += 1
    except BaseException as error:
        if done:
            error.add_note(f"quantize: {done} linears are replaced already; load the model again")
        raise
    refuse_as_weights(transformer)
    return Applied(
        name="quantize",
        description=_describe(recipe, done, before, after),
        undo=None,
        unchanged=plan.left_alone,
        notes=notes,
        cannot_undo="the original weights were freed as they were replaced",
    )


def _refuse_not_finite(linears: Linears) -> None:
    """Waits for the device once, whatever the number of layers."""
    extremes = torch.stack([torch.stack(linear.weight.detach().aminmax()) for _, linear in linears])
    broken = [
        name
        for (name, _), finite in zip(linears, extremes.isfinite().all(dim=1).tolist(), strict=True)
        if not finite
    ]
    if broken:
        raise ModelError(
            f"weights of {len(broken)} linears are not all finite, the first is {broken[0]}",
            "download or copy the model again, or load it in bfloat16 if it was float16",
        )


def _linear(transformer: Transformer, name: str) -> nn.Linear:
    linear = transformer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _replace(transformer: Transformer, name: str, new: QuantizedLinear) -> None:
    parent, _, own = name.rpartition(".")
    setattr(transformer.get_submodule(parent), own, new)


def _bytes(module: nn.Module) -> int:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes for tensor in tensors)


def _describe(recipe: Quantize, count: int, before: int, after: int) -> str:
    how = f"{count} linears in {recipe.scheme}, one scale per {recipe.granularity}"
    if recipe.activations == "static":
        how += " of the weights, a calibrated one for the activations"
    if recipe.emulate:
        return f"{how}, emulated: rounded alike, multiplied in the pipeline's dtype"
    return f"{how}: {before / 2**20:.1f} → {after / 2**20:.1f} MiB"
