"""Bad input to the commands that render: one line a fault, one fix, nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ended, Run

GENERATE = ("generate", "a red kite")
BENCH = ("bench", "--limit", "1")


def files_below(directory: Path) -> set[str]:
    """Every file but a benchmark's bookkeeping and logs, which say why a model did not load."""
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith(("out/logs/", "out/."))}


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., Ended]:
    """Run a command that must be refused: its form is checked here, its words in the test."""

    def command(*arguments: object, code: int, faults: int = 1) -> Ended:
        before = files_below(tmp_path)
        ended = run(*arguments)
        assert ended.code == code, ended.err
        assert ended.out == ""
        assert len(ended.errors) == faults, ended.err
        lines = ended.err.splitlines()
        assert sorted(lines) == sorted({*ended.errors, *ended.fixes}), ended.err
        assert lines[0] == ended.errors[0]
        assert lines[-1] == ended.fixes[-1]
        assert files_below(tmp_path) == before
        return ended

    return command


Refused = Callable[..., Ended]
both = pytest.mark.parametrize(
    ("command", "recipe"), [(GENERATE, "--recipe"), (BENCH, "--recipes")], ids=["generate", "bench"]
)


@both
def test_unknown_preset(refused: Refused, command: tuple[str, ...], recipe: str) -> None:
    ended = refused(*command, recipe, "cahce", code=2)
    assert "cahce" in ended.errors[0]
    assert "did you mean 'cache'?" in ended.fixes[0]


@both
@pytest.mark.parametrize(
    ("toml", "offenders"),
    [
        ("[cache]\nintervall = 2\n", ["cache.intervall"]),
        ("[cache]\ninterval = 0\n", ["cache.interval = 0"]),
        ("[cache]\ninterval = 0\n[compile]\nmode = 'fast'\n", ["cache.interval", "compile.mode"]),
        ("[cache\n", ["not valid TOML"]),
        ("[cache]\nstart_step = 9\nend_step = 3\n", ["end_step = 3 is before start_step = 9"]),
    ],
    ids=["unknown key", "bad value", "two faults", "not TOML", "contradiction"],
)
def test_bad_recipe_file(
    refused: Refused,
    tmp_path: Path,
    command: tuple[str, ...],
    recipe: str,
    toml: str,
    offenders: list[str],
) -> None:
    (tmp_path / "mine.toml").write_text(toml)
    ended = refused(*command, recipe, "mine.toml", code=2, faults=len(offenders))
    for offender, line in zip(offenders, ended.errors, strict=True):
        assert "mine.toml" in line
        assert offender in line


@both
def test_missing_recipe_file(refused: Refused, command: tuple[str, ...], recipe: str) -> None:
    assert "nowhere.toml" in refused(*command, recipe, "nowhere.toml", code=2).errors[0]


@both
def test_missing_model_directory(
    refused: Refused, command: tuple[str, ...], recipe: str, tmp_path: Path
) -> None:
    ended = refused(*command, "--model", tmp_path / "nowhere", code=1)
    assert "nowhere: no such model directory" in ended.errors[0]


@both
def test_a_directory_that_is_no_model(
    refused: Refused, command: tuple[str, ...], recipe: str, tmp_path: Path
) -> None:
    assert "no model_index.json" in refused(*command, "--model", tmp_path, code=1).errors[0]


@both
def test_an_unknown_shape(refused: Refused, command: tuple[str, ...], recipe: str) -> None:
    ended = refused(*command, "--model", "shape:flux.9", code=2)
    assert "'flux.9'" in ended.errors[0]
    assert "shape:flux.1-dev" in ended.fixes[0]


@both
def test_a_model_that_cannot_be_is_refused_without_torch(
    command: tuple[str, ...], recipe: str, tmp_path: Path
) -> None:
    program = (
        "import subprocess, sys\n"
        "subprocess.Popen = None  # nothing may be started\n"
        "from hasten.cli import main\n"
        f"code = main({[*command, '--model', '/nope']})\n"
        "sys.exit(3 if {'torch', 'diffusers'} & set(sys.modules) else code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "error: /nope: no such model directory" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def truncated_model(tmp_path: Path, saved_model: Path) -> Path:
    """A model directory in which the transformer's weights end early."""
    directory = tmp_path / "model"
    shutil.copytree(saved_model, directory)
    weights = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return directory


@both
def test_truncated_weights(
    refused: Refused, command: tuple[str, ...], recipe: str, truncated_model: Path
) -> None:
    ended = refused(*command, recipe, "baseline", "--model", truncated_model, code=1)
    assert "truncated or corrupt" in ended.errors[0]
    assert ".safetensors" in ended.fixes[0]


@both
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "abc"), "'abc' is not WIDTHxHEIGHT"),
        (("--size", "100x128"), "width 100 is not a multiple of 16"),
        (("--steps", "0"), "steps = 0 is not a whole number from 1 to 1000"),
        (("--steps", "many"), "--steps"),
        (("--guidance", "nan"), "guidance = nan"),
        (("--guidance", "-1"), "guidance = -1"),
        (("--seed", "-1"), "seed = -1"),
        (("--seed", str(2**63)), "seed = 9"),
        (("--max-sequence-length", "0"), "max_sequence_length = 0"),
        (("--dtype", "int3"), "int3"),
        (("--device", "toaster"), "'toaster' is not"),
        (("--nonesuch",), "--nonesuch"),
        (("--size",), "--size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_option(
    refused: Refused, command: tuple[str, ...], recipe: str, options: tuple[str, ...], words: str
) -> None:
    assert words in refused(*command, *options, code=2).errors[0]


