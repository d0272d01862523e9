"""The folder a benchmark writes: what lies where, what is an earlier benchmark's, what is done.

results.json  table.md  speedup.png  report.html
images/ROW/000.png      8-bit pictures of the first round
rows/ROW.json           a finished row and what it was measured with (ROW@2: second round)
logs/ROW.log            what the row's process printed
.bench.json             rows and numbers of pictures this folder's benchmarks have begun
.hasten-lock            held by the process that writes here
.work/                  jobs, and unrounded pictures of references; gone at the end
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from hasten.atomic import remove_drafts, write_text
from hasten.benchmark.job import Outcome
from hasten.benchmark.rows import PlannedRow
from hasten.errors import HastenError, InputError, writing
from hasten.folder_lock import FolderLock
from hasten.log import logger
from hasten.results import Workload
from hasten.sealed import DamagedError, seal, unseal_file
from hasten.user_files import expand_user

MANIFEST = ".bench.json"
REPORT = ("results.json", "table.md", "speedup.png", "report.html")
FOLDERS = ("images", "rows", "logs", ".work")
ANOTHER = "choose another --out"

RowName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def absolute(out: str | os.PathLike[str]) -> Path:
    """The folder that `out` names. Raises InputError for a name that none can have."""
    try:
        path = expand_user(out).absolute()
        path.as_posix().encode()  # the results are UTF-8
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"no folder can be there ({reason}): {os.fspath(out)!r}", ANOTHER
        ) from None
    return path


class Identity(BaseModel):
    """What a row was measured with; rows with different ones do not belong in one table.

    `facts` are the workload but for `rounds`, which may be added; the references; all that
    `results.json` records of hardware, driver, threads, library versions and hasten's own commit,
    but for the date; and `host`, a hash of the host name: two machines of one kind do not run at
    the same speed. `recipe` is the recipe's text. The weights belong to it as well, but only the
    row's process can see them: it compares their fingerprint (see `Job.weights`).
    """

    facts: dict[str, Any]
    recipe: str

    def differences(self, now: Identity) -> list[str]:
        """One line for each fact that `now` has otherwise."""
        changed = [key for key, value in now.facts.items() if self.facts.get(key) != value]
        return [
            "the prompts are others"
            if key == "prompts"
            else f"{key} was {self.facts.get(key)}, now is {now.facts[key]}"
            for key in changed
        ]


class _Finished(BaseModel):
    """A row's file. `files` are the pictures that it left, by path in the folder, as SHA-256."""

    identity: Identity
    round: int
    outcome: Outcome
    files: dict[str, str]


class _Manifest(BaseModel):
    rows: Annotated[list[RowName], Field(max_length=10_000)] = []
    prompts: Annotated[int, Field(ge=0)] = 0
    rounds: Annotated[int, Field(ge=1, le=100)] = 1


