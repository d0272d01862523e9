"""Child processes: messages, logs, ends of every kind, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hasten.process import how_it_ended, python_environment, run_module, terminable


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run Python source as a module with the argument `given` and collect its messages."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def call(source: str, on_message: Any = None) -> tuple[int, list[Any], str]:
        (tmp_path / "child.py").write_text(f"import json, os, sys\nfd = int(sys.argv[2])\n{source}")
        heard: list[Any] = []
        log = tmp_path / "log"
        status = run_module("child", "given", log=log, on_message=on_message or heard.append)
        return status, heard, log.read_text()

    return call


def test_messages_output_and_status(run: Any) -> None:
    status, heard, log = run(
        "for n in range(3): os.write(fd, f'{json.dumps([n, sys.argv[1]])}\\n'.encode())\n"
        "print('out'); print('err', file=sys.stderr); sys.exit(3)"
    )
    assert status == 3
    assert heard == [[0, "given"], [1, "given"], [2, "given"]]
    assert sorted(log.split()) == ["err", "out"]


def test_a_message_may_come_in_pieces(run: Any) -> None:
    _, heard, _ = run(
        "os.write(fd, b'[1, '); import time; time.sleep(0.05); os.write(fd, b'2]\\n')"
    )
    assert heard == [[1, 2]]


def test_a_signal_has_its_name(run: Any) -> None:
    status, _, _ = run("os.kill(os.getpid(), 11)")
    assert how_it_ended(status) == "its process was ended by SIGSEGV"
    assert "out of memory" in how_it_ended(-signal.SIGKILL)
    assert how_it_ended(3) == "its process ended with exit code 3"


def test_a_worker_that_holds_the_pipe_neither_blocks_nor_survives(run: Any) -> None:
    start = time.monotonic()
    status, heard, log = run(
        "worker = os.fork()\n"
        "if worker == 0:\n    import time; time.sleep(60)\n"
        "print(worker); os.write(fd, b'1\\n')"
    )
    assert (status, heard) == (0, [1])
    assert time.monotonic() - start < 10
    assert _gone(int(log))


def test_an_interrupt_here_ends_the_child(run: Any) -> None:
    heard: list[int] = []

    def interrupt(message: int) -> None:
        heard.append(message)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("os.write(fd, f'{os.getpid()}\\n'.encode()); import time; time.sleep(60)", interrupt)
    assert _gone(heard[0])


PARENT = """
import sys
from pathlib import Path
from hasten.process import run_module, terminable
with terminable("go on"):
    run_module("child", "given", log=Path(sys.argv[1]), on_message=lambda m: print(m, flush=True))
"""
SLEEPS = (
    "import os, sys, time\nos.write(int(sys.argv[2]), f'{os.getpid()}\\n'.encode())\ntime.sleep(60)"
)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_ends_with_its_parent(tmp_path: Path, how: int) -> None:
    (tmp_path / "child.py").write_text(SLEEPS)
    path = os.pathsep.join([str(tmp_path), *(entry or os.getcwd() for entry in sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log")],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(how)
        _, errors = parent.communicate(timeout=30)
    assert _gone(child)
    if how != signal.SIGKILL:
        assert errors.strip().splitlines()[-1] == "KeyboardInterrupt: go on"


@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_a_child_whose_parent_is_gone_already_does_not_start(tmp_path: Path, platform: str) -> None:
    (tmp_path / "child.py").write_text(f"open({str(tmp_path / 'began')!r}, 'w')")
    code = (
        f"import sys; sys.platform = {platform!r}; sys.argv = ['', '1', 'child']\n"
        "from hasten import process; process._main()"
    )
    path = os.pathsep.join([str(tmp_path), *(entry or os.getcwd() for entry in sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "began").exists()


def test_without_linux_a_thread_watches_the_parent(tmp_path: Path) -> None:
    """The middle process ends at once; its child has only the thread to notice it by."""
    child = (
        "import os, sys, time; sys.platform = 'elsewhere'\n"
        "from hasten import process; process._end_with(os.getppid())\n"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    middle = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "print(int(child.stdout.readline()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", middle], env=python_environment(), capture_output=True, check=True
    )
    assert _gone(int(done.stdout))


def test_sigterm_has_its_old_meaning_after_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="advice"), terminable("advice"):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_that_a_library_turns_into_an_error_is_still_one(how: int) -> None:
    def imported() -> None:
        try:
            signal.raise_signal(how)
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    with pytest.raises(KeyboardInterrupt, match="advice"), terminable("advice"):
        imported()
    with pytest.raises(ImportError, match="of its own"), terminable("advice"):
        raise ImportError("of its own")


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with terminable():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def _gone(process: int) -> bool:
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{process}/stat")
        if state.exists() and state.read_text().rsplit(")")[-1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False
