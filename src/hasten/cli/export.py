"""`hasten export`: models for other runtimes, TensorRT engines so far."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options
from hasten.engines.tensorrt import PROMPTS
from hasten.errors import Faults, InputError
from hasten.memory import format_bytes
from hasten.process import terminable

if TYPE_CHECKING:
    from hasten.engines.tensorrt.manifest import Manifest
    from hasten.engines.tensorrt.preflight import ExportOptions
    from hasten.settings import CallOptions, Settings

export = typer.Typer(help="Engines for runtimes other than torch.", rich_markup_mode=None)

RESUME = "run the same command again to go on: finished stages are kept"


@export.callback(invoke_without_command=True)
def _help_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Target = Annotated[
    str | None,
    typer.Option(
        metavar="SM,SM",
        help="GPUs to build one engine for, such as sm89,sm120. sm75: RTX 20, T4; sm80: A100; "
        "sm86: RTX 30, A10, A40; sm89: RTX 40, L4, L40S; sm120: RTX 50, RTX PRO; sm121: GB10; "
        "none: the graph alone.",
    ),
]
Precision = Annotated[
    str, typer.Option(metavar="bf16|fp16|fp8", help="fp8 needs sm89 or later, bf16 sm80.")
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where it goes.")]
MaxSize = Annotated[
    str | None, typer.Option(metavar="WxH", help="The largest image.  [default: 2048x2048]")
]
Method = Annotated[str, typer.Option(metavar="max|smoothquant", help="How fp8 finds its scales.")]
Limit = Annotated[int, typer.Option(metavar="N", help="Prompts to learn from.")]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Skip the check of the graph against torch (in onnxruntime)."),
]


@dataclass(frozen=True)
class ExportRequest:
    """All options, checked."""

    called: CallOptions
    settings: Settings
    wanted: ExportOptions
    prompts: tuple[str, ...]
    out: Path


@export.command()
@options.with_call("model", "device", "dtype", "steps", "max_sequence_length")
def tensorrt(
    *,
    target: Target = None,
    precision: Precision = "fp8",
    out: Out = Path("engine"),
    max_size: MaxSize = None,
    calibration: Method = "max",
    prompts: options.Prompts = None,
    limit: Limit = PROMPTS,
    no_verify: NoVerify = False,
    call: CallOptions,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Build a TensorRT for RTX engine, on a machine that needs no GPU."""
    from hasten.engines.tensorrt.folder import finished
    from hasten.engines.tensorrt.preflight import check_request
    from hasten.engines.tensorrt.store import StageStore
    from hasten.prompts import read_prompts
    from hasten.settings import whole_number

    faults = Faults()
    wanted = _wanted(target, precision, max_size, calibration, faults, verify=not no_verify)
    settings, defaults = options.checked_settings(call, None, faults)
    texts: list[str] = []
    count = whole_number("limit", limit, PROMPTS, (1, 1000), faults)
    with faults.gather():
        texts = read_prompts(prompts or defaults.prompts, limit=count)
    check_request(wanted, out, faults)
    faults.raise_any()
    request = ExportRequest(call, settings, wanted, tuple(texts), out)
    key = _key(request)
    with terminable(RESUME):
        before = None if key is None else finished(StageStore(), key, out)
        manifest = before or _exported(request, key)
    if as_json:
        print(manifest.model_dump_json(by_alias=True, indent=2))
    else:
        _print_result(manifest, request, before=before is not None)


def _wanted(
    target: str | None,
    precision: str,
    max_size: str | None,
    method: str,
    faults: Faults,
    *,
    verify: bool,
) -> ExportOptions:
    """What is to be exported; what is wrong with the options goes into `faults`."""
    from hasten.engines.tensorrt.preflight import LARGEST, ExportOptions
    from hasten.engines.tensorrt.targets import parse_targets
    from hasten.recipe import parse_size

    targets: tuple[str, ...] = ()
    largest = LARGEST
    with faults.gather():
        if target is None:
            raise InputError(
                "--target is missing: the GPUs to build for",
                "for example --target sm89 (RTX 40), or --target none for the graph alone",
            )
        targets = parse_targets(target)
    with faults.gather():
        if max_size is not None:
            largest = parse_size(max_size, at_most=True)
    return ExportOptions(precision, targets, largest, method, verify)


def _exported(request: ExportRequest, key: str | None) -> Manifest:
    """key: before anything was loaded. What it led to is remembered where the model's files have
    not changed since; None becomes a key where loading has fetched them."""
    with options.loaded_model(request.called) as (pipe, _):
        from hasten.engines.tensorrt.folder import remember
        from hasten.engines.tensorrt.stages import export_tensorrt
        from hasten.engines.tensorrt.store import StageStore

        key = key or _key(request)
        manifest = export_tensorrt(
            pipe,
            request.out,
            request.wanted,
            prompts=request.prompts,
            steps=request.settings.steps,
            max_sequence_length=request.settings.max_sequence_length,
            model=_shown(request.called.model),
        )
    if key is not None and key == _key(request):
        remember(StageStore(), key, request.out, manifest)
    return manifest


def _key(request: ExportRequest) -> str | None:
    """Of the request and the model's files by size and time; None where there are none to see."""
    from hasten.engines.tensorrt.keys import request_key
    from hasten.models.defaults import cached_snapshot, model_directory

    model = request.called.model
    shape = model if model.startswith("shape:") else None
    source = shape or model_directory(model) or cached_snapshot(model)
    return None if source is None else request_key(source, asdict(request))


def _shown(model: str) -> str:
    """A model's name without the folders it lies in."""
    from hasten.models.defaults import model_directory

    directory = model_directory(model)
    return model if directory is None or model == "tiny" else directory.resolve().name


def _print_result(manifest: Manifest, request: ExportRequest, *, before: bool) -> None:
    """What was made, and the command that draws with it."""
    from hasten.cli.terminal import print_text
    from hasten.engines.tensorrt.folder import RECIPE

    out, call = request.out, request.called
    product = f"engine for {', '.join(manifest.targets)}" if manifest.targets else "graph"
    facts = [_sizes(manifest), _error(manifest), *(["made before"] if before else [])]
    print_text(f"{out}: {manifest.precision} {product} of {manifest.model}; {'; '.join(facts)}")
    command = ["hasten", "generate", "a rocket", "--recipe", str(out / RECIPE)]
    command += [] if call.model == "tiny" else ["--model", call.model]
    command += [] if call.dtype == "auto" else ["--dtype", call.dtype]
    command += [] if manifest.targets else ["--device", "cpu"]
    where = f" (on {' or '.join(manifest.targets)})" if manifest.targets else ""
    print(f"next{where}: {shlex.join(command)}")


def _sizes(manifest: Manifest) -> str:
    """Sizes of the graph and the engine."""
    from hasten.engines.tensorrt.files import DATA, ENGINE, GRAPH

    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    graph = f"graph {format_bytes(sizes.get(GRAPH, 0) + sizes.get(DATA, 0))}"
    return f"{graph}, engine {format_bytes(sizes[ENGINE])}" if ENGINE in sizes else graph


def _error(manifest: Manifest) -> str:
    """The graph's error against torch, in a few words."""
    verification = manifest.verification
    if verification is None:
        return "the graph was not verified"
    if manifest.precision == "fp8":
        return f"error of a block against torch at most {verification.worst_block:.1e}"
    return f"error against torch at most {verification.worst_whole:.1e}"