@both
def test_faults_of_several_options_come_together(
    refused: Refused, command: tuple[str, ...], recipe: str
) -> None:
    given = ("--size", "100x20", "--steps", "0", "--seed", "-1", "--model", "/nope")
    given += ("--guidance", "-2", "--max-sequence-length", "999", "--dtype", "int3")
    ended = refused(*command, recipe, "nonesuch", *given, "--device", "toaster", code=2, faults=10)
    for words in ("nonesuch", "width 100", "height 20", "steps", "seed", "/nope: no such model"):
        assert sum(words in line for line in ended.errors) == 1
    sizes = "fix: the closest valid size is 96x16"
    lines = ended.err.splitlines()
    assert lines[lines.index(sizes) - 1].startswith("error: height 20 ")


def test_bench_adds_the_faults_of_its_own_options(refused: Refused) -> None:
    given = ("--limit", "0", "--last", "0", "--rounds", "0", "--reference", "nonesuch")
    ended = refused("bench", *given, "--model", "/nope", "--steps", "0", code=2, faults=6)
    for words in ("limit", "last", "rounds", "nonesuch", "/nope", "steps"):
        assert sum(words in line for line in ended.errors) == 1


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file/kite.png", "cannot be written: Not a directory"),
        ("/proc/kite.png", "/proc: cannot be written"),
        ("nowhere/kite.png", "nowhere: no such directory"),
        (".", "not a .png file name"),
        ("kite.jpg", "not a .png file name"),
        ("folder.png", "a directory, not a file"),
    ],
)
def test_generate_refuses_unwritable_output_before_it_loads_a_model(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str, words: str
) -> None:
    monkeypatch.setattr("hasten.models.load_pipeline", lambda *_: pytest.fail("model loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert words in refused(*GENERATE, "--out", out, code=2).errors[0]


@pytest.mark.parametrize("out", ["file/below", "file", "/proc/bench"])
def test_bench_refuses_unwritable_output(refused: Refused, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    assert out.partition("/below")[0] in refused(*BENCH, "--out", out, code=2).errors[0]


@pytest.mark.parametrize("prompt", ["", "  \n", "caf\udce9"])
def test_generate_refuses_a_prompt_it_cannot_use(refused: Refused, prompt: str) -> None:
    assert "the prompt is" in refused("generate", prompt, code=2).errors[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no prompts"),
        (b"\n\n# only a comment\n", "no prompts"),
        ("café\n".encode("latin-1"), "not UTF-8"),
    ],
    ids=["empty", "blank", "latin-1"],
)
def test_bench_refuses_a_bad_file_of_prompts(
    refused: Refused, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert words in refused(*BENCH, "--prompts", "prompts.txt", code=2).errors[0]


@pytest.mark.parametrize("option", ["--limit", "--last", "--rounds"])
def test_bench_refuses_to_do_nothing(refused: Refused, option: str) -> None:
    assert option.removeprefix("--") in refused("bench", option, "0", code=2).errors[0]


def test_bench_refuses_a_reference_without_a_row(refused: Refused) -> None:
    ended = refused(*BENCH, "--recipes", "cache", "--reference", "compile", code=2)
    assert "compile" in ended.errors[0]


@pytest.mark.parametrize(
    ("arguments", "words", "fix"),
    [
        (("generate",), "Missing argument", "hasten generate --help"),
        (("genrate", "x"), "Did you mean 'generate'?", "hasten --help"),
        (("generate", "one", "two"), "two", "hasten generate --help"),
        (("--nonesuch",), "--nonesuch", "hasten --help"),
        (("recipes", "nonesuch"), "nonesuch", "hasten recipes --help"),
        (("recipes", "check"), "Missing argument", "hasten recipes check --help"),
    ],
)
def test_usage_errors_have_the_same_form(
    refused: Refused, arguments: tuple[str, ...], words: str, fix: str
) -> None:
    ended = refused(*arguments, code=2)
    assert words in ended.errors[0]
    assert fix in ended.fixes[0]


@both
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model", "~nosuchuser/m"),
        ("--out", "~nosuchuser/a.png"),
        ("--recipe", "~nosuchuser/a.toml"),
    ],
)
def test_the_home_of_a_user_that_does_not_exist(
    refused: Refused, command: tuple[str, ...], recipe: str, option: str, value: str
) -> None:
    ended = refused(*command, recipe if option == "--recipe" else option, value, code=2)
    assert "there is no home directory for ~nosuchuser" in ended.errors[0]


def test_the_fix_for_a_missing_directory_works_in_a_shell(refused: Refused, tmp_path: Path) -> None:
    ended = refused(*GENERATE, "--out", "-my; 'pictures/a.png", code=2)
    assert "no such directory" in ended.errors[0]
    subprocess.run(ended.fixes[0].removeprefix("fix: "), shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "-my; 'pictures").is_dir()
