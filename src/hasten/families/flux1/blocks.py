"""FLUX.1 as prologue → blocks → epilogue over the original modules.

The three parts call the very modules of `FluxTransformer2DModel` in the order of its `forward`;
`tests/models/test_flux.py` holds them bit-equal to it. A forward pass is

    state = family.prologue(transformer, hidden_states=..., ...)
    for _, state in family.blocks(transformer, state): ...
    output = family.epilogue(transformer, state)

and `through` answers a call of `forward` with something else in place of the blocks.

Shapes: B batch, S image tokens, T text tokens, D = heads x head_dim, C packed latent channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import CallError
from hasten.families.flux1.fused import FusedFlux, reasons_against
from hasten.families.modulations import Modulations

__all__ = ["FluxFamily", "FluxState"]


@dataclass(frozen=True)
class FluxState:
    """What flows between the blocks.

    image: B×S×D tokens; text: B×T×D tokens; conditioning: B×D (timestep, guidance and pooled text);
    rotary: cos and sin, (T+S)×head_dim each; kwargs: joint attention arguments, as given.
    """

    image: Tensor
    text: Tensor
    conditioning: Tensor
    rotary: tuple[Tensor, Tensor]
    kwargs: dict[str, Any] | None = None
    double_residuals: Sequence[Tensor] | None = None
    single_residuals: Sequence[Tensor] | None = None
    residuals_repeat: bool = False


class FluxFamily:
    """FLUX.1 dev, schnell, Krea, Kontext and Fill: all run one `FluxTransformer2DModel`."""

    name = "flux"

    def prologue(
        self,
        transformer: Any,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        controlnet_blocks_repeat: bool = False,
    ) -> FluxState:
        """Embed the latents (B×S×C), the text (B×T×joint_dim) and what conditions the blocks.

        `timestep` is in [0, 1], as the pipeline passes it; the embedding sees it times 1000, after
        rounding to the latents' dtype, and so it does `guidance`.
        """
        image = transformer.x_embedder(hidden_states)
        return FluxState(
            image=image,
            text=transformer.context_embedder(encoder_hidden_states),
            conditioning=self.conditioning(
                transformer, timestep, guidance, pooled_projections, image.dtype
            ),
            rotary=self.rotary(transformer, txt_ids, img_ids),
            kwargs=self._with_image_prompt(transformer, joint_attention_kwargs),
            double_residuals=controlnet_block_samples,
            single_residuals=controlnet_single_block_samples,
            residuals_repeat=controlnet_blocks_repeat,
        )

    def state(
        self,
        transformer: Any,
        latents: Tensor,
        text: Tensor,
        conditioning: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> FluxState:
        """The state before the first block where all but the latents (B×S×C) is embedded."""
        return FluxState(
            image=transformer.x_embedder(latents),
            text=text,
            conditioning=conditioning,
            rotary=rotary,
        )

    def conditioning(
        self,
        transformer: Any,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled_projections: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """R×D from R timesteps in [0, 1], guidance scales and pooled texts (R×pooled_dim)."""
        moments = [timestep.to(dtype) * 1000]
        if guidance is not None:
            moments.append(guidance.to(dtype) * 1000)
        embedded: Tensor = transformer.time_text_embed(*moments, pooled_projections)
        return embedded

    def rotary(self, transformer: Any, txt_ids: Tensor, img_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, (T+S)×head_dim each in float32, from T×3 and S×3 positions."""
        cos, sin = transformer.pos_embed(torch.cat((_two_d(txt_ids), _two_d(img_ids))))
        return cos, sin

    def modulated_norms(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        """(name, norm) of every norm with a modulation linear, in the order in which they run."""
        found: list[tuple[str, nn.Module]] = []
        for index, block in enumerate(transformer.transformer_blocks):
            found.append((f"transformer_blocks.{index}.norm1", block.norm1))
            found.append((f"transformer_blocks.{index}.norm1_context", block.norm1_context))
        for index, block in enumerate(transformer.single_transformer_blocks):
            found.append((f"single_transformer_blocks.{index}.norm", block.norm))
        return [*found, ("norm_out", transformer.norm_out)]

    def fused(
        self, transformer: Any, modulations: Modulations, attend: Callable[..., Tensor]
    ) -> FusedFlux:
        """The blocks on fused kernels: (latents, text, row, cos, sin) -> velocity."""
        return FusedFlux(transformer, modulations, attend)

    def reasons_against_kernels(
        self, transformer: Any, to_be: Mapping[nn.Module, type] = MappingProxyType({})
    ) -> list[str]:
        """Why the blocks cannot run on the fused kernels, once these linears are FP8; empty where
        they can."""
        return reasons_against(transformer, to_be)

    def blocks(self, transformer: Any, state: FluxState) -> Iterator[tuple[str, FluxState]]:
        """Run the double-stream, then the single-stream blocks; yield the state after each."""
        stacks = (
            ("transformer_blocks", state.double_residuals, state.residuals_repeat),
            ("single_transformer_blocks", state.single_residuals, False),
        )
        for name, residuals, repeat in stacks:
            stack = getattr(transformer, name)
            for index, block in enumerate(stack):
                text, image = block(
                    hidden_states=state.image,
                    encoder_hidden_states=state.text,
                    temb=state.conditioning,
                    image_rotary_emb=state.rotary,
                    joint_attention_kwargs=state.kwargs,
                )
                if residuals is not None:
                    image = image + _control(residuals, index, len(stack), repeat)
                state = replace(state, image=image, text=text)
                yield f"{name}.{index}", state

    def epilogue(self, transformer: Any, state: FluxState) -> Tensor:
        """Modulated output norm and projection: the velocity, B×S×C."""
        output: Tensor = transformer.proj_out(transformer.norm_out(state.image, state.conditioning))
        return output

    def through(
        self,
        transformer: Any,
        middle: Callable[[FluxState], FluxState],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The velocity (B×S×C) with `middle` in place of the blocks: after the prologue, before the
        epilogue. `args` and `kwargs` are those of the transformer's forward; LoRA layers have the
        call's scale while it lasts. Raises CallError for an argument this family does not know.
        """

        def forward(transformer: Any, **inputs: Any) -> Tensor:
            return self.epilogue(transformer, middle(self.prologue(transformer, **inputs)))

        return self.scaled(transformer, forward, self.inputs(transformer, args, kwargs))

    def scaled(
        self, transformer: Any, function: Callable[..., Tensor], inputs: dict[str, Any]
    ) -> Tensor:
        """`function(transformer, **inputs)` while LoRA layers have the scale that `inputs` name."""
        from diffusers.utils import apply_lora_scale

        scaled = apply_lora_scale("joint_attention_kwargs")(function)  # as the original forward is
        output: Tensor = scaled(transformer, **inputs)
        return output

    def inputs(
        self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the transformer's forward as those of `prologue`, by name.

        Raises CallError for an argument this family does not know.
        """
        given = dict(kwargs)
        if args:
            _, *names = inspect.signature(type(transformer).forward).parameters
            given.update(zip(names, args, strict=False))
        given.pop("return_dict", None)
        unknown = sorted(given.keys() - PROLOGUE_INPUTS)
        if unknown:
            raise CallError(
                f"the FLUX.1 transformer cannot be run block by block with {', '.join(unknown)}",
                'leave it out; or take a cache of kind = "interval", no [fuse] and no CUDA graphs',
            )
        return given

    def repeated_blocks(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        """(name, block), in the order in which they run."""
        return [
            (f"{name}.{index}", block)
            for name in ("transformer_blocks", "single_transformer_blocks")
            for index, block in enumerate(getattr(transformer, name))
        ]

    def quantizable(self, transformer: Any) -> list[tuple[str, nn.Linear]]:
        """(name, linear) of every linear in the blocks but the modulations (norm*.linear).

        A modulation sees one row a step, so it gains nothing, and it scales all tokens at once.
        """
        return [
            (f"{block_name}.{name}", module)
            for block_name, block in self.repeated_blocks(transformer)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith("norm")
        ]

    def _with_image_prompt(
        self, transformer: Any, kwargs: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """IP-Adapter embeddings are projected once, before the blocks."""
        if kwargs is None or "ip_adapter_image_embeds" not in kwargs:
            return kwargs
        rest = {key: kwargs[key] for key in kwargs if key != "ip_adapter_image_embeds"}
        embeds = transformer.encoder_hid_proj(kwargs["ip_adapter_image_embeds"])
        return {**rest, "ip_hidden_states": embeds}


def _two_d(ids: Tensor) -> Tensor:
    return ids[0] if ids.ndim == 3 else ids


def _control(residuals: Sequence[Tensor], index: int, blocks: int, repeat: bool) -> Tensor:
    """The ControlNet residual of a block: spread evenly over the blocks, or repeated in turn."""
    if repeat:
        return residuals[index % len(residuals)]
    blocks_each = -(-blocks // len(residuals))
    return residuals[index // blocks_each]


PROLOGUE_INPUTS = inspect.signature(FluxFamily.prologue).parameters.keys()
