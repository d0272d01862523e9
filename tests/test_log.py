"""What is logged reaches who listens in the same context, and nobody else.

Libraries are silent in hasten's own processes, and as they were everywhere else.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hasten.log import VERBOSITY, disable_telemetry, forward_log, logger, quiet_libraries

SET_BY_US = (*VERBOSITY, "ORT_DISABLE_TELEMETRY")
LOUD = {name: value for name, value in os.environ.items() if name not in SET_BY_US}


def test_lines_and_what_goes_on_are_passed_on_apart() -> None:
    lines: list[str] = []
    now: list[str] = []
    with forward_log(lines.append, now.append):
        logger.info("%s done", "export")
        logger.debug("100 %")
    logger.info("nobody listens")
    assert (lines, now) == (["export done"], ["100 %"])


def test_two_threads_get_their_own_lines() -> None:
    lines: dict[str, list[str]] = {"a": [], "b": []}
    together = threading.Barrier(2)

    def work(name: str) -> None:
        with forward_log(lines[name].append, lines[name].append):
            for number in range(20):
                together.wait()
                logger.info("%s %d", name, number)

    threads = [threading.Thread(target=work, args=(name,)) for name in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines == {name: [f"{name} {number}" for number in range(20)] for name in lines}


def test_the_application_decides_what_its_handlers_get(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogger("hasten").level
    with forward_log(lambda _line: None, lambda _now: None):
        logger.info("a detail")
        assert logging.getLogger("hasten").level == before
        with caplog.at_level(logging.INFO, "hasten"):
            logger.info("wanted")
            logger.debug("not wanted")
    assert [record.getMessage() for record in caplog.records] == ["wanted"]


def ended(program: str, *arguments: str, cwd: Path | None = None) -> tuple[str, str]:
    """What a Python program printed to stdout and stderr, the libraries' verbosity unset."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=LOUD,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


def test_the_environment_decides_before_us(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = VERBOSITY
    for name in VERBOSITY:
        monkeypatch.setenv(name, "info")
    monkeypatch.delenv(ours)
    quiet_libraries(debug=True)
    assert (os.environ[ours], os.environ[theirs]) == ("warning", "info")
    quiet_libraries()
    assert (os.environ[ours], os.environ[theirs]) == ("warning", "info")


def test_importing_hasten_silences_nothing() -> None:
    program = """
import logging, os, warnings
import torch, diffusers, transformers
before = dict(os.environ), list(warnings.filters), logging.getLogger("diffusers").level
import hasten, hasten.apply, hasten.cli, hasten.benchmark.row, hasten.models.load
assert before == (dict(os.environ), warnings.filters, logging.getLogger("diffusers").level)
"""
    ended(program)


GENERATE = "import sys; from hasten.cli import main; sys.exit(main(['generate', *sys.argv[1:]]))"


def test_generate_prints_its_own_lines_only(saved_model: Path, tmp_path: Path) -> None:
    # float16 on a CPU is what Diffusers warns of, four times.
    options = ("--model", str(saved_model), "--dtype", "float16", "--device", "cpu")
    out, err = ended(GENERATE, "a red kite", *options, cwd=tmp_path)
    assert out.startswith("hasten.png: 32x32, recipe cache")
    assert len(out.splitlines()) == 1
    assert err == ""


def test_words_that_were_cut_off_are_still_named(saved_model: Path, tmp_path: Path) -> None:
    prompt = "red kite " * 6  # 12 tokens, of which the model's defaults take 8
    _, err = ended(GENERATE, prompt, "--model", str(saved_model), "--device", "cpu", cwd=tmp_path)
    assert len(err.splitlines()) == 1
    assert "truncated because `max_sequence_length`" in err


IMPORTS = {
    "a command": "from hasten.cli import main; main(['recipes', 'list'])",
    "a model": """
from contextlib import suppress
from hasten import load_pipeline
with suppress(Exception):
    load_pipeline("./no such model")
""",
    "an export": "from hasten.engines.tensorrt.packages import needed; needed('onnx')",
}


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("program", IMPORTS.values(), ids=IMPORTS)
def test_no_process_of_hasten_contacts_anyone(program: str, tmp_path: Path) -> None:
    """As it comes, onnxruntime resolves its vendor's name and keeps an identifier of the device."""
    pytest.importorskip("onnxruntime")
    trace = tmp_path / "trace"
    command = ["strace", "-f", "--seccomp-bpf", "-e", "trace=network,openat", "-o", str(trace)]
    imports = "import onnxruntime, time; time.sleep(0.5)"
    done = subprocess.run(
        [*command, sys.executable, "-c", f"{program}\n{imports}"],
        env={**LOUD, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("processes cannot be traced here")
    assert done.returncode == 0, done.stderr
    opened = trace.read_text()
    assert "onnxruntime_pybind11_state" in opened
    for part in ("AF_INET", "resolv.conf", "DeveloperTools"):
        assert part not in opened
    assert {path.name for path in tmp_path.iterdir()} == {"trace"}


def test_a_choice_about_telemetry_that_was_made_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    disable_telemetry()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
