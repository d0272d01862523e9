"""The prompts, models and references of the comparison."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from studies.caching.cost import Unit, metered
from torch import Tensor

from hasten.calibration.objective import decode_images
from hasten.prompts import read_prompts

__all__ = ["MODELS", "SIZE", "Frame", "Images", "Model", "Prompt", "prompts"]

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = ROOT / "out" / "caching"
STEPS = 50
DRIFT = 1e-3  # of [0, 1]; batching and thread count move a float32 image by about 1e-5
SIZE = {"width": 128, "height": 128, "max_sequence_length": 32}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"guidance_scale": 3.0},
    "teacher": {"true_cfg_scale": 3.5, "negative_prompt": ""},
}
"""Call arguments: `tiny` is guidance-distilled, `teacher` is the same model before that."""


@dataclass(frozen=True)
class Prompt:
    """A bundled prompt; its number in the set is its seed."""

    id: int
    text: str


def prompts(first: int, last: int) -> tuple[list[Prompt], list[Prompt]]:
    """The first ones of the bundled set to search settings on, the last ones to measure on."""
    numbered = _numbered()
    if first + last > len(numbered):
        raise ValueError(f"{first} + {last} prompts overlap: the set has {len(numbered)}")
    return numbered[:first], numbered[len(numbered) - last :]


def _numbered() -> list[Prompt]:
    return [Prompt(index, text) for index, text in enumerate(read_prompts("tiny"))]


def _prompt(number: int) -> Prompt:
    return _numbered()[number]


@dataclass(frozen=True)
class Frame:
    """What a full run is: its number of steps, the pictures' side in pixels, and the shift of the
    noise levels (None: the model's own)."""

    steps: int = STEPS
    side: int = SIZE["width"]
    shift: float | None = None

    @property
    def size(self) -> dict[str, int]:
        """Call arguments."""
        return {**SIZE, "width": self.side, "height": self.side}


@dataclass(frozen=True)
class Images:
    """images: N×3×H×W in [0, 1]; evaluations and computed steps: N values."""

    images: Tensor
    evaluations: list[float]
    computed: list[float]


class Model:
    """A loaded model on a device, which creates a new pipeline for every setting."""

    def __init__(
        self,
        name: str,
        device: str = "cpu",
        charged_blocks: int | None = None,
        frame: Frame | None = None,
    ) -> None:
        import hasten

        self.name = name
        self.frame = frame or Frame()
        self.device = torch.device(device)
        self.plain = hasten.load_pipeline("tiny", device="cpu", dtype="float32")
        if name == "teacher":
            from diffusers import FluxTransformer2DModel

            folder = ROOT / "training" / "teacher" / "transformer"
            self.plain.transformer = (
                FluxTransformer2DModel.from_pretrained(folder, use_safetensors=True).float().eval()
            )
        if self.frame.shift is not None:
            scheduler = self.plain.scheduler
            self.plain.scheduler = type(scheduler).from_config(
                scheduler.config, shift=self.frame.shift
            )
        self.plain.set_progress_bar_config(disable=True)
        self.digest = self._digest()  # before the move: sums differ from device to device
        self.plain.to(self.device)
        self.unit = self._unit(charged_blocks)

    def pipeline(self) -> Any:
        """A fresh pipeline that shares the weights, with modules and a scheduler of its own. Some
        caches patch the pipeline's class, so it has its own class."""
        kind = type(self.plain)
        parts = dict(self.plain.components)
        transformer = self.plain.transformer
        weights = (*transformer.parameters(), *transformer.buffers())
        parts["transformer"] = copy.deepcopy(transformer, {id(one): one for one in weights})
        parts["scheduler"] = type(self.plain.scheduler).from_config(self.plain.scheduler.config)
        pipe = type(kind.__name__, (kind,), {"__module__": kind.__module__})(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, call: Any, some: Sequence[Prompt], steps: int | None = None) -> Tensor:
        """Images of these prompts in one call, each from its own noise, which is the same on every
        device: N×3×H×W in [0, 1], on the model's device, not rounded."""
        return self._called(call, some, steps, "pt").clamp(0, 1)

    def latents(self, call: Any, some: Sequence[Prompt], steps: int | None = None) -> Tensor:
        """`draw`, undecoded: N×tokens×channels."""
        return self._called(call, some, steps, "latent")

    def decoded(self, latents: Tensor) -> Tensor:
        """Images of final latents, as the pipeline decodes them."""
        return decode_images(self.plain, latents.flatten(1), self.frame.side, self.frame.side)

    def _called(
        self, call: Any, some: Sequence[Prompt], steps: int | None, output_type: str
    ) -> Tensor:
        arguments = dict(MODELS[self.name])
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(some)
        result = call(
            [prompt.text for prompt in some],
            num_inference_steps=self.frame.steps if steps is None else steps,
            generator=[torch.Generator("cpu").manual_seed(prompt.id) for prompt in some],
            output_type=output_type,
            **self.frame.size,
            **arguments,
        )
        images: Tensor = result.images
        return images.float()

    def render(
        self, call: Any, chosen: Sequence[Prompt], *, steps: int | None = None, batch: int
    ) -> Images:
        """`draw`, `batch` prompts at a time, with what each cost."""
        pictures: list[Tensor] = []
        evaluations: list[float] = []
        computed: list[float] = []
        with metered(call.transformer) as meter:
            for some in _batches(chosen, batch):
                pictures.append(self.draw(call, some, steps))
                calls = meter.take()
                evaluations += [self.unit.evaluations(calls)] * len(some)
                computed += [self.unit.computed(calls)] * len(some)
        return Images(torch.cat(pictures), evaluations, computed)

    def references(self, chosen: Sequence[Prompt], batch: int = 4) -> Tensor:
        """The plain pipeline's full runs, on the model's device; what is missing on disk is
        rendered and kept."""
        known = self._known
        missing = [prompt for prompt in chosen if str(prompt.id) not in known]
        if missing:
            fresh = self.render(self.plain, missing, batch=batch).images
            known |= {str(p.id): image.clone() for p, image in zip(missing, fresh, strict=True)}
            self._keep(known)
        return torch.stack([known[str(prompt.id)] for prompt in chosen])

    def check_references(self) -> None:
        """Render one of those on disk again, and delete all of them if it has changed."""
        if not self._known:
            return
        number, kept = next(iter(self._known.items()))
        again = self.render(self.plain, [_prompt(int(number))], batch=1).images[0]
        drift = (again - kept).abs().max().item()
        if drift > DRIFT:
            print(f"{self._reference_file} is stale, off by {drift:.2g}: all are rendered again")
            self._known.clear()

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        if not self._reference_file.is_file():
            return {}
        known: dict[str, Tensor] = load_file(self._reference_file, device=str(self.device))
        return known

    def _keep(self, known: dict[str, Tensor]) -> None:
        path = self._reference_file
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(known, temporary)
        temporary.replace(path)

    @property
    def _reference_file(self) -> Path:
        return REFERENCES / f"{self.name}-{self.device.type}-{self.digest}.safetensors"

    def _unit(self, charged_blocks: int | None) -> Unit:
        with metered(self.plain.transformer) as meter:
            self.draw(self.plain, [Prompt(0, "a fox")], steps=1)
        unit = Unit.of(meter.calls)
        if charged_blocks is None:
            return unit
        config = self.plain.transformer.config
        own_blocks = config.num_layers + config.num_single_layers
        return replace(unit, partial=own_blocks / charged_blocks)

    def _digest(self) -> str:
        frame, arguments = self.frame, MODELS[self.name]
        known = f"{frame.steps} {frame.size} {arguments} {torch.__version__}"
        if frame.shift is not None:
            known += f" shift {frame.shift}"
        digest = hashlib.sha256(known.encode())
        for part in (self.plain.transformer, self.plain.vae, self.plain.text_encoder_2):
            for weight in part.state_dict().values():
                digest.update(weight.double().sum().numpy().tobytes())
        return digest.hexdigest()[:12]


def _batches(chosen: Sequence[Prompt], batch: int) -> Iterable[Sequence[Prompt]]:
    return (chosen[start : start + batch] for start in range(0, len(chosen), batch))
