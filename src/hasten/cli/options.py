"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.errors import InputError

Model = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="tiny (bundled), a local directory, a hub id, or shape:flux.1-dev (random weights).",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")]
# No bounds here: typer would stop at the first value out of them. hasten.settings finds them all.
Steps = Annotated[
    int | None,
    typer.Option(metavar="N", help="Denoising steps, 1 to 1000.  [default: the model's]"),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="WxH", help="Pixels, multiples of 16.  [default: the model's]"),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the noise, 0 or more.")]
Guidance = Annotated[
    float | None,
    typer.Option(metavar="X", help="Distilled guidance scale, 0 to 100.  [default: the model's]"),
]
MaxSequenceLength = Annotated[
    int | None,
    typer.Option(metavar="N", help="Text tokens for T5, 1 to 512.  [default: the model's]"),
]
Force = Annotated[
    bool, typer.Option("--force", help="Use a schedule or scales learned on another model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Prompts as .txt (one per line), .csv, .tsv or .jsonl; or tiny or general.  "
        "[default: the model's]",
    ),
]


def check_writable(directory: Path) -> None:
    """Refuse a directory that is missing or in which no file can be made."""
    import os
    import shlex
    import tempfile

    if not os.path.lexists(directory):
        quoted = shlex.quote(str(directory))
        raise InputError(f"{directory}: no such directory", f"mkdir -p -- {quoted}")
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".hasten-", suffix=".tmp"):
            pass
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written: {error.strerror}",
            "give --out a place that can be written",
        ) from None
