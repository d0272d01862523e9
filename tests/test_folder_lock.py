"""One owner per folder, for as long as it lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.errors import InputError
from hasten.folder_lock import LOCK, FolderLock
from hasten.process import python_environment

HOLDER = """
import sys, time
from pathlib import Path
from hasten.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_owner_is_refused_at_once_and_the_next_one_is_not(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        with pytest.raises(InputError, match="another hasten process") as caught:
            FolderLock(tmp_path).__enter__()
        assert caught.value.fix
    with FolderLock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_owner_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, env=python_environment(), stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(InputError, match="another hasten process"):
            FolderLock(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
    with FolderLock(tmp_path):
        pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="cannot be locked"):
        FolderLock(tmp_path).__enter__()
    assert not (tmp_path / "victim").exists()


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be locked"):
        FolderLock(tmp_path / "none").__enter__()
