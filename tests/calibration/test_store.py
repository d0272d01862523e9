"""The store of a calibration: what it takes over, what it refuses, and who may use it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.calibration.store import CalibrationStore, Fitted, open_store, remove_store
from hasten.errors import InputError
from hasten.folder_lock import FolderLock
from tests.engines.tensorrt.test_store import files_up_to

KEY: dict[str, Any] = {"fingerprint": "0123456789abcdef", "seed": 3, "arguments": {"height": "a1"}}
TRIALS = [
    Fitted(0.125, (0, 3, 5), 2, ((1.0,), (1.5, -0.5), (0.75, 0.25))),
    Fitted(0.5, (0, 2, 4), 1, ((1.0,), (1.0,), (0.875,))),
    Fitted(0.25, (0, 2, 5), 2, ((1.0,), (1.25, -0.25), (1.0, 0.0))),
]


def recording(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "sigmas": torch.linspace(1, 0, 4, dtype=torch.float64),
        "velocities": torch.randn(3, 2, 5, generator=generator),
        "latents": torch.randn(4, 2, 5, generator=generator),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A calibration that was interrupted after two recordings and three trials."""
    folder = tmp_path / "schedule.toml.partial"
    store = CalibrationStore(folder, KEY)
    for number in range(2):
        store.keep_recording(number, recording(number))
    for trial in TRIALS:
        store.keep_trial(trial)
    return folder


def whole(recorded: dict[str, Tensor] | None, number: int) -> bool:
    """Whether exactly what was written came back."""
    wanted = recording(number)
    return (
        recorded is not None
        and recorded.keys() == wanted.keys()
        and all(
            torch.equal(recorded[name], wanted[name]) and recorded[name].dtype == wanted[name].dtype
            for name in wanted
        )
    )


def test_what_was_kept_comes_back(folder: Path) -> None:
    store = CalibrationStore(folder, KEY)
    assert all(whole(store.recording(number), number) for number in range(2))
    assert store.recording(2) is None
    assert [store.trial(trial.path, trial.order) for trial in TRIALS] == TRIALS
    assert store.trial((0, 3, 5), 1) is None


def test_another_key_is_another_calibration(folder: Path) -> None:
    with pytest.raises(InputError, match="another calibration: it differs in seed") as caught:
        CalibrationStore(folder, KEY | {"seed": 4})
    assert f"delete {folder}" in caught.value.fix
    (folder / "calibration.json").unlink()
    with pytest.raises(InputError, match="the checksum differs"):
        CalibrationStore(folder, KEY | {"seed": 4}).recording(0)


def test_a_recording_is_of_its_own_batch(folder: Path) -> None:
    shutil.copy(folder / "recording-0001.safetensors", folder / "recording-0000.safetensors")
    with pytest.raises(InputError, match="recording-0000"):
        CalibrationStore(folder, KEY).recording(0)


def edit_trial(folder: Path) -> None:
    path = folder / "calibration.json"
    path.write_text(path.read_text().replace("0.125", "0.124"))


def edit_values(folder: Path) -> None:
    path = folder / "recording-0000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_key(folder: Path) -> None:
    path = folder / "calibration.json"
    path.write_text(path.read_text().replace("0123", "3210"))


def cut_recording(folder: Path) -> None:
    path = folder / "recording-0000.safetensors"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (edit_trial, "calibration.json"),
        (edit_values, "recording-0000.safetensors"),
        (cut_recording, "recording-0000.safetensors"),
        (edit_key, "calibration.json"),
    ],
)
def test_damage_is_named_and_its_fix_works(
    folder: Path, damage: Callable[[Path], None], name: str
) -> None:
    damage(folder)
    with pytest.raises(InputError) as caught:
        CalibrationStore(folder, KEY).recording(0)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{folder / name}: ")
    assert caught.value.fix.startswith(f"delete {folder / name}: ")
    (folder / name).unlink()
    assert whole(CalibrationStore(folder, KEY).recording(1), 1)


def test_one_process_per_folder(folder: Path) -> None:
    with open_store(folder, KEY):
        with pytest.raises(InputError, match="another hasten process"), open_store(folder, KEY):
            pass
        with pytest.raises(InputError, match="another hasten process"):
            remove_store(folder)
        with pytest.raises(InputError, match="another hasten process"), FolderLock(folder):
            pass
    with open_store(folder, KEY) as store:
        assert store.trial(TRIALS[0].path, 2) == TRIALS[0]


