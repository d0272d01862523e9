"""What is published: contents of sdist and wheel, metadata, and the README on an index."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import hasten

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MIB = 2**20


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = ["-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=240)
    return folder


@pytest.mark.slow
def test_the_sdist_has_the_package_and_no_data(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {name.partition("/")[0] for name in names} == {
        "src",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "NOTICE",
        "PKG-INFO",
        "README.md",
        "SECURITY.md",
        "pyproject.toml",
    }
    assert sdist.stat().st_size < 32 * MIB


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    committed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "src/hasten"], capture_output=True, text=True
    )
    if committed.returncode == 0:
        assert {f"src/{name}" for name in names} >= set(committed.stdout.split("\n")) - {""}
    assert {name.partition("/")[0] for name in names} == {"hasten"}
    assert wheel.stat().st_size < 32 * MIB


@pytest.mark.slow
def test_an_index_takes_both_and_shows_the_readme(dist: Path) -> None:
    files = [str(path) for path in dist.iterdir()]
    check = [sys.executable, "-m", "twine", "check", "--strict", *files]
    run = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_every_link_of_the_readme_is_absolute_on_an_index(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
    assert metadata["Version"] == hasten.__version__
    text = metadata.get_payload()
    assert isinstance(text, str)
    for picture, link in re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", text):
        own = link.startswith(PROJECT["urls"]["Repository"])
        assert link.startswith(("https://", "#")), link
        assert not own or ("/raw/" if picture else "/blob/") in link, link


def test_every_address_is_of_one_repository() -> None:
    repository = PROJECT["urls"]["Repository"]
    assert all(url.startswith(repository) for url in PROJECT["urls"].values())
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    hosts = re.findall(r"https://[\w.-]+/hasten", text)
    assert set(hosts) == {repository}
    assert "placeholder" in text or "example.com" not in text


def test_the_versions_agree() -> None:
    assert PROJECT["version"] == hasten.__version__


def test_the_changelog_has_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## \[{re.escape(hasten.__version__)}\] - \d{{4}}-\d\d-\d\d$", text, re.M)
