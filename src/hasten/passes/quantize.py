"""The `[quantize]` pass: replaces linears of the repeated blocks by eight-bit ones.

Each original is freed when it is replaced. The largest layer is first: if memory runs out, it does
so before anything is replaced, because after it every layer frees more than the next one needs.
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
    """Replace linears in their parent modules; needs memory for one additional layer.

    If an error is raised after some linears were replaced, a note on it gives their number.

    Args:
        transformer: The transformer; it is changed in place.
        plan: The linears to replace, as decided by `check`.
        recipe: The recipe's section.
        notes: Notes on the scales that belong with every result.

    Raises:
        ModelError: A weight is not finite. Nothing has been replaced.
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
            error.add_note(f"quantize: {done} linears were already replaced; load the model again")
        raise
    refuse_as_weights(transformer)
    return Applied(
        name="quantize",
        description=_describe(recipe, done, before, after),
        undo=None,
        unchanged=plan.unchanged,
        notes=notes,
        cannot_undo="the original weights were freed as they were replaced",
    )


def _refuse_not_finite(linears: Linears) -> None:
    """Raise ModelError for weights that are not finite; waits for the device once in total."""
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
        how += " of the weights, one calibrated scale per linear for its input"
    if recipe.emulate:
        return f"{how}, emulated: same rounding, multiplied in the pipeline's dtype"
    return f"{how}: {before / 2**20:.1f} → {after / 2**20:.1f} MiB"
