"""Damaged recipes and prompt files are read, or refused with lines that can be printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.cli import main
from hasten.prompts import read_prompts
from hasten.recipe import preset_names, resolve
from tests.fuzz.damage import damaged, refused_well

pytestmark = pytest.mark.fuzz

TOML_PIECES = [
    b"[" * 3000, b"{a=" * 3000, b"[[" * 50 + b"a" + b"]]" * 50, b"a.b.c.d.e.f.g.h.i.j = 1\n",
    b"9" * 5000, b"9" * 400, b"-" + b"9" * 30, b"0x" + b"f" * 9000, b"1e400", b"inf", b"nan",
    b"1979-05-27T07:32:00Z", b'"\\u001b[2J"', b'"\\u0000"', b'"' + b"x" * 100_000 + b'"',
    b"k" * 100_000 + b" = 1\n", b'"\\u001b" = 1\n', b"\xef\xbb\xbf", b"\x00", b"\xff", b"\x1b",
    b'[engine]\npath = "\\u0000"\n', b'["a", [["b"]]]', b"true", b"{}", b"[]", b"-1e-400",
    b"[quantize.amax]\n'\\' = 9223372036854775807\n",
    b"".join(b"k%d = 1\n" % i for i in range(999)),
    b"[cache]\nkind = 'schedule'\nsteps = 2\ncompute = [0, 1]\nweights = [[1e300], [-1e30]]\n",
]  # fmt: skip
PROMPT_PIECES = [
    b"\x00", b"\x1b[31m", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b'""', b"\r", b"\n", b",", b"\t",
    b"x" * 200_000, b"[" * 3000, b"{", b"9" * 5000, b"\\ud800", b"null", b"\xed\xa0\x80",
]  # fmt: skip
PROMPTS = {
    ".txt": "a red kite\n# no prompt\nein Drache für zwei\n",
    ".csv": 'Prompt,Category\n"a red kite, flying",sky\n"two\nlines",x\n',
    ".tsv": "Category\tprompts\nsky\ta red kite\n",
    ".jsonl": '{"prompt": "a red kite"}\n{"id": 1, "Prompt": "zwei Drachen"}\n"a dog"\n',
}


def preset(name: str) -> bytes:
    return resolve(name).to_toml().encode()


@pytest.mark.parametrize("name", preset_names())
def test_recipes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    refused = 0
    for content in damaged(preset(name), TOML_PIECES, 500):
        path.write_bytes(content)
        refused += refused_well(resolve, path)
    assert refused > 200


def test_the_command_says_what_is_wrong_with_a_recipe(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    for content in damaged(preset("balanced"), TOML_PIECES, 60):
        path.write_bytes(content)
        code = main(["recipes", "check", str(path), "--schema-only"])
        out, err = capfd.readouterr()
        assert code in (0, 2), err
        assert "unexpected" not in err
        assert all(len(line) < 420 for line in (out + err).splitlines() if "fix:" not in line)


@pytest.mark.parametrize("suffix", PROMPTS)
def test_prompt_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"prompts{suffix}"
    read = 0
    for content in damaged(PROMPTS[suffix].encode(), PROMPT_PIECES, 1500):
        path.write_bytes(content)
        if not refused_well(read_prompts, path):
            read += 1
            for prompt in read_prompts(path):
                assert prompt.strip()
                assert not set(prompt) & set("\0\x1b\n\r\ufeff")
    assert read > 20


NAMES = ["aé", "x" * 65, "x" * 240, "my recipe", "-", "..", "紅", "~nosuchuser/a", "~", "\x1b[2J",
         "a\0b", "x" * 5000, "a/b", "con", "%s", "{}", "\udce9"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (resolve, read_prompts):
        for suffix in (".toml", ".txt", ".csv", ""):
            refused_well(read, name + suffix)  # there is no such file
            try:
                Path(name + suffix).write_text("[cache]\n" if read is resolve else "prompt\na dog")
            except (OSError, ValueError):
                continue
            refused_well(read, name + suffix)
