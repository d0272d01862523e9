"""Starts jobs in separate processes and reads their results."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from studies.caching.jobs import Job, name_of
from studies.caching.pool import Ended
from studies.caching.results import failed_row

from hasten.process import python_command, python_environment
from hasten.results import Row

__all__ = ["Launcher"]

LOGS = Path(__file__).resolve().parents[2] / "out" / "caching" / "logs"


class Launcher:
    """Starts a job in a separate process and reads its results."""

    def __init__(self, processes: Any, folder: Path) -> None:
        self.processes = processes
        self.folder = folder
        self.numbers = count()
        self.files: dict[int, tuple[Path, Path]] = {}

    def start(self, job: Job) -> Any:
        number = next(self.numbers)
        job_file = self.folder / f"{number}.job.json"
        row_file = self.folder / f"{number}.row.json"
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / _log_name(job)
        self.files[id(job)] = row_file, log
        job_file.write_text(json.dumps(asdict(job)), "utf-8")
        process = self.processes.Process(target=forked, args=(job_file, row_file, log, job.device))
        process.start()
        return process

    def rows(self, ended: Ended[Job]) -> tuple[dict[float, Row], str | None]:
        """(the job's rows by budget, why some of them failed)."""
        job, code, stopped = ended
        row_file, log = self.files.get(id(job), (None, None))
        part: dict[str, Any] = {"rows": [], "fault": None}
        if row_file is not None and row_file.is_file():
            part = json.loads(row_file.read_text("utf-8"))
        rows = {budget: Row.model_validate(row) for budget, row in part["rows"]}
        if code == 0:
            return rows, None
        lost = stopped or part["fault"] or f"{_status(code)}; see {log}"
        missing = {budget: failed_row(name_of(job), lost) for budget in job.budgets}
        return missing | rows, lost


def forked(job_file: Path, row_file: Path, log: Path, device: str) -> None:
    """`row.perform`, in a process forked with everything imported; its output goes to `log`.

    Where CUDA was touched before the fork it cannot start after it: a new interpreter then.
    """
    from studies.caching.row import perform

    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if not _can_start(device):
        command = python_command("studies.caching.row", str(job_file), str(row_file))
        os.execve(command[0], command, python_environment())
    perform(job_file, row_file)


def _can_start(device: str) -> bool:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"{device} cannot start in a fork: {error}", flush=True)
        return False
    return True


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"failed with exit status {code}"


def _log_name(job: Job) -> str:
    method = Path(job.method).name.replace(" ", "-")
    budgets = "-".join(f"{budget:g}" for budget in job.budgets)
    return f"{job.model}-{method}-{budgets}-{job.blocks or 'own'}.log"
