"""`hasten bench`: the same prompts through several recipes; table, pictures, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options
from hasten.errors import HastenError, UnsupportedError
from hasten.process import terminable

if TYPE_CHECKING:
    from hasten.results import Results
    from hasten.settings import CallOptions

Recipes = Annotated[
    str, typer.Option(metavar="NAME,NAME,...", help="Presets or .toml files; baseline is added.")
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where results and pictures go.")]
Last = Annotated[int | None, typer.Option(metavar="N", help="Keep the last N prompts.")]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Then keep the first N of those.")]
Rounds = Annotated[int, typer.Option(metavar="N", help="Repeat in rotated order, 1 to 100 times.")]
References = Annotated[
    str, typer.Option("--reference", metavar="ROW,ROW,...", help="Rows to score pictures against.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the rows that --out already has.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the benchmark that --out already has.")
]
INTERRUPTED = "run the same command with --resume: it keeps the finished rows"


@options.with_call()
def bench_command(
    *,
    recipes: Recipes = "baseline,compile,cache,cache-compile",
    out: Out = Path("out"),
    prompts: options.Prompts = None,
    last: Last = None,
    limit: Limit = None,
    call: CallOptions,
    rounds: Rounds = 1,
    reference: References = "baseline",
    force: options.Force = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time recipes on the same prompts and score their pictures against the plain pipeline's."""
    with terminable(INTERRUPTED):
        from hasten import bench
        from hasten.cli.terminal import ProgressBar, print_line
        from hasten.log import forward_log

        with ProgressBar() as progress, forward_log(print_line, progress.stage):
            progress.stage("starting")
            results = bench(
                recipes=_names(recipes),
                out=out,
                prompts=prompts,
                last=last,
                limit=limit,
                rounds=rounds,
                references=_names(reference),
                force=force,
                resume=resume,
                overwrite=overwrite,
                progress=progress.show,
                **vars(call),
            )
    if as_json:
        print(results.model_dump_json(by_alias=True, indent=1))
    else:
        _print(results, out)
    _refuse_failures(results, out)


def _refuse_failures(results: Results, out: Path) -> None:
    """Raise where a row failed, and where none could be measured."""
    failed = [row for row in results.rows if row.status == "failed"]
    if failed:
        raise HastenError(
            [f"row {row.recipe} failed: {row.reason}" for row in failed],
            f"each row's log is in {out / 'logs'}; `--resume` renders only what is missing",
        )
    if all(row.status != "ok" for row in results.rows):
        raise UnsupportedError("no row could be measured", "each row's reason says what to do")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))


def _print(results: Results, out: Path) -> None:
    """The report's table without its wide columns, what to know of the rows, and where it is."""
    from hasten.cli.terminal import print_table, print_text
    from hasten.report import table

    shown = [column for column in table.columns(results) if not column.wide]
    head = ["recipe", *[column.title for column in shown]]
    rows = [[row.recipe, *[column.cell(row).text for column in shown]] for row in results.rows]
    keep = ("seconds", "speedup", "lpips")
    drop = [column.title for column in reversed(shown) if column.key not in keep]
    dropped = print_table(head, rows, right=" " + "r" * len(shown), drop=drop)
    remarks = [(row.recipe, note) for row in results.rows for note in table.notes(row, results)]
    if remarks:
        print()
        print_table(("notes", ""), remarks)
    print()
    if dropped:
        print_text(f"No room here for {', '.join(reversed(dropped))}: the report has them.")
    if reason := table.common_quality_reason(results):
        print_text(f"Quality: {reason}.")
    print_text(table.drift_line(results))
    print(f"Report: {out / 'report.html'}")
