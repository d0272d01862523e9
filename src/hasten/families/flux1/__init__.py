"""The FLUX.1 family: dev, schnell, Krea, Kontext, Fill and Control use `FluxTransformer2DModel`."""

from hasten.families.family import Family, Stack
from hasten.families.flux1.fused import FluxKernels
from hasten.families.flux1.parts import FluxBlocks, decode, embedded, encode, modulated_norms, rows
from hasten.step.constants import Conditioning, Split

STREAMS = ("encoder_hidden_states", "hidden_states")

FLUX1 = Family(
    name="FLUX.1",
    stacks=(Stack("transformer_blocks", STREAMS), Stack("single_transformer_blocks", STREAMS)),
    modulations=("norm*.linear",),
    conditioning=Conditioning(
        norms=modulated_norms, rows=rows, inputs=("pooled_projections", "guidance")
    ),
    split=Split(
        inputs=("encoder_hidden_states", "txt_ids", "img_ids"),
        embedded=embedded,
        original_only=("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
    kernels=FluxKernels(),
    export=FluxBlocks(),
    decode=decode,
    encode=encode,
)