@dataclass(frozen=True)
class BenchmarkStore:
    """The output folder; nothing is touched before `open`.

    Without `resume` (keep its finished rows) and `overwrite` (replace them), a folder that holds a
    benchmark already is refused.
    """

    out: Path
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raise InputError unless `out` can be made and written, belongs to no other process and
        holds nothing that a benchmark would replace unasked. Changes nothing."""
        if self.resume and self.overwrite:
            raise InputError(
                "--resume keeps the rows that --overwrite deletes", "leave out one of the two"
            )
        existing = next(folder for folder in (self.out, *self.out.parents) if folder.exists())
        if not existing.is_dir():
            raise InputError(f"{existing}: a file, not a folder", ANOTHER)
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"{existing}: cannot be written", ANOTHER)
        if existing == self.out:
            with FolderLock(self.out):
                self._check_content()

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the folder, made if need be, for this process; errors of its disk get their fix."""
        with writing(self.out, ANOTHER):
            self.out.mkdir(parents=True, exist_ok=True)
        try:
            with FolderLock(self.out):
                yield
        except BrokenPipeError:  # of whoever reads our progress
            raise
        except OSError as error:
            if not self.out.is_dir():
                raise HastenError(
                    f"{self.out}: the folder vanished during the benchmark",
                    "run the same command again: what it held has to be measured again",
                ) from None
            raise HastenError(
                f"{error.filename or self.out}: {error.strerror}",
                "free some space there, or make it writable; then run the same command with "
                "--resume: finished rows are kept",
            ) from None

    def open(self, rows: Sequence[PlannedRow], workload: Workload) -> None:
        """Make the folders; with `overwrite`, first delete what earlier benchmarks wrote."""
        self._check_content()
        if not self.resume:
            self._delete(self._manifest())
            (self.out / MANIFEST).unlink(missing_ok=True)
        self.note(rows, workload)
        folders = [self.out / name for name in FOLDERS]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        pictures = [folder for row in rows for folder in self._pictures(row.name)]
        remove_drafts(self.out)
        for folder in folders + pictures:
            _refuse_link(folder)
            remove_drafts(folder)

    def note(self, rows: Sequence[PlannedRow], workload: Workload) -> None:
        """Write down what is this benchmark's own, before it is written."""
        before = self._manifest()
        manifest = _Manifest(
            rows=list(dict.fromkeys([*before.rows, *(row.name for row in rows)])),
            prompts=max(before.prompts, len(workload.prompts)),
            rounds=max(before.rounds, workload.rounds),
        )
        write_text(self.out / MANIFEST, seal(manifest.model_dump()))

    def row_file(self, name: str, turn: int) -> Path:
        """Where a row of round `turn` (0 is the first) is kept; @ is in no recipe's name."""
        return self.out / "rows" / f"{_stem(name, turn)}.json"

    def log_file(self, name: str, turn: int) -> Path:
        return self.out / "logs" / f"{_stem(name, turn)}.log"

    def work_file(self, name: str, turn: int, kind: str) -> Path:
        return self.out / ".work" / f"{_stem(name, turn)}.{kind}.json"

    def images(self, name: str) -> Path:
        return self.out / "images" / name

    def floats(self, name: str) -> Path:
        return self.out / ".work" / name

    def remove_drafts(self, name: str) -> None:
        """Delete what a row's process left half-written: it has ended, perhaps by a signal."""
        for folder in (self.out / ".work", *self._pictures(name)):
            remove_drafts(folder)

    def _pictures(self, name: str) -> tuple[Path, Path]:
        return self.images(name), self.floats(name)

    def write_row(self, outcome: Outcome, turn: int, identity: Identity) -> None:
        """Keep a row, with what it was measured with and the checksums of its pictures."""
        name = outcome.row.recipe
        pictures = [] if turn else [self.out / image for image in outcome.row.images]
        floats = sorted(self.floats(name).glob("*.safetensors")) if pictures else []
        files = {path.relative_to(self.out).as_posix(): _sha256(path) for path in pictures + floats}
        finished = _Finished(identity=identity, round=turn, outcome=outcome, files=files)
        write_text(self.row_file(name, turn), seal(finished.model_dump(mode="json"), indent=1))

    def finished_row(self, planned: PlannedRow, turn: int, identity: Identity) -> Outcome | None:
        """The row if it was measured before, is ok, and is what was written.

        None, with a line in the log, for a row to be measured again: its file or a picture of it is
        damaged, or nobody knows the weights that it was measured with.

        Raises:
            InputError: It was measured with something else; every difference is named.
        """
        finished = self._read_row(planned.name, turn)
        if finished is None or finished.outcome.row.status != "ok":
            return None
        differences = finished.identity.differences(identity)
        if finished.identity.recipe != identity.recipe:
            differences.append(f"recipe {planned.name!r} has changed since")
        if differences:
            raise InputError(
                [f"{self.out}: cannot resume: {line}" for line in differences],
                f"{ANOTHER}, or replace --resume by --overwrite to measure every row again",
            )
        images = set(finished.outcome.row.images)
        if finished.outcome.weights is None:
            reason = "the fingerprint of its weights is unknown"
        elif damaged := self._damaged(finished, images):
            reason = f"{damaged} is not what was written"
        else:
            return finished.outcome
        logger.info("row %s is measured again: %s", planned.name, reason)
        return None

    def has_floats(self, name: str, workload: Workload) -> bool:
        """Whether a reference's unrounded pictures are all still there, as they were written."""
        finished = self._read_row(name, 0)
        names = {f".work/{name}/{prompt.id:03d}.safetensors" for prompt in workload.prompts}
        return finished is not None and not self._damaged(finished, names)

    def close(self) -> None:
        shutil.rmtree(self.out / ".work", ignore_errors=True)

    def _check_content(self) -> None:
        """Refuse what a benchmark here would replace, delete or write to unasked."""
        for name in FOLDERS:
            _refuse_link(self.out / name)
        there = [name for name in (*REPORT, *FOLDERS) if (self.out / name).exists()]
        if there and not os.path.lexists(self.out / MANIFEST):
            raise InputError(
                f"{self.out}: there is {', '.join(there)} that no benchmark here wrote",
                f"{ANOTHER}, or move them away",
            )
        self._manifest()
        used = any(name in REPORT for name in there) or any((self.out / "rows").glob("*"))
        if used and not (self.resume or self.overwrite):
            raise InputError(
                f"{self.out}: holds a benchmark already",
                f"{ANOTHER}, or add --resume to keep its finished rows, "
                "or --overwrite to replace it",
            )

    def _manifest(self) -> _Manifest:
        path = self.out / MANIFEST
        try:
            return unseal_file(path, _Manifest) or _Manifest()
        except DamagedError as error:
            raise InputError(
                f"{path}: {error}, so nobody knows which files here are a benchmark's",
                f"{ANOTHER}, or delete {self.out} yourself",
            ) from None

    def _read_row(self, name: str, turn: int) -> _Finished | None:
        path = self.row_file(name, turn)
        try:
            finished = unseal_file(path, _Finished)
            if finished and (finished.outcome.row.recipe, finished.round) != (name, turn):
                other = f"round {finished.round + 1} of {finished.outcome.row.recipe}"
                raise DamagedError(f"it is {other}")
        except DamagedError as error:
            logger.info("%s: %s; it is measured again", path, error)
            return None
        return finished

    def _damaged(self, finished: _Finished, names: Iterable[str]) -> str | None:
        """The first of these pictures that is missing, changed or not the row's."""
        for name in sorted(names):
            try:
                if finished.files.get(name) != _sha256(self.out / name):
                    return name
            except OSError:
                return name
        return None

    def _delete(self, before: _Manifest) -> None:
        for name in REPORT if before.rows else ():
            (self.out / name).unlink(missing_ok=True)
        for row in before.rows:
            for turn in range(before.rounds):
                self.row_file(row, turn).unlink(missing_ok=True)
                self.log_file(row, turn).unlink(missing_ok=True)
            pictures = self.images(row)
            _refuse_link(pictures)
            for file in pictures.glob("*.png"):
                if file.stem.isdecimal() and int(file.stem) < before.prompts:
                    file.unlink(missing_ok=True)
            _remove_if_empty(pictures)
        shutil.rmtree(self.out / ".work", ignore_errors=True)
        for name in FOLDERS:
            _remove_if_empty(self.out / name)


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise InputError(
            f"{folder}: a link, and a benchmark writes and deletes only inside of its folder",
            f"{ANOTHER}, or replace the link by a folder",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stem(name: str, turn: int) -> str:
    return f"{name}@{turn + 1}" if turn else name


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
