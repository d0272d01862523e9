from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hasten.report import pictures
from hasten.report.pictures import collect
from hasten.results import Results
from tests.report.builders import make_results


def decoded(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def test_small_sets_are_embedded_without_any_loss(folder: Path, results: Results) -> None:
    album = collect(results, folder, folder)
    assert album.encoding == "lossless WebP"
    with Image.open(folder / "images/max/002.png") as original:
        np.testing.assert_array_equal(decoded(album.pictures["max", 2].uri), original)


def test_equal_pixels_are_embedded_once(folder: Path, results: Results) -> None:
    album = collect(results, folder, folder)
    again = album.pictures["baseline-again", 0]
    assert (again.uri, again.same_as) == ("", "baseline")
    assert album.pictures["compile", 0].uri
    assert not album.pictures["compile", 0].same_as


def test_links_lead_from_the_report_to_the_file(folder: Path, results: Results) -> None:
    album = collect(results, folder, folder / "deep" / "report")
    assert album.pictures["max", 0].link == "../../images/max/000.png"


def test_links_are_quoted(tmp_path: Path) -> None:
    directory = tmp_path / "a b#1"
    results = make_results(directory, count=1, size=(16, 16))
    album = collect(results, directory, tmp_path)
    assert album.pictures["max", 0].link == "a%20b%231/images/max/000.png"


def test_over_budget_the_quality_falls_and_says_how_far(
    folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(len(p.uri) for p in collect(results, folder, folder).pictures.values()) * 3 // 4
    monkeypatch.setattr(pictures, "BUDGET_BYTES", whole // 3)
    album = collect(results, folder, folder)
    assert "WebP, quality 9" in album.encoding
    assert sum(len(p.uri) for p in album.pictures.values()) * 3 // 4 <= whole // 3 * 1.01
    claimed = float(album.encoding.split("copy ")[1].split(" dB")[0])
    found = []
    for (recipe, index), picture in album.pictures.items():
        if picture.uri:
            with Image.open(folder / f"images/{recipe}/{index:03d}.png") as original:
                error = decoded(picture.uri).astype(float) - np.asarray(original, float)
            found.append(10 * np.log10(255**2 / np.mean(error**2)))
    assert claimed == pytest.approx(min(found), abs=0.06)
    assert claimed > 30


def test_quality_does_not_fall_below_the_last_step(
    folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "BUDGET_BYTES", 1)
    assert "quality 80" in collect(results, folder, folder).encoding


def test_a_missing_and_a_broken_picture_leave_their_reason(tmp_path: Path) -> None:
    results = make_results(tmp_path, count=2, size=(16, 16))
    (tmp_path / "images/max/000.png").unlink()
    (tmp_path / "images/cache/001.png").write_text("not a picture", encoding="utf-8")
    album = collect(results, tmp_path, tmp_path)
    assert album.pictures["max", 0].problem == "000.png is missing or cannot be read"
    assert album.pictures["cache", 1].problem
    assert album.pictures["max", 1].uri


@pytest.mark.parametrize("name", ["y" * 5000, "pipe", "images"])
def test_what_is_no_picture_is_missing_and_nothing_waits_for_it(tmp_path: Path, name: str) -> None:
    results = make_results(tmp_path, count=1, size=(16, 16))
    os.mkfifo(tmp_path / "pipe")
    row = results.rows[1].model_copy(update={"images": (name,)})
    album = collect(results.model_copy(update={"rows": (results.rows[0], row)}), tmp_path, tmp_path)
    assert "is missing or cannot be read" in album.pictures[row.recipe, 0].problem
