"""The program as a whole: help, version, start-up time, and how it ends."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import hasten
from hasten.cli.options import CALL
from hasten.cli.terminal import print_line, print_table, print_text
from hasten.settings import CallOptions
from tests.cli.conftest import Run

COMMANDS = (
    "generate", "bench", "calibrate", "calibrate-scales", "layers", "recipes", "doctor", "export",
)  # fmt: skip
PROGRAM = [sys.executable, "-c", "import sys; from hasten.cli import main; sys.exit(main())"]


def test_help_names_every_command(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0
    assert ended.err == ""
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", ended.out, re.M)


def test_no_command_prints_the_help(run: Run) -> None:
    assert run() == run("--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_without_torch(run: Run, command: str) -> None:
    ended = run(command, "--help")
    assert ended.code == 0
    assert f"hasten {command}" in ended.out


def test_the_options_of_a_call_are_those_of_the_library() -> None:
    assert {name: default for name, (_, default) in CALL.items()} == asdict(CallOptions())


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"hasten {hasten.__version__}\n", "")


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    """Under 0.3 s of the processor (of the clock it would be other work's too), best of three."""
    code = (
        "import sys\n"
        "from hasten.cli import main\n"
        "main(['--help'])\n"
        "heavy = {'torch', 'pydantic', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(heavy)) or 0)\n"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # of the children, user and system
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.3


def test_a_bug_is_one_line_without_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr("hasten.recipe.preset_names", broken)
    ended = run("recipes", "list")
    assert ended.code == 1
    assert ended.err.splitlines() == [
        "error: unexpected ValueError: first line",
        "fix: run again with --debug for the traceback and report it",
    ]
    shown = run("recipes", "list", "--debug")
    assert shown.code == 1
    assert "Traceback (most recent call last)" in shown.err
    assert shown.errors == ended.errors


def test_debug_shows_where_a_deliberate_error_came_from(run: Run) -> None:
    ended = run("recipes", "show", "nonesuch", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert ended.errors == ["error: no preset is called 'nonesuch'"]


def raising(error: BaseException) -> object:
    def preset_names() -> list[str]:
        raise error

    return preset_names


def test_ctrl_c_is_130_and_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.recipe.preset_names", raising(KeyboardInterrupt()))
    assert run("recipes", "list") == (130, "", "error: interrupted\n")


def out_of_memory() -> list[BaseException]:
    import torch

    message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."
    return [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError(message),
    ]


@pytest.mark.parametrize("error", out_of_memory(), ids=lambda error: type(error).__name__)
def test_out_of_memory_says_what_to_try(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("hasten.recipe.preset_names", raising(error))
    ended = run("recipes", "list")
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 2
    assert ended.errors[0].startswith("error: out of memory")
    assert "--size" in ended.fixes[0]
    assert "[offload]" in ended.fixes[0]


def test_control_characters_do_not_reach_the_terminal(run: Run) -> None:
    ended = run("recipes", "show", "\x1b[31mred\x07\n.toml")
    assert ended.code == 2
    assert "\x1b" not in ended.err
    assert "\x07" not in ended.err
    assert len(ended.errors) == len(ended.fixes) == 1


def test_output_into_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [*PROGRAM, "recipes", "schema"], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b""


def on_a_terminal(program: list[str], **environment: str) -> str:
    """What a program prints to a terminal."""
    outer, inner = pty.openpty()
    with os.fdopen(outer, "rb", buffering=0) as screen:
        child = subprocess.Popen(
            program,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "TERM": "xterm-256color", **environment},
        )
        os.close(inner)
        shown = b""
        try:
            while chunk := screen.read(4096):
                shown += chunk
        except OSError:  # how Linux says that the other side was closed
            pass
        assert child.wait() == 0
    return shown.decode()


def test_a_narrow_terminal_folds_and_no_color_is_respected() -> None:
    shown = on_a_terminal([*PROGRAM, "recipes", "list"], COLUMNS="40", NO_COLOR="1")
    lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 40
    assert "cache-compile" in shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)


def test_a_pipe_gets_whole_lines_without_escapes(run: Run) -> None:
    ended = run("recipes", "list")
    assert "\x1b" not in ended.out
    assert len([line for line in ended.out.splitlines() if line.startswith("cache ")]) == 1


PROGRESS = """
from hasten.cli.terminal import ProgressBar
with ProgressBar() as progress:
    progress.stage("loading")
    progress.stage("steps", total=4)
    progress.at(3)
    progress.show("row 2: time", 1, 8)
print("done")
"""


def test_progress_is_shown_on_a_terminal_and_leaves_nothing() -> None:
    shown = on_a_terminal([sys.executable, "-c", PROGRESS], NO_COLOR="1", COLUMNS="60")
    assert "row 2: time 1/8" in shown
    before, _, after = shown.rpartition("\x1b[2K")  # the line of the bar is erased
    assert "row 2" in before
    assert after.strip() == "done"


def test_no_progress_in_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRESS],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FORCE_COLOR": "1"},
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_in_any_code_page(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "mine.toml").write_text('description = "für 紅 → ×"\n')
    done = subprocess.run(
        [*PROGRAM, "recipes", "show", "mine.toml"],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    expected = 'description = "für 紅 → ×"'.encode(encoding, "backslashreplace")
    assert expected in done.stdout.splitlines()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(tmp_path: Path, closed: str) -> None:
    code = "from hasten.cli import main; raise SystemExit(main(['recipes', 'list']))"
    command = ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_onto_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, "recipes", "list"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "error: No space left on device",
        "fix: free some disk space, then run again",
    ]


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (
            OSError(28, "No space left on device", "out/a"),
            ["error: out/a: No space left on device", "fix: free some disk space, then run again"],
        ),
        (
            PermissionError(13, "Permission denied", "a\x1b"),
            [
                "error: a : Permission denied",
                "fix: check that it can be read and written, then run again",
            ],
        ),
    ],
    ids=["full", "forbidden"],
)
def test_faults_of_the_system_are_no_bugs(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: OSError, lines: list[str]
) -> None:
    monkeypatch.setattr("hasten.recipe.preset_names", raising(error))
    ended = run("recipes", "list")
    assert ended.code == 1
    assert ended.err.splitlines() == lines


def test_no_text_of_a_file_controls_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[2Jb\x07\x9b"
    print_text(f"{evil}\n  {evil}")
    print_line(evil)
    print_table(("title",), [(evil,)])
    out, err = capfd.readouterr()
    assert out.splitlines()[:2] == ["a [2Jb  ", "  a [2Jb  "]
    assert err == "a [2Jb  \n"
    assert not set(out + err) & set("\x1b\x07\x9b")


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_table_in_a_terminal_is_as_wide_as_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    row = ("tensorrt-fp8", "1.2 GiB", "a TensorRT engine with FP8 linears " * 3)
    dropped = print_table(("recipe", "peak memory", "what it does"), [row], right=" r")
    lines = capsys.readouterr().out.splitlines()
    assert dropped == []
    assert max(map(len, lines)) <= columns
    assert {word for line in lines for word in line.split()} <= {
        *" ".join(row).split(), "recipe", "peak", "memory", "what", "it", "does", lines[1]
    }  # fmt: skip


def test_a_word_longer_than_the_terminal_is_all_that_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    print_table(("file", "why"), [("/a" * 20, "not there")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 30
    assert "not" in lines[1].split()
    print_text("  in words, " * 5)
    assert {line[:2] for line in capsys.readouterr().out.splitlines()} == {"  "}
