"""Prompt sets: what a file may look like, and what is refused with which words."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import InputError
from hasten.prompts import check_prompt, read_prompts


@pytest.fixture
def five(tmp_path: Path) -> Path:
    path = tmp_path / "five.txt"
    path.write_bytes("\ufeff# title\n\none\r\ntwo  \n  three\n# not me\nvier ü\nfive".encode())
    return path


def test_comments_blanks_byte_order_mark_and_carriage_returns_go(five: Path) -> None:
    assert read_prompts(five) == ["one", "two", "three", "vier ü", "five"]
    assert read_prompts(str(five)) == read_prompts(five)


@pytest.mark.parametrize(
    ("last", "limit", "expected"),
    [
        (2, None, ["vier ü", "five"]),
        (None, 2, ["one", "two"]),
        (3, 2, ["three", "vier ü"]),
        (99, 99, ["one", "two", "three", "vier ü", "five"]),
    ],
)
def test_last_then_limit(
    five: Path, last: int | None, limit: int | None, expected: list[str]
) -> None:
    assert read_prompts(five, last=last, limit=limit) == expected


@settings(deadline=None)  # other work on the machine is no failure
@given(last=st.integers(1, 60), limit=st.integers(1, 60))
def test_a_selection_is_a_run_of_the_whole_set(last: int, limit: int) -> None:
    whole = read_prompts("general")
    part = read_prompts("general", last=last, limit=limit)
    assert len(part) == min(last, limit, len(whole))
    start = max(0, len(whole) - last)
    assert part == whole[start : start + len(part)]


def test_a_separator_inside_a_prompt_does_not_split_it(tmp_path: Path) -> None:
    path = tmp_path / "odd.txt"
    path.write_text("a\u2028b\x0cc\nd", "utf-8")
    assert read_prompts(path) == ["a\u2028b\x0cc", "d"]


def test_general_has_fifty_distinct_short_enough_prompts() -> None:
    prompts = read_prompts("general")
    assert len(prompts) == len(set(prompts)) == 50
    assert all(20 < len(prompt) < 200 for prompt in prompts)


def test_tiny_is_bundled_too() -> None:
    prompts = read_prompts("tiny", limit=50)
    assert len(prompts) == len(set(prompts)) == 50


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no prompts"),
        (b"\n# only a comment\n   \n", "no prompts"),
        (b"ok\n\xff\xfe", "not UTF-8"),
        (None, "no such file"),
        ("directory", "directory"),
    ],
)
def test_a_bad_file_is_one_fault_and_one_fix(
    tmp_path: Path, content: bytes | str | None, word: str
) -> None:
    path = tmp_path / "prompts.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(InputError, match=word) as caught:
        read_prompts(path)
    assert len(caught.value.faults) == 1
    assert str(path) in caught.value.faults[0]
    assert caught.value.fix
    assert "\n" not in caught.value.fix


def test_all_faults_come_at_once() -> None:
    with pytest.raises(InputError) as caught:
        read_prompts("nowhere.txt", last=0, limit=-3)
    assert [fault.split()[0] for fault in caught.value.faults] == ["last", "limit", "nowhere.txt:"]


def test_a_path_that_no_system_takes_is_an_input_error() -> None:
    with pytest.raises(InputError):
        read_prompts("a\0b")
    with pytest.raises(InputError):
        read_prompts("x" * 5000)


def test_reading_prompts_imports_no_torch() -> None:
    code = (
        "import sys, hasten.prompts as p; p.read_prompts('general'); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("set.csv", 'Prompts,Category\n"a red car, parked",Colors\na wine glass,Positional\n'),
        ("set.tsv", "Category\tPROMPT\nColors\ta red car, parked\n\nPositional\ta wine glass\n"),
        ("set.jsonl", '{"id": 1, "prompt": "a red car, parked"}\n\n{"Prompts": "a wine glass"}\n'),
        ("set.NDJSON", '"a red car, parked"\r\n{"prompt": "a wine glass"}'),
        ("lines.csv", '\ufeffprompt\r\n"a red car,\r\n  parked"\r\na wine glass\r\n'),
        ("old-mac.txt", "a red car, parked\ra wine glass\r"),
        ("joined.txt", "a red car, parked\n\ufeffa wine glass"),
    ],
)
def test_formats_in_which_prompts_are_published(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read_prompts(path) == ["a red car, parked", "a wine glass"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("set.json", '["a"]', "cannot be read from .json files"),
        ("set.yaml", "a: b", "cannot be read from .yaml files"),
        ("set.csv", "text,id\na,1\n", "the columns are text, id; one must be named prompt"),
        ("set.csv", "prompt,Prompt\na,b\n", "one must be named prompt"),
        (
            "set.csv",
            "prompt,id\na red car, parked,1\n",
            "line 2 has 3 columns",
        ),
        ("set.csv", 'prompt\n"a red car\nand so on\n', "unexpected end of data"),
        ("set.csv", "prompt\n\n", "the file has no prompts"),
        ("set.csv", "", "one must be named prompt"),
        ("set.jsonl", '{"prompt": "a"}\n{"caption": "b"}\n', "line 2 has no text under the key"),
        ("set.jsonl", '{"prompt": 3}\n', "line 1 has no text under the key"),
        ("set.jsonl", '{"prompt": "a"\n', "line 1: it is not valid JSON"),
        ("set.jsonl", "[" * 100_000, "line 1: it is nested too deeply"),
        ("set.txt", "a\nb\x1b[2J\n", "prompt 2 contains the control character U\\+001B"),
        ("set.txt", "a\0\n", "prompt 1 contains the control character U\\+0000"),
        ("set.jsonl", '"\\ud800"', "prompt 1 contains the control character U\\+D800"),
    ],
)
def test_formats_that_are_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        read_prompts(path)
    assert len(caught.value.faults) == 1
    assert caught.value.fix


@settings(deadline=None)
@given(prompts=st.lists(st.text("ab,\"'\t #äé", min_size=1).filter(str.strip), min_size=1))
def test_a_table_holds_what_was_written_into_it(
    prompts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (folder / f"law{suffix}").open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["prompt"], *([p] for p in prompts)])
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (folder / "law.jsonl").write_text("\n".join(lines))
    for suffix in (".csv", ".tsv", ".jsonl"):
        assert read_prompts(folder / f"law{suffix}") == [prompt.strip() for prompt in prompts]


@pytest.mark.parametrize("prompt", ["", " \n", "caf\udce9", "a\x1b[2J", "a\0"])
def test_prompts_that_are_not_drawn(prompt: str) -> None:
    with pytest.raises(InputError, match="the prompt"):
        check_prompt(prompt)
    check_prompt("ein roter Drache, 紅色風箏 🪁\nat dusk")
