"""Child processes: a new interpreter, its progress messages and its termination.

A child never outlives this process. `python -m hasten.process PID MODULE ARGUMENTS` runs a module
as `python -m MODULE ARGUMENTS` does, in a process that is killed when its parent, PID, has ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def python_command(module: str, *arguments: str) -> list[str]:
    """Command that runs a module; -P excludes modules in the current directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def bound_command(module: str, *arguments: str) -> list[str]:
    """Command that runs a module in a child that is killed when this process ends.

    The thread that starts the child must wait for it, because Linux kills the child when that
    thread ends.
    """
    return python_command("hasten.process", str(os.getpid()), module, *arguments)


def python_environment() -> dict[str, str]:
    """This process's environment, with its import path as PYTHONPATH."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path}


def start_module(
    module: str, *arguments: str, output: BinaryIO, keep: int
) -> subprocess.Popen[bytes]:
    """Start `python -m module arguments` in a new session, which Ctrl-C does not reach.

    Args:
        module: Name of the module.
        *arguments: Of the module.
        output: File for its stdout and stderr.
        keep: File descriptor that it inherits.
    """
    return subprocess.Popen(
        bound_command(module, *arguments),
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
    """Run `python -m module argument FD` until it ends.

    The child is in a new process group, which Ctrl-C does not reach. If this function raises, it
    ends that whole group first.

    Args:
        module: Name of the module.
        argument: Its first argument.
        log: File for its stdout and stderr.
        on_message: Called with each JSON object that the child writes, one per line, to the file
            descriptor FD.

    Returns:
        The exit status; −N if signal N ended the child.
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
    """Describe an exit status, as returned by `run_module`."""
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
            # A worker that the child forked may keep the pipe open after the child has ended.
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
    """End the child if it still runs, and every process that it left running."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@contextmanager
def terminable(advice: str | None = None) -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: by a KeyboardInterrupt, which cleans up.

    Some libraries turn a KeyboardInterrupt into an error of their own, in the middle of an import
    for example. After either signal, any error leaves the block as a KeyboardInterrupt.

    Args:
        advice: What to do next: every KeyboardInterrupt leaves with it as its text.
    """
    arrived: list[int] = []

    def interrupt(number: int, _: object) -> None:
        arrived.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _taken_over()}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if advice is None:
            raise
        raise KeyboardInterrupt(advice) from None
    except Exception as error:
        if not arrived:
            raise
        raise KeyboardInterrupt(*([advice] if advice else [])) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _taken_over() -> list[signal.Signals]:
    """The signals that `terminable` handles here: SIGINT unless it is ignored, as in the
    background; none where Python lets none be handled."""
    if threading.current_thread() is not threading.main_thread():
        return []
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGINT]


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends; it may have ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _main() -> None:
    _end_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
