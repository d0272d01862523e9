"""The sealed `manifest.json` of an export, and the files that it lists. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from hasten.atomic import write_text
from hasten.engines.tensorrt.files import (
    AMAX,
    DATA,
    ENGINE,
    GRAPH,
    LARGEST_RECORD,
    FileFacts,
    Record,
    Sha256,
    damaged_files,
    read_regular,
)
from hasten.engines.tensorrt.targets import Precision
from hasten.errors import InputError
from hasten.sealed import DamagedError, first_fault, parse_json, seal, unseal

MANIFEST = "manifest.json"
MOST_TOKENS = 1 << 20  # the graph's bound on image tokens, far beyond any profile
SCHEMA: Literal[2] = 2  # 1 had no checksum


class Stage(Record):
    """A stage of the export.

    Attributes:
        name: The stage's name.
        seconds: The time that it took when it ran.
        peak_bytes: Its peak memory; None if unknown.
        cached: Whether this export reused an earlier result.
    """

    name: str
    seconds: NonNegativeFloat
    peak_bytes: NonNegativeInt | None
    cached: bool


class Shapes(Record):
    """The sizes that an engine is built for.

    Attributes:
        text: Text tokens of every call.
        least: The minimum number of image tokens.
        best: The number of image tokens that the engine is tuned for.
        most: The maximum number of image tokens.

    Raises:
        InputError: The sizes are not 1 <= least <= best <= most, or there is no text token.
    """

    text: int
    least: int
    best: int
    most: int

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.text < 1 or not 1 <= self.least <= self.best <= self.most <= MOST_TOKENS:
            raise InputError(
                f"invalid profile: {self.text} text tokens and {self.least} to {self.most} image "
                f"tokens, best {self.best}",
                f"use at least one text token, and 1 <= least <= best <= most <= {MOST_TOKENS}",
            )
        return self

    def dynamic(self) -> dict[str, dict[int, Any] | None]:
        """The dynamic sizes for torch.export; they and the graph do not depend on the profile.

        The minimum is 2, because torch.export treats 1 as a constant; the graph supports 1 too.
        """
        from torch.export import Dim

        image = Dim("image_tokens", min=2, max=MOST_TOKENS)
        tokens = {0: self.text + image}
        return {"latents": {1: image}, "text": None, "row": None, "cos": tokens, "sin": tokens}


class CalibrationFacts(Record):
    """How the FP8 scales were calibrated."""

    method: str
    prompts: PositiveInt
    steps: PositiveInt
    sha256: Sha256


class SizeErrors(Record):
    """Relative errors at one size.

    Attributes:
        height: Height in image tokens.
        width: Width in image tokens.
        whole: Error of the velocity, computed independently by the graph and by torch.
        blocks: The largest error of each block's outputs, by the block's name; torch's block gets
            the outputs of the graph's preceding block.
        control: FP8 only: torch against itself with its latents changed by 2^-20.
        unquantised: FP8 only: the graph against the model in float32.
    """

    height: int
    width: int
    whole: float
    blocks: dict[str, float]
    control: float | None = None
    unquantised: float | None = None

    @property
    def worst(self) -> str:
        """The block with the largest error."""
        return max(self.blocks, key=self.blocks.__getitem__)


class Verification(Record):
    """The result of a comparison.

    Attributes:
        what: A description of the two sides.
        whole_bar: The limit for the velocity's error; None without one.
        block_bar: The limit for each block's error.
        sizes: The errors at each size.
        seconds: The time of the comparison.
    """

    what: str
    whole_bar: float | None
    block_bar: float
    sizes: tuple[SizeErrors, ...]
    seconds: float

    @property
    def worst_whole(self) -> float:
        """The largest error of the whole graph at any size."""
        return max(size.whole for size in self.sizes)

    @property
    def worst_block(self) -> float:
        """The largest error of a block at any size."""
        return max(size.blocks[size.worst] for size in self.sizes)


class Manifest(Record):
    """The description of an export: its source, its settings, its files and its verification.

    Attributes:
        hasten: The version of hasten.
        model: The model's name.
        family: The model's family.
        weights: sha256 over all tensors of the transformer, in the dtype of the precision.
        precision: "bf16", "fp16" or "fp8".
        targets: The engine's GPUs; empty if only the graph was exported.
        shapes: The sizes that the engine is built for.
        channels: Channels of the latents.
        text_dim: Width of the embedded text.
        row_width: Width of a modulation row.
        head_dim: Width of an attention head.
        calibration: The FP8 calibration; None for other precisions.
        files: Size and sha256 of each file.
        stages: The stages of the export.
        verification: The comparison with torch; None if it was skipped.
        versions: Versions of the libraries.
        folder: The folder that the manifest was read from; not part of the file.
    """

    schema_version: Literal[2] = Field(default=SCHEMA, alias="schema")
    hasten: str
    model: str
    family: str
    weights: Sha256
    precision: Precision
    targets: tuple[str, ...]
    shapes: Shapes
    channels: PositiveInt
    text_dim: PositiveInt
    row_width: PositiveInt
    head_dim: PositiveInt
    calibration: CalibrationFacts | None
    files: dict[str, FileFacts]
    stages: tuple[Stage, ...]
    verification: Verification | None
    versions: dict[str, str | None]
    folder: Path | None = Field(default=None, exclude=True)

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        write_text(path, self.text())

    def text(self) -> str:
        """The text of the file, sealed."""
        return seal(self.model_dump(mode="json", by_alias=True), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest in a folder. The listed files are not checked; see `damaged`.

        Raises:
            InputError: There is no manifest, or it is damaged.
        """
        path = folder / MANIFEST
        export = f"`hasten export tensorrt --out {folder}`"
        try:
            text = read_regular(path, LARGEST_RECORD)
            _check_schema(text)
            manifest = cls.model_validate({**unseal(text), "folder": folder})
            _check_files(manifest)
        except FileNotFoundError:
            raise InputError(
                f"{folder}: no {MANIFEST}, so there is no export",
                f"check the path, or export to it: {export}",
            ) from None
        except NotADirectoryError:
            raise InputError(
                f"{folder}: a file, not the folder of an export", "check the path"
            ) from None
        except OSError as error:
            raise _unusable(path, f"cannot be read: {error.strerror or error}", export) from None
        except ValueError as error:
            raise _unusable(path, first_fault(error), export) from None
        return manifest

    def damaged(self, folder: Path, *, read: bool = True) -> dict[str, str]:
        """The problems of its files in a folder: see `damaged_files`."""
        return damaged_files(folder, self.files, read=read)


def _check_schema(text: bytes) -> None:
    content = parse_json(text)
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise DamagedError(f"its schema is {version!r:.80}, and this version reads {SCHEMA}")


def _check_files(manifest: Manifest) -> None:
    """Check that the listed files are exactly those of such an export."""
    expected = {GRAPH, DATA}
    expected |= {ENGINE} if manifest.targets else set()
    expected |= {AMAX} if manifest.precision == "fp8" else set()
    if odd := sorted(expected ^ set(manifest.files)):
        kind = "a missing" if odd[0] in expected else "an unknown"
        raise DamagedError(f"{kind} entry in its list of files: {odd[0]!r:.80}")


def _unusable(path: Path, reason: str, export: str) -> InputError:
    return InputError(f"{path}: {reason}", f"delete the folder, then export again: {export}")
