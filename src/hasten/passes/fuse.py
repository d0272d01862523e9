"""The `[fuse]` pass: the constants of a run are computed once, and the blocks run fused kernels.

It adds two layers. "constants" computes the conditioning table and, for the kernels, embeds text
and positions once per run. "body", inside CUDA graphs, runs the kernels, or else the transformer's
own forward with modulation linears that read the table.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hasten.families.family import Attend, Family
from hasten.quantization.linear import dtype_of
from hasten.quantization.schemes import SCHEMES
from hasten.recipe import Fuse
from hasten.step.applied import Applied
from hasten.step.chain import StepChain
from hasten.step.constants import BodyLayer, ConstantsLayer, no_change
from hasten.step.modulations import Modulations, RowReaders

NAMES = {dtype_of(scheme): scheme.label for scheme in SCHEMES.values()}


def fuse_step(
    chain: StepChain, family: Family, recipe: Fuse, attend: Attend, against: str | None
) -> Applied:
    """Add the conditioning table and, where possible, the fused kernels to a transformer.

    Args:
        chain: The transformer's chain.
        family: A family with `conditioning`, and with `kernels` if `against` is None.
        recipe: The recipe's section.
        attend: The attention function of the kernels.
        against: Why the blocks stay unchanged; None if they run on the kernels.
    """
    transformer = chain.transformer
    modulations = Modulations(family.modulated_norms(transformer))
    fused: Any = None
    kind = "original blocks"
    if against is None:
        assert family.kernels is not None
        fused = family.kernels.fused(transformer, modulations, attend)
        kinds = [NAMES[codes] for codes in NAMES if codes in fused.codes] or ["unquantised"]
        kind = f"fused kernels, {' and '.join(kinds)} products"
    readers = RowReaders(modulations)
    assert family.conditioning is not None  # `check` rejects families without it
    layer = ConstantsLayer(
        transformer,
        family.conditioning,
        modulations,
        None if fused is None else family.split,
        whole_run=recipe.conditioning,
        changed=no_change if fused is None else fused.changed,
    )
    chain.push(layer)
    chain.push(BodyLayer(fused, readers))
    rows = "all steps in one table" if recipe.conditioning else "one step at a time"
    return Applied(
        name="fuse",
        description=f"modulations of {rows}; {kind}",
        undo=partial(_undo, chain, readers),
        unchanged=() if against is None else (("the blocks", against),),
        fell_back=recipe.kernels == "auto" and against is not None,
        live=layer.live,
    )


def _undo(chain: StepChain, readers: RowReaders) -> None:
    """Merged weights stay merged, because the layers' own weights are views of them."""
    chain.remove("constants")
    chain.remove("body")
    readers.detach()
