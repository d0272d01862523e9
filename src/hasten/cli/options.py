"""The options that commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hasten.errors import InputError


class Dtype(StrEnum):
    """`auto` is bfloat16 on a GPU that has it (float16 on an older one) and float32 on a CPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="tiny (bundled), a local directory, a hub id, or shape:flux.1-dev (random weights).",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.")
]
Steps = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=1000, help="Denoising steps.  [default: the model's]"),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="WxH", help="Pixels, multiples of 16.  [default: the model's]"),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=2**53, help="Seed of the noise.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="X", min=0, max=100, help="Distilled guidance scale.  [default: the model's]"
    ),
]
MaxSequenceLength = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=512, help="Text tokens for T5.  [default: the model's]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def check_writable(directory: Path) -> None:
    """Refuse a directory that is missing or in which no file can be made."""
    import tempfile

    if not directory.exists():
        raise InputError(f"{directory}: no such directory", f"mkdir -p {directory}")
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".hasten-", suffix=".tmp"):
            pass
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written: {error.strerror}",
            "give --out a place that can be written",
        ) from None
