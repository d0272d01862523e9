"""Fetch the two picture sets, render them at one size, and pack them: `python -m training.prepare`.

Everything comes from three npm packages with clean licences and goes into one zip file:
`index.json` (what each picture is), `NNNN.png` (straight RGBA, `SIDE`² pixels), and the two
tokenizers' vocabularies. The machine that trains needs nothing else and no network.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.text import train_bpe, train_unigram
from training.vocabulary import STYLES, things, unit_hash

__all__ = ["PACKAGES", "SIDE", "Entry", "main"]

PACKAGES = {
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "@iconify-json/noto@1.2.9",
    "names": "emojibase-data@17.0.0",
}
SIDE = 104
UNSEEN_LABELS = 30  # × 2 styles = 60 pictures that only the evaluation sees
GROUPS = {
    0,
    3,
    4,
    5,
    6,
    7,
}  # smileys, nature, food, travel, activities, objects: no people, no flags
WORK = Path(__file__).parent / "work"


@dataclass(frozen=True)
class Entry:
    """One picture: its emoji label, its style, and `role` vocabulary, extra or unseen."""

    label: str
    style: str
    role: str


def fetch(folder: Path) -> dict[str, Path]:
    """Download each package's archive once with `npm pack`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for key, spec in PACKAGES.items():
        name, version = spec.rsplit("@", 1)
        archive = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True)
        found[key] = archive
    return found


def read_json(archive: Path, member: str) -> Any:
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(f"package/{member}")
        if stream is None:
            raise FileNotFoundError(f"{archive.name} has no {member}")
        return json.load(stream)


def plain_code(code: str) -> str:
    """A hyphenated code-point name without its presentation selectors and leading zeros."""
    points = [part.lstrip("0") for part in code.lower().split("-")]
    return "-".join(part for part in points if part != "fe0f")


def fluent_pictures(archive: Path) -> dict[str, bytes]:
    """Code points → WebP file."""
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".webp")]
        streams = {plain_code(Path(m.name).stem): tar.extractfile(m) for m in members}
        return {code: stream.read() for code, stream in streams.items() if stream is not None}


def noto_pictures(archive: Path) -> dict[str, str]:
    """Code points → SVG text at the icon's own view box."""
    icons = read_json(archive, "icons.json")
    drawings: dict[str, str] = {}
    for code, name in read_json(archive, "chars.json").items():
        original = icons["aliases"].get(name, {}).get("parent", name)
        icon = icons["icons"].get(original)
        if icon is not None:
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            drawings[plain_code(code)] = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}" width="{2 * SIDE}" height="{2 * SIDE}">'
                f"{icon['body']}</svg>"
            )
    return drawings


def shrink(picture: Image.Image) -> Image.Image:
    """Straight RGBA at `SIDE`², resampled premultiplied so that no dark fringe appears."""
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    alpha = rgba[..., 3:]
    planes = np.concatenate([rgba[..., :3] * alpha, alpha], axis=-1)
    small = np.stack(
        [
            np.asarray(
                Image.fromarray(planes[..., c]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            )
            for c in range(4)
        ],
        axis=-1,
    ).clip(0, 1)
    small[..., :3] = np.where(
        small[..., 3:] > 1 / 255, small[..., :3] / np.maximum(small[..., 3:], 1e-6), 0
    )
    return Image.fromarray((small.clip(0, 1) * 255).round().astype(np.uint8), "RGBA")


def render(svg: str) -> Image.Image:
    import resvg_py  # only this step needs it

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))


def candidates(names: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(label, code points) of every emoji in the allowed groups."""
    for emoji in names:
        if emoji.get("group") in GROUPS:
            yield emoji["label"], plain_code(emoji["hexcode"])


def collect(archives: dict[str, Path]) -> list[tuple[Entry, Image.Image]]:
    """Every picture that exists in both styles, with its role, vocabulary first."""
    fluent, noto = fluent_pictures(archives["fluent"]), noto_pictures(archives["noto"])
    codes = {
        label: code
        for label, code in candidates(read_json(archives["names"], "en/data.json"))
        if code in fluent and code in noto
    }
    vocabulary = [thing.label for thing in things()]
    missing = [label for label in vocabulary if label not in codes]
    if missing:
        raise ValueError(f"vocabulary.txt names pictures that are not in both sets: {missing}")
    others = sorted(set(codes) - set(vocabulary), key=lambda label: unit_hash("unseen", label))
    roles = [(label, "vocabulary") for label in vocabulary]
    roles += [(label, "unseen" if i < UNSEEN_LABELS else "extra") for i, label in enumerate(others)]
    pictures = []
    for label, role in roles:
        code = codes[label]
        drawn = (Image.open(io.BytesIO(fluent[code])), render(noto[code]))
        for style, picture in zip(STYLES, drawn, strict=True):
            pictures.append((Entry(label, style.name, role), shrink(picture)))
    return pictures


def write_member(pack: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Store `content` with a fixed date, so that the same inputs give the same file."""
    pack.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content)


def write_pack(pictures: list[tuple[Entry, Image.Image]], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as pack:
        index = {"side": SIDE, "packages": PACKAGES, "pictures": [asdict(e) for e, _ in pictures]}
        write_member(pack, "index.json", json.dumps(index, indent=0).encode())
        write_member(pack, "unigram.json", json.dumps(train_unigram()).encode())
        write_member(pack, "bpe.json", json.dumps(train_bpe()).encode())
        for number, (_, picture) in enumerate(pictures):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG", optimize=True)
            write_member(pack, f"{number:04d}.png", buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=WORK / "pack.zip")
    out: Path = parser.parse_args().out
    pictures = collect(fetch(WORK / "fetch"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_pack(pictures, out)
    roles = [entry.role for entry, _ in pictures]
    counts = ", ".join(f"{roles.count(role)} {role}" for role in ("vocabulary", "extra", "unseen"))
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, pictures: {counts}")


if __name__ == "__main__":
    main()
