"""The output folder of a benchmark, including results to resume from.

results.json  table.md  speedup.png  report.html
images/ROW/000.png      8-bit images of the first round
rows/ROW.json           a finished row and its identity (ROW@2: second round)
logs/ROW.log            output of the row's process
.bench.json             rows and numbers of images that benchmarks in this folder have started
.hasten-lock            locked by the process that writes to the folder
.work/                  jobs, and float32 images of references; deleted at the end
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
    """The absolute path of a folder.

    Raises:
        InputError: The path is not valid for a folder.
    """
    try:
        path = expand_user(out).absolute()
        path.as_posix().encode()  # the results are UTF-8
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"not a valid folder ({reason}): {os.fspath(out)!r}", ANOTHER) from None
    return path


class Identity(BaseModel):
    """Everything that the measurements of a row depend on.

    Rows of one table must agree in `facts`. The fingerprint of the weights would belong here, too,
    but only a row's process can compute it, and compares it (see `Job.weights`).

    Attributes:
        facts: The workload except `rounds`, which can be increased; the references; the environment
            in `results.json` except the date; and `host`, a hash of the host name, because two
            machines of the same kind differ in speed.
        recipe: The recipe as TOML.
    """

    facts: dict[str, Any]
    recipe: str

    def differences(self, now: Identity) -> list[str]:
        """One line for each fact that differs in `now`."""
        changed = [key for key, value in now.facts.items() if self.facts.get(key) != value]
        return [
            "the prompts differ"
            if key == "prompts"
            else f"{key} was {self.facts.get(key)}, now is {now.facts[key]}"
            for key in changed
        ]


class _Finished(BaseModel):
    """A row's file. `files` has the SHA-256 of its images, by path in the folder."""

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
    """The output folder, which is not modified before `open`.

    Attributes:
        out: Path of the folder.
        resume: Keep the finished rows of an existing benchmark.
        overwrite: Replace an existing benchmark. Without `resume` or `overwrite`, a folder that
            holds a benchmark is refused.
    """

    out: Path
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Check, without changing anything, that a benchmark can write to `out`.

        Raises:
            InputError: `out` cannot be created or written, is locked by another process, or has
                files that must not be replaced.
        """
        if self.resume and self.overwrite:
            raise InputError(
                "--resume keeps the rows that --overwrite deletes", "remove one of the two"
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
        """Context manager that creates and locks the folder, and explains errors of its disk."""
        with writing(self.out, ANOTHER):
            self.out.mkdir(parents=True, exist_ok=True)
        try:
            with FolderLock(self.out):
                yield
        except BrokenPipeError:  # from the reader of the progress output
            raise
        except OSError as error:
            if not self.out.is_dir():
                raise HastenError(
                    f"{self.out}: the folder was removed during the benchmark",
                    "run the same command again; its rows have to be measured again",
                ) from None
            raise HastenError(
                f"{error.filename or self.out}: {error.strerror}",
                "free some space there, or make it writable; then run the same command with "
                "--resume: finished rows are kept",
            ) from None

    def open(self, rows: Sequence[PlannedRow], workload: Workload) -> None:
        """Create the folders. Without `resume`, first delete the files of earlier benchmarks."""
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
        """Record in the manifest which files belong to this benchmark, before writing them."""
        before = self._manifest()
        manifest = _Manifest(
            rows=list(dict.fromkeys([*before.rows, *(row.name for row in rows)])),
            prompts=max(before.prompts, len(workload.prompts)),
            rounds=max(before.rounds, workload.rounds),
        )
        write_text(self.out / MANIFEST, seal(manifest.model_dump()))

    def row_file(self, name: str, turn: int) -> Path:
        """The file of a row in round `turn`, from 0; a recipe's name cannot contain @."""
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
        """Store a row with its identity and the checksums of its images."""
        name = outcome.row.recipe
        pictures = [] if turn else [self.out / image for image in outcome.row.images]
        floats = sorted(self.floats(name).glob("*.safetensors")) if pictures else []
        files = {path.relative_to(self.out).as_posix(): _sha256(path) for path in pictures + floats}
        finished = _Finished(identity=identity, round=turn, outcome=outcome, files=files)
        write_text(self.row_file(name, turn), seal(finished.model_dump(mode="json"), indent=1))

    def finished_row(self, planned: PlannedRow, turn: int, identity: Identity) -> Outcome | None:
        """The stored outcome of a row, if it is ok and undamaged.

        Returns:
            None if the row must be measured: there is no file, it or an image is damaged, or the
            fingerprint of the weights is unknown. Damage is logged.

        Raises:
            InputError: The row has another identity; every difference is listed.
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
                f"{ANOTHER}, or replace --resume by --overwrite to measure all rows again",
            )
        images = set(finished.outcome.row.images)
        if finished.outcome.weights is None:
            reason = "the fingerprint of its weights is unknown"
        elif damaged := self._damaged(finished, images):
            reason = f"{damaged} was damaged or edited"
        else:
            return finished.outcome
        logger.info("row %s is measured again: %s", planned.name, reason)
        return None

    def has_floats(self, name: str, workload: Workload) -> bool:
        """Whether all float32 images of a reference exist and are undamaged."""
        finished = self._read_row(name, 0)
        names = {f".work/{name}/{prompt.id:03d}.safetensors" for prompt in workload.prompts}
        return finished is not None and not self._damaged(finished, names)

    def close(self) -> None:
        shutil.rmtree(self.out / ".work", ignore_errors=True)

    def _check_content(self) -> None:
        """Refuse a folder with files that a benchmark must not replace."""
        for name in FOLDERS:
            _refuse_link(self.out / name)
        there = [name for name in (*REPORT, *FOLDERS) if (self.out / name).exists()]
        if there and not os.path.lexists(self.out / MANIFEST):
            raise InputError(
                f"{self.out}: has {', '.join(there)}, not written by a benchmark in this folder",
                f"{ANOTHER}, or move them to another folder",
            )
        self._manifest()
        used = any(name in REPORT for name in there) or any((self.out / "rows").glob("*"))
        if used and not (self.resume or self.overwrite):
            raise InputError(
                f"{self.out}: already holds a benchmark",
                f"{ANOTHER}, or add --resume to keep its finished rows, "
                "or --overwrite to replace it",
            )

    def _manifest(self) -> _Manifest:
        path = self.out / MANIFEST
        try:
            return unseal_file(path, _Manifest) or _Manifest()
        except DamagedError as error:
            raise InputError(
                f"{path}: {error}, so the files of the benchmark cannot be identified",
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
        """The first of these files that is missing, changed or not recorded in the row."""
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
            f"{folder}: a link, but a benchmark writes and deletes only inside its folder",
            f"{ANOTHER}, or replace the link with a folder",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stem(name: str, turn: int) -> str:
    return f"{name}@{turn + 1}" if turn else name


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
