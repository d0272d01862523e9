"""What an export consists of: `manifest.json`, sealed, and the files that it lists. No torch."""

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
MOST_TOKENS = 1 << 20  # of any engine: the graph's own bound, far beyond any profile
SCHEMA: Literal[2] = 2  # 1 had no checksum


class Stage(Record):
    """A stage of the export.

    Attributes:
        name: Of the stage.
        seconds: What it took when it was made.
        peak_bytes: Its peak of memory, where that is known.
        cached: Whether this export found it made already.
    """

    name: str
    seconds: NonNegativeFloat
    peak_bytes: NonNegativeInt | None
    cached: bool


class Shapes(Record):
    """The sizes that an engine is built for.

    Attributes:
        text: Tokens of every call.
        least: The fewest image tokens.
        best: The number of image tokens that it is tuned for.
        most: The most image tokens.

    Raises:
        InputError: Not 1 <= least <= best <= most, or no text token.
    """

    text: int
    least: int
    best: int
    most: int

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.text < 1 or not 1 <= self.least <= self.best <= self.most <= MOST_TOKENS:
            raise InputError(
                f"no profile: {self.text} text tokens and {self.least} to {self.most} image "
                f"tokens, best {self.best}",
                f"at least one text token, and 1 <= least <= best <= most <= {MOST_TOKENS}",
            )
        return self

    def dynamic(self) -> dict[str, dict[int, Any] | None]:
        """The free sizes, for torch.export: the same whatever the profile, and so the graph is.

        From 2 on, because torch.export makes a constant of a 1; the resulting graph takes 1 too.
        """
        from torch.export import Dim

        image = Dim("image_tokens", min=2, max=MOST_TOKENS)
        tokens = {0: self.text + image}
        return {"latents": {1: image}, "text": None, "row": None, "cos": tokens, "sin": tokens}


class CalibrationFacts(Record):
    """How the scales of FP8 were found."""

    method: str
    prompts: PositiveInt
    steps: PositiveInt
    sha256: Sha256


class SizeErrors(Record):
    """Relative errors at one size.

    Attributes:
        height: Image tokens.
        width: Image tokens.
        whole: The graph against torch, each by itself from the inputs to the velocity.
        blocks: The largest error among a block's outputs, by the block's name, where torch's block
            got what the graph's block before it computed.
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
    """What was compared, the errors and their limits; without `whole_bar` the whole has none."""

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
    """What was exported, from what, how, and how well the graph agrees with torch.

    Attributes:
        weights: sha256 over all tensors of the transformer, in the dtype of the precision.
        targets: Empty where only the graph was exported.
        channels: Of the latents; with text_dim, row_width and head_dim a fixed size of the graph.
        verification: What `hasten.engines.tensorrt.verify` found; None where it was left out.
        folder: Where the manifest was read from; not part of the file.
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
        """Write the file, whole or not at all."""
        write_text(path, self.text())

    def text(self) -> str:
        """The text of the file, sealed."""
        return seal(self.model_dump(mode="json", by_alias=True), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in a folder. The files that it lists are not looked at: see `damaged`.

        Raises:
            InputError: There is none, or it is not what an export wrote.
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
                f"{folder}: no {MANIFEST}, so no export is there",
                f"check the path, or export there: {export}",
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
        """Its files that are not in a folder as they were: see `damaged_files`."""
        return damaged_files(folder, self.files, read=read)


def _check_schema(text: bytes) -> None:
    content = parse_json(text)
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise DamagedError(f"its schema is {version!r:.80}, this hasten reads {SCHEMA}")


def _check_files(manifest: Manifest) -> None:
    """The files are exactly those of such an export."""
    expected = {GRAPH, DATA}
    expected |= {ENGINE} if manifest.targets else set()
    expected |= {AMAX} if manifest.precision == "fp8" else set()
    if odd := sorted(expected ^ set(manifest.files)):
        kind = "a missing" if odd[0] in expected else "an unknown"
        raise DamagedError(f"{kind} entry in its list of files: {odd[0]!r:.80}")


def _unusable(path: Path, reason: str, export: str) -> InputError:
    return InputError(f"{path}: {reason}", f"delete the folder, then export again: {export}")
