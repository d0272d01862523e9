"""Damage at random, from a fixed seed: nothing is accepted that is not what was written.

Every fault is one of hasten's own errors, no file outside of the folder is read, nothing hangs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.engines.load import read_export
from hasten.engines.tensorrt.files import AMAX, DATA, ENGINE, GRAPH
from hasten.engines.tensorrt.folder import finished, remember
from hasten.engines.tensorrt.keys import content_key
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest
from hasten.engines.tensorrt.store import RECORD, StageStore
from hasten.errors import HastenError
from hasten.recipe import Engine
from hasten.sealed import DamagedError, seal, unseal
from tests.engines.tensorrt.test_folder import Source

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(120)]

SEED = 13
ODD = (None, True, -1, 0, 1.5, 1e308, 10**40, "", "x", "../x", "/dev/zero", "a\0b", [], {}, [[]])
WORDS = (b"", b"0", b"9" * 5000, b"[" * 10**4, b"\0", b"\xff", b'"', b"{}", b"null", b"NaN", b",")


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, doubled or replaced in one place."""
    at, to = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    flipped = bytes([content[min(at, len(content) - 1)] ^ 1 << rng.randrange(8)])
    return rng.choice(
        (
            content[:at] + flipped + content[at + 1 :],
            content[:at],
            content[:at] + content[to:],
            content[:to] + content[at:],
            content[:at] + rng.choice(WORDS) + content[at:],
            content[:at] + rng.choice(WORDS) + content[to:],
        )
    )


def damaged_value(value: Any, rng: random.Random) -> Any:
    """JSON with one value somewhere in it exchanged, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kept = {name: inner for name, inner in value.items() if name != key}
        if rng.random() < 0.1:
            return kept
        if rng.random() < 0.1:
            return {**value, rng.choice(("x", "../x", "/dev/zero", "a\0b")): value[key]}
        return {**value, key: damaged_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_outside(path: Path) -> None:
    """The same content, but not in the folder."""
    outside = path.parent.parent / f"outside-{path.name}"
    shutil.copyfile(path, outside)
    path.unlink()
    path.symlink_to(outside)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


REPLACED: tuple[Callable[[Path], None], ...] = (
    Path.unlink,
    replace_by_link,
    replace_by_outside,
    replace_by_pipe,
    replace_by_folder,
)


def damage_file(path: Path, rng: random.Random) -> None:
    """Other bytes at the path, or something else than a file; never what was there."""
    if rng.random() < 0.4:
        rng.choice(REPLACED)(path)
        return
    content = before = path.read_bytes()
    while content == before:
        content = damaged_bytes(before, rng)
    path.write_bytes(content)


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return Source(tmp_path / "source", "model", GRAPH, DATA, ENGINE, AMAX).write(tmp_path / "out")


def accepted(folder: Path) -> Manifest | None:
    """The export in a folder, checked as `optimize` does before it compares the weights."""
    recipe = Engine(kind="tensorrt", precision="fp8", path=str(folder))
    refused: HastenError | None = None
    try:
        manifest = read_export(recipe, "sm89")
    except HastenError as error:
        refused = error
    if refused is not None:
        assert refused.fix
        assert all(0 < len(fault) < 1000 and "\n" not in fault for fault in refused.faults)
        return None
    return manifest if manifest.damaged(folder) == {} else None


def test_manifests(export: Path) -> None:
    rng, whole = random.Random(SEED), accepted(export)
    assert whole is not None
    content, text = unseal(whole.text()), whole.text().encode()
    for _ in range(3000):
        changed = damaged_value(content, rng)
        edited = json.dumps({**changed, "sha256": "0" * 64}) if isinstance(changed, dict) else "1"
        for damaged in (damaged_bytes(text, rng), edited.encode()):
            (export / MANIFEST).write_bytes(damaged)
            assert accepted(export) in (None, whole), damaged


def test_manifests_that_were_sealed_again(export: Path) -> None:
    """A checksum keeps no one from another manifest, but its files are still those of an export."""
    rng = random.Random(SEED)
    content = unseal((export / MANIFEST).read_text())
    for _ in range(3000):
        changed = damaged_value(content, rng)
        (export / MANIFEST).write_text(seal(changed if isinstance(changed, dict) else {}))
        found = accepted(export)
        assert found is None or set(found.files) == {GRAPH, DATA, ENGINE, AMAX}
        assert found is None or found.model_dump(mode="json")["files"] == content["files"]


def test_folders(export: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for number in range(300):
        folder = tmp_path / str(number)
        shutil.copytree(export, folder)
        damage_file(folder / rng.choice(sorted(path.name for path in folder.iterdir())), rng)
        found = accepted(folder)
        if found is not None:  # another text of the same manifest
            assert found.model_copy(update={"folder": export}) == Manifest.read(export)


def test_requests(export: Path, tmp_path: Path) -> None:
    rng, store = random.Random(SEED), StageStore(tmp_path / "memo")
    whole = Manifest.read(export)
    for _ in range(300):
        remember(store, "key", export, whole)
        damage_file(store.root / "finished" / "key.json", rng)
        assert finished(store, "key", export) in (None, whole)
        shutil.rmtree(store.root)


def make(folder: Path) -> dict[str, Any]:
    (folder / "inner").mkdir()
    (folder / "inner" / "graph").write_bytes(b"weights" * 100)
    (folder / "engine").write_bytes(b"engine" * 100)
    return {"peak_bytes": 7}


def test_stages(tmp_path: Path) -> None:
    rng, store, key = random.Random(SEED), StageStore(tmp_path / "store"), content_key({})
    first = store.stage("export", key, make)
    record = (first.folder / RECORD).read_text()
    for _ in range(300):
        name = rng.choice((RECORD, "engine", "inner/graph"))
        if rng.random() < 0.3:
            changed = damaged_value(unseal(record), rng)
            (first.folder / RECORD).write_text(seal(changed if isinstance(changed, dict) else {}))
        else:
            damage_file(first.folder / name, rng)
        after = store.stage("export", key, make)
        for kept in after.files:
            assert (after.folder / kept).is_relative_to(store.root)
            assert (after.folder / kept).read_bytes() == (
                b"engine" * 100 if kept == "engine" else b"weights" * 100
            )
        shutil.rmtree(after.folder)
        store.stage("export", key, make)


def test_the_damage_is_damage() -> None:
    rng, text = random.Random(SEED), seal({"a": [1, {"b": "text"}], "c": None}).encode()
    refused = 0
    for _ in range(1000):
        try:
            unseal(damaged_bytes(text, rng))
        except DamagedError:
            refused += 1
    assert refused > 800
