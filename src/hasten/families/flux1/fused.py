"""FLUX.1's blocks on fused kernels: the same weights with a third of the memory passes.

One residual stream holds the text rows and then the image rows of the batch (`Streams`). So double
and single blocks normalise, rotate and activate both in one launch, and nothing is concatenated or
split. The output of a projection is added to the stream by the *next* norm. If the linears are FP8
or int8, every kernel before a projection writes codes and scales.

Shapes: B batch, T text tokens, S image tokens, R = B·(T+S) rows, D = heads × head_dim, M = 4·D.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import CallError
from hasten.families.family import Attend
from hasten.kernels.gelu_concat import gelu_concat
from hasten.kernels.norm_modulate import norm_modulate
from hasten.kernels.qk_norm_rope import qk_norm_rope
from hasten.kernels.streams import Streams
from hasten.kernels.triton_or_none import available
from hasten.quantization.projection import Projection, project, same_kind
from hasten.step.modulations import Modulations
from hasten.step.protocols import Component, Transformer

EPS = 1e-6  # of every norm in a FLUX block; `reasons_against` checks it


class FluxKernels:
    """The `Kernels` of FLUX.1."""

    def reasons_against(
        self, transformer: Transformer, planned: Mapping[nn.Module, type] = MappingProxyType({})
    ) -> list[str]:
        """See `reasons_against`."""
        return reasons_against(transformer, planned)

    def fused(
        self, transformer: Transformer, modulations: Modulations, attend: Attend
    ) -> FusedFlux:
        """See `FusedFlux`."""
        return FusedFlux(transformer, modulations, attend)


class FusedFlux:
    """A step from the latents to the velocity, as a function of tensors only.

    Weights are merged when `blocks` is first read. A deep copy merges the weights of its own
    transformer, since torch copies views of one tensor as separate tensors.

    Args:
        transformer: The transformer.
        modulations: Its modulations.
        attend: The attention function.
    """

    def __init__(self, transformer: Transformer, modulations: Modulations, attend: Attend) -> None:
        self.transformer = transformer
        self.modulations = modulations
        self.attend = attend

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedFlux:
        return FusedFlux(
            copy.deepcopy(self.transformer, memo),
            copy.deepcopy(self.modulations, memo),
            copy.deepcopy(self.attend, memo),
        )

    @cached_property
    def blocks(self) -> list[DoubleBlock | SingleBlock]:
        """The blocks in execution order."""
        start = self.modulations.start
        blocks: list[DoubleBlock | SingleBlock] = [
            DoubleBlock(block, start[f"{name}.norm1_context"], start[f"{name}.norm1"], self.attend)
            for name, block in _named(self.transformer, "transformer_blocks")
        ]
        blocks += [
            SingleBlock(block, start[f"{name}.norm"], self.attend)
            for name, block in _named(self.transformer, "single_transformer_blocks")
        ]
        self.layers = _layers(self.transformer)
        return blocks

    @property
    def codes(self) -> set[torch.dtype]:
        """Dtypes of the products' codes; empty if all products are plain."""
        return {part.codes for block in self.blocks for part in block.projections if part.codes}

    def __call__(
        self, latents: Tensor, text: Tensor, row: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Compute the velocity.

        Args:
            latents: B×S×C.
            text: Embedded text, B×T×D.
            row: Modulations, B×width.
            cos: Rotary cosines, (T+S)×head_dim.
            sin: Rotary sines, (T+S)×head_dim.

        Returns:
            B×S×C.

        Raises:
            CallError: The batch sizes or the numbers of tokens disagree.
        """
        if fault := _misfit(latents, text, row, cos):  # kernels would read past the end
            raise CallError(fault, "pass latents, prompt embeddings and positions of one batch")
        image = self.transformer.x_embedder(latents)
        streams = Streams(len(image), text.shape[1], image.shape[1])
        stream = ResidualStream(torch.cat([text.flatten(0, 1), image.flatten(0, 1)]), row, streams)
        for block in self.blocks:
            block(stream, cos, sin)
        width = image.shape[-1]
        last = self.modulations.start["norm_out"]
        final = last + width, last  # this norm's linear returns the scale first
        y, _ = stream.norm((*final, 0) * 2, codes=None)
        velocity: Tensor = self.transformer.proj_out(y[streams.text_rows :])
        return velocity.view(len(image), -1, velocity.shape[1])

    def changed(self) -> str | None:
        """The part that has been replaced since the weights were merged; None if none has."""
        blocks = self.blocks
        if _layers(self.transformer) != self.layers:
            return "a layer of the transformer"
        for block in blocks:
            for projection in block.projections:
                if fault := projection.changed():
                    return fault
        return None


class ResidualStream:
    """The residual stream, with the gated output that the next norm will add."""

    def __init__(self, x: Tensor, row: Tensor, streams: Streams) -> None:
        self.x = x
        self.row = row
        self.streams = streams
        self.delta: Tensor | None = None
        self.gates = (0, 0)

    def norm(self, offsets: Sequence[int], *, codes: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Add the pending output, then normalise and modulate.

        Args:
            offsets: Columns of shift and scale of the text rows and one that is not read, then the
                same for the image rows.
            codes: The codes' dtype; None for plain values.

        Returns:
            R×D values and an empty tensor, or codes and scales.
        """
        text, image = self.gates
        columns = [offsets[0], offsets[1], text, offsets[3], offsets[4], image]
        y, scales = norm_modulate(self.x, self.delta, self.row, columns, self.streams, codes, EPS)
        self.delta = None
        return y, scales

    def add(self, delta: Tensor, text_gate: int, image_gate: int) -> None:
        """Let the next norm add gate · delta to the stream."""
        self.delta, self.gates = delta, (text_gate, image_gate)


class DoubleBlock:
    """A double block: separate weights for text and image rows, joint attention."""

    def __init__(self, block: Component, text: int, image: int, attend: Attend) -> None:
        attn, width = block.attn, block.attn.query_dim
        self.width, self.attend = width, attend
        self.weights = _head_norms(attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k)
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        self.qkv = Projection(added), Projection((attn.to_q, attn.to_k, attn.to_v))
        self.out = Projection((attn.to_add_out,)), Projection((attn.to_out[0],))
        up_text, up_image = block.ff_context.net[0].proj, block.ff.net[0].proj
        self.up = Projection((up_text,)), Projection((up_image,))
        self.down = Projection((block.ff_context.net[2],)), Projection((block.ff.net[2],))
        # shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, each `width` wide
        self.text, self.image = (
            [start + part * width for part in range(6)] for start in (text, image)
        )

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (*self.qkv, *self.out, *self.up, *self.down)

    def __call__(self, stream: ResidualStream, cos: Tensor, sin: Tensor) -> None:
        streams, text, image = stream.streams, self.text, self.image
        y = stream.norm((*text[:3], *image[:3]), codes=self.qkv[0].codes)
        qkv = project(self.qkv, y, streams)
        attention = _attention(qkv, self.weights, cos, sin, streams, self.attend)
        y = gelu_concat(attention, None, streams, self.out[0].codes)
        stream.add(project(self.out, y, streams), text[2], image[2])
        y = stream.norm((*text[3:], *image[3:]), codes=self.up[0].codes)
        hidden = project(self.up, y, streams)
        y = gelu_concat(None, hidden, streams, self.down[0].codes)
        stream.add(project(self.down, y, streams), text[5], image[5])


class SingleBlock:
    """A single block: attention and MLP in parallel, with the same weights for all rows."""

    def __init__(self, block: Component, start: int, attend: Attend) -> None:
        attn, width = block.attn, block.attn.query_dim
        self.width, self.attend = width, attend
        self.weights = _head_norms(attn.norm_q, attn.norm_k, attn.norm_q, attn.norm_k)
        self.into = Projection((attn.to_q, attn.to_k, attn.to_v, block.proj_mlp))
        self.out = Projection((block.proj_out,))
        self.columns = [start + part * width for part in range(3)]  # shift, scale, gate

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.into, self.out

    def __call__(self, stream: ResidualStream, cos: Tensor, sin: Tensor) -> None:
        streams = stream.streams
        y = stream.norm(self.columns * 2, codes=self.into.codes)
        wide = self.into(*y)
        qkv, hidden = wide[:, : 3 * self.width], wide[:, 3 * self.width :]
        attention = _attention(qkv, self.weights, cos, sin, streams, self.attend)
        y = gelu_concat(attention, hidden, streams, self.out.codes)
        stream.add(self.out(*y), self.columns[2], self.columns[2])


def reasons_against(
    transformer: Transformer, planned: Mapping[nn.Module, type] = MappingProxyType({})
) -> list[str]:
    """Why these blocks cannot run on the fused kernels; empty if they can.

    Args:
        transformer: The transformer.
        planned: The classes that will replace linears, by linear.
    """
    reasons: list[str] = []
    dtype = transformer.dtype
    if transformer.device.type == "cuda" and not available():
        reasons.append("Triton is not installed: pip install triton")
    if dtype == torch.float16:
        reasons.append("float16 overflows in them: pass --dtype bfloat16, or float32")
    blocks = [
        *_named(transformer, "transformer_blocks"),
        *_named(transformer, "single_transformer_blocks"),
    ]
    of_blocks: dict[str, list[str]] = {}
    for name, block in blocks:
        for reason in dict.fromkeys(_against(block, dtype, planned)):
            of_blocks.setdefault(reason, []).append(name)
    for reason, names in of_blocks.items():
        more = f" and {len(names) - 1} more blocks" if len(names) > 1 else ""
        everywhere = len(names) == len(blocks)
        reasons.append(reason if everywhere else f"{names[0]}{more}: {reason}")
    return reasons


def _against(block: Component, dtype: torch.dtype, planned: Mapping[nn.Module, type]) -> list[str]:
    reasons = []
    attn = block.attn
    processor = type(attn.processor).__name__
    if processor != "FluxAttnProcessor":
        reasons.append(
            f"its attention runs in a {processor}: set FluxAttnProcessor() with "
            "pipe.transformer.set_attn_processor, or unload the adapter that brought it"
        )
    if _hooked(block):
        reasons.append(
            "it, or a layer in it, has hooks or a replaced forward: remove them before optimising"
        )
    norms = [attn.norm_q, attn.norm_k]
    groups: list[tuple[nn.Module, ...]]
    if hasattr(block, "proj_mlp"):
        groups = [(attn.to_q, attn.to_k, attn.to_v, block.proj_mlp), (block.proj_out,)]
    else:
        norms += [attn.norm_added_q, attn.norm_added_k]
        groups = [
            (attn.to_q, attn.to_k, attn.to_v, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.to_out[0], attn.to_add_out),
            (block.ff.net[0].proj, block.ff_context.net[0].proj),
            (block.ff.net[2], block.ff_context.net[2]),
        ]
    if any(getattr(norm, "weight", None) is None or norm.eps != EPS for norm in norms):
        reasons.append(
            "its query and key norms are not FLUX.1's RMSNorm with weights and eps = 1e-6, the "
            "only ones that there are kernels for"
        )
    for group in groups:
        reasons += same_kind(group, dtype, planned)
    return reasons


def _attention(
    qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, streams: Streams, attend: Attend
) -> Tensor:
    """R × 3·D -> B × (T+S) × D."""
    width = qkv.shape[1] // 3
    q, k = qk_norm_rope(qkv[:, : 2 * width], weights, cos, sin, streams, EPS)
    v = streams.by_sequence(qkv[:, 2 * width :])
    v = v.view(*v.shape[:2], *q.shape[2:])
    return attend(q, k, v).flatten(2)


def _misfit(latents: Tensor, text: Tensor, row: Tensor, cos: Tensor) -> str | None:
    """The inputs whose sizes disagree; None if all agree."""
    batch, tokens = len(latents), text.shape[1] + latents.shape[1]
    if not len(text) == len(row) == batch:
        return f"latents are a batch of {batch}, text of {len(text)}, modulations of {len(row)}"
    if len(cos) != tokens:
        return f"there are {tokens} text and image tokens, but {len(cos)} positions"
    return None


def _hooked(block: Component) -> bool:
    return any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
        for part in block.modules()
    )


def _head_norms(*norms: Component) -> Tensor:
    return torch.stack([norm.weight.detach() for norm in norms])


def _layers(transformer: Transformer) -> list[int]:
    return [id(module) for module in transformer.modules()]


def _named(transformer: Transformer, stack: str) -> list[tuple[str, Any]]:
    return [(f"{stack}.{index}", block) for index, block in enumerate(getattr(transformer, stack))]