def test_nothing_of_a_store_is_left(folder: Path) -> None:
    (folder / ".calibration.json.00.hasten-tmp").write_text("half")
    with open_store(folder, KEY):
        pass
    remove_store(folder)
    assert not folder.exists()
    remove_store(folder)


def test_files_of_others_are_left(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    remove_store(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_one_line_and_loses_nothing(folder: Path) -> None:
    store = CalibrationStore(folder, KEY)
    another = Fitted(0.75, (0, 1, 2), 1, ((1.0,),) * 3)
    with files_up_to((folder / "calibration.json").stat().st_size + 10):
        with pytest.raises(InputError, match="cannot be used"):
            store.keep_recording(2, {"velocities": torch.zeros(1000)})
        with pytest.raises(InputError, match=r"calibration\.json: cannot be used: File too large"):
            store.keep_trial(another)
    again = CalibrationStore(folder, KEY)
    assert again.recording(2) is None
    assert again.trial(another.path, 1) is None
    assert again.trial(TRIALS[2].path, 2) == TRIALS[2]


def test_a_folder_that_vanishes_is_one_line(folder: Path) -> None:
    store = CalibrationStore(folder, KEY)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="cannot be used: No such file"):
        store.keep_recording(2, recording(2))
    with pytest.raises(InputError, match="cannot be used: No such file"):
        store.keep_trial(TRIALS[0])


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(InputError, match="cannot be used: File exists"), open_store(place, KEY):
        pass


SPICE = (b"{", b"}", b'"', b"[" * 3000, b"null", b"1e999", b"-1", b"\xff\xfe", b"\x00", b"\n")


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or replaced."""
    place, length = chance.randrange(len(content)), chance.randrange(1, 12)
    rest = content[place + length :]
    return chance.choice(
        (
            content[:place]
            + bytes([content[place] ^ 1 << chance.randrange(8)])
            + content[place + 1 :],
            content[:place],
            content[:place] + rest,
            content[: place + length] + content[place:],
            content[:place] + chance.choice(SPICE) + rest,
            content[:place] + str(chance.randrange(10 ** chance.randrange(1, 30))).encode() + rest,
            b"",
            chance.randbytes(length * 20),
        )
    )


def edited(content: bytes, chance: random.Random) -> bytes:
    """A number or a name of JSON text changed so that it remains JSON."""
    value = json.loads(content)
    part = chance.choice((value, value["key"], value["trials"]))
    name = chance.choice(sorted(part) if isinstance(part, dict) else range(len(part)))
    part[name] = chance.choice((None, 0, -1.5, "x", [], {}, [[]], True, [0, 1], 10**400))
    if chance.random() < 0.2:
        del part[name]
    return json.dumps(value).encode()


DTYPES = ("BOOL", "U8", "I64", "F16", "BF16", "F64", "F8_E4M3", "F4", "C64", "I128", "")


def edited_header(content: bytes, chance: random.Random) -> bytes:
    """A recording whose tensors, or what is said of them, are others."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = chance.choice(sorted(header))
    about = header[name]
    key = chance.choice(sorted(about))
    if chance.random() < 0.3:
        header[f"{name}2"] = header.pop(name)
    elif key == "dtype":
        about[key] = chance.choice(DTYPES)
    elif key in ("shape", "data_offsets"):
        about[key] = chance.choice(([], [0], [1, 2], [10**18, 4], [-1], about[key][::-1], None))
    else:
        about[key] = chance.choice(("", "0" * 64, None, 3))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("calibration.json", damaged),
        ("calibration.json", edited),
        ("recording-0000.safetensors", damaged),
        ("recording-0000.safetensors", edited_header),
    ],
)
def test_nothing_is_taken_over_that_was_not_written(
    folder: Path, name: str, change: Callable[[bytes, random.Random], bytes]
) -> None:
    chance, tries = random.Random(20261127), 2000
    path = folder / name
    original = path.read_bytes()
    written = {(trial.path, trial.order): trial for trial in TRIALS}
    faults = []
    for _ in range(tries):
        path.write_bytes(change(original, chance))
        try:
            store = CalibrationStore(folder, KEY)
            recorded = store.recording(0)
        except InputError as error:
            faults += error.faults
        else:
            assert whole(recorded, 0)
            assert store._trials.items() <= written.items()
        path.write_bytes(original)
    assert tries // 2 < len(faults) <= tries
    assert all("\n" not in fault and len(fault) < 400 for fault in faults)
