"""Child processes: a fresh interpreter, its progress, and its end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "how_it_ended",
    "python_command",
    "python_environment",
    "run_module",
    "start_module",
]

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0


def python_command(module: str, *arguments: str) -> list[str]:
    """This interpreter running a module; -P: not with whatever lies in the current directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def python_environment() -> dict[str, str]:
    """Our environment, with our own import path in its order."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path}


def start_module(
    module: str, *arguments: str, output: BinaryIO, keep: int
) -> subprocess.Popen[bytes]:
    """Start `python -m module arguments` in a session of its own, so that Ctrl-C reaches only us.

    output: where all that it says goes; keep: a file descriptor that it gets as it is.
    """
    return subprocess.Popen(
        python_command(module, *arguments),
        env=python_environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=(keep,),
        start_new_session=True,
    )


def run_module(
    module: str, argument: str, *, log: Path, on_message: Callable[[dict[str, Any]], None]
) -> int:
    """Run `python -m module argument FD` to its end and return its exit status (−N: signal N).

    The child writes JSON objects, one a line, to the file descriptor FD; each is passed to
    `on_message`. Its output goes to `log`. It leads a process group, so that Ctrl-C reaches only
    us; whatever raises here ends that whole group first.
    """
    receive, send = os.pipe()
    try:
        with log.open("wb") as output:
            child = start_module(module, argument, str(send), output=output, keep=send)
    except BaseException:
        os.close(receive)
        raise
    finally:
        os.close(send)
    try:
        _pass_on_messages(receive, child, on_message)
        return child.wait()
    finally:
        os.close(receive)
        _end_group(child)


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"its process ended with exit code {status}"
    name = signal.Signals(-status).name
    cause = " (often: out of memory)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{cause}"


def _pass_on_messages(
    receive: int, child: subprocess.Popen[bytes], on_message: Callable[[dict[str, Any]], None]
) -> None:
    pending = b""
    while True:
        ready, _, _ = select.select([receive], [], [], POLL_SECONDS)
        if not ready:
            # A worker the child forked may hold the pipe open for longer than the child lives.
            if child.poll() is not None:
                return
            continue
        chunk = os.read(receive, 65536)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            on_message(json.loads(line))


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End the child, if it still runs, and every process it left behind."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
