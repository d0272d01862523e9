"""[fuse]: what a run needs once is made once, and the blocks run on fused kernels.

Two layers: "constants" makes the conditioning table and, for the kernels, embeds text and positions
once per run; "body", inside of CUDA graphs, runs the kernels, or the transformer's own forward with
modulation linears that read the table.
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
    """Put the table, and the kernels unless something is against them, before a transformer.

    Args:
        chain: The transformer's.
        family: With `conditioning`, and `kernels` where nothing is against them.
        recipe: The recipe's section.
        attend: The chosen attention, for the kernels.
        against: Why the blocks stay as they are; None where the kernels take over.
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
    assert family.conditioning is not None  # `check` has refused families without it
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
    """Merged weights stay merged: the layers' own are views of them."""
    chain.remove("constants")
    chain.remove("body")
    readers.detach()
