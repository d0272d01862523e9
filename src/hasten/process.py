"""Child processes: a fresh interpreter, its progress, and its end.

A child never outlives us, however we end. `python -m hasten.process PID MODULE ARGUMENTS` runs a
module as `python -m MODULE ARGUMENTS` does, in a process that is killed when its parent, PID, is
gone.
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
    """This interpreter running a module; -P: not with whatever lies in the current directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def bound_command(module: str, *arguments: str) -> list[str]:
    """The same for a child that ends with us. The thread that starts it must wait for it: Linux
    takes the end of that thread for ours."""
    return python_command("hasten.process", str(os.getpid()), module, *arguments)


def python_environment() -> dict[str, str]:
    """Our environment, with our own import path in its order."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path}


def start_module(
    module: str, *arguments: str, output: BinaryIO, keep: int
) -> subprocess.Popen[bytes]:
    """Start `python -m module arguments` in a session of its own, so that Ctrl-C reaches only us.

    Args:
        output: Where all that it prints goes.
        keep: A file descriptor that it gets as it is.
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
    """Run `python -m module argument FD` to its end and return its exit status (−N: signal N).

    The child writes JSON objects, one per line, to the file descriptor FD; each is passed to
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
    """Have this process killed once its parent is gone, which it may be already."""
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
