"""The whole way on a small model: what is made, what is not made twice, and what each fault leaves.

One export of each precision is made for the module; tests copy its cache and go on from there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hasten.engines.tensorrt import files, keys, stages
from hasten.engines.tensorrt.files import AMAX, DATA, ENGINE, GRAPH, default_root, facts_of_file
from hasten.engines.tensorrt.keys import weights_digest
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest
from hasten.engines.tensorrt.preflight import ExportOptions
from hasten.engines.tensorrt.stages import export_tensorrt
from hasten.errors import EngineError, HastenError
from hasten.families.flux1 import FLUX1
from hasten.log import forward_log
from hasten.models.defaults import ModelDefaults
from hasten.models.random_weights import build_shape
from hasten.settings import Settings
from tests.conftest import SMALL
from tests.engines.tensorrt.test_store import files_up_to, flip_a_bit, names_below

LINE = re.compile(r"(preflight|calibrate|export|verify|build|write) +\d+\.\d s(  \(cached\))?")


def small_pipe() -> Any:
    pipe = build_shape(SMALL, torch.device("cpu"), torch.float32)
    pipe.default_sample_size = 4  # 32×32 px
    return pipe


def exported(out: Path | None, **changes: Any) -> tuple[Manifest, list[str]]:
    """An export with changes of its options or other arguments, and the lines that are logged."""
    said: list[str] = []
    show = changes.pop("show", lambda _: None)
    names = {one.name for one in fields(ExportOptions)}
    options = replace(
        ExportOptions("bf16", ("sm89",), (64, 64)),
        **{name: changes.pop(name) for name in names & changes.keys()},
    )
    asked = {"max_sequence_length": 8, "prompts": ["a red kite"], "steps": 2, **changes}
    with forward_log(said.append, show):
        return export_tensorrt(asked.pop("pipe", None) or small_pipe(), out, options, **asked), said


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and an export in bf16."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_CACHE", str(folder / "cache"))
        _, said = exported(folder / "engine")
    (folder / "said").write_text("\n".join(said))
    return folder


@pytest.fixture
def place(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it for one test, whose cache is the one that counts."""
    shutil.copytree(first, tmp_path / "place")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "place" / "cache"))
    return tmp_path / "place"


@pytest.fixture
def quick_export(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting copies the first graph, for tests of what happens around it."""

    def copy(*given: Any) -> None:
        for name in (GRAPH, DATA):
            shutil.copyfile(first / "engine" / name, given[-1] / name)

    monkeypatch.setattr("hasten.engines.tensorrt.stages.export_onnx", copy)


def test_an_engine_too_small_for_the_model_s_own_size_is_noted() -> None:
    asked = ExportOptions("bf16", (), max_size=(64, 64))
    said: list[str] = []
    for width in (64, 80):
        settings = Settings.of_model(ModelDefaults(width=width, height=64))
        with forward_log(said.append, lambda _: None):
            stages._log_own_size(asked, settings)
    (line,) = said
    assert "up to 64x64, and the model's own size is 80x64" in line
    assert "--max-size 80x64 (engine.max_size)" in line


def made_before(said: list[str]) -> list[str]:
    return [line.split()[0] for line in said if line.endswith("(cached)")]


def files_of(folder: Path) -> dict[str, Any]:
    """All but the recipe, and the manifest, in which the seconds differ."""
    paths = [path for path in folder.iterdir() if path.name not in (MANIFEST, "recipe.toml")]
    return {path.name: facts_of_file(path) for path in paths}


def test_what_is_written(first: Path) -> None:
    manifest = Manifest.read(first / "engine")
    assert set(files_of(first / "engine")) == {GRAPH, DATA, ENGINE} == set(manifest.files)
    assert manifest.damaged(first / "engine") == {}
    assert (manifest.precision, manifest.targets) == ("bf16", ("sm89",))
    assert manifest.shapes.model_dump() == {"text": 8, "least": 4, "best": 4, "most": 16}
    sizes = (manifest.channels, manifest.text_dim, manifest.row_width, manifest.head_dim)
    assert sizes == (64, 32, 1024, 16)
    assert manifest.calibration is None
    assert [stage.name for stage in manifest.stages] == ["export", "verify", "build"]
    assert all(stage.peak_bytes and not stage.cached for stage in manifest.stages)
    assert manifest.verification is not None
    assert manifest.verification.sizes
    assert manifest.weights == weights_digest(small_pipe().transformer)
    lines = (first / "said").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [
        "preflight",
        "export",
        "verify",
        "build",
        "write",
    ]
    assert all(LINE.fullmatch(line) for line in lines)
    assert str(first) not in (first / "engine" / MANIFEST).read_text()


def test_the_graph_has_the_sizes_that_the_manifest_says(first: Path) -> None:
    import onnx

    manifest = Manifest.read(first / "engine")
    graph = onnx.load(first / "engine" / GRAPH, load_external_data=False).graph
    dims = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert dims["latents"][2] == manifest.channels
    assert dims["text"] == [1, manifest.shapes.text, manifest.text_dim]
    assert dims["row"] == [1, manifest.row_width]
    assert dims["cos"][1] == manifest.head_dim


def test_a_repeat_makes_nothing(place: Path) -> None:
    before = (place / "engine" / ENGINE).stat()
    manifest, said = exported(place / "engine")
    assert made_before(said) == ["export", "verify", "build"]
    assert all(stage.cached and stage.seconds > 0 for stage in manifest.stages[:1])
    after = (place / "engine" / ENGINE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (place / "engine").stat().st_ino


def test_without_the_cache_the_same_bytes_again(place: Path) -> None:
    before = files_of(place / "engine")
    shutil.rmtree(place / "cache")
    shutil.rmtree(place / "engine")
    _, said = exported(place / "engine", verify=False)
    assert made_before(said) == []
    assert files_of(place / "engine") == before


def test_only_what_depends_on_a_change_is_made_again(place: Path) -> None:
    _, said = exported(place / "other", targets=("sm86", "sm89"))
    assert made_before(said) == ["export", "verify"]
    manifest, said = exported(place / "larger", max_size=(128, 64))
    assert made_before(said) == ["export"]
    assert manifest.shapes.most == 32
    assert manifest.files[GRAPH] == Manifest.read(place / "engine").files[GRAPH]


@pytest.mark.usefixtures("quick_export")
@pytest.mark.parametrize(
    ("package", "kept"),
    [
        ("nvidia-modelopt", ["export", "build"]),
        ("onnxscript", ["calibrate", "build"]),
        ("tensorrt-rtx-cu13", ["calibrate", "export"]),
        ("pydantic", ["calibrate", "export", "build"]),
    ],
)
def test_another_version_makes_again_what_uses_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, package: str, kept: list[str]
) -> None:
    """What comes out the same is not made again further on."""
    built: list[Path] = []

    def build(_: Any, engine: Path, *__: Any) -> Any:
        built.append(engine)
        engine.write_bytes(b"engine")
        return SimpleNamespace(peak_bytes=1)

    monkeypatch.setattr(stages, "build", build)
    asked: dict[str, Any] = {"precision": "fp8", "verify": False}
    exported(place / "fp8", **asked)
    true = keys.version_of
    monkeypatch.setattr(
        keys, "version_of", lambda name: "another" if name == package else true(name)
    )
    _, said = exported(place / "fp8", **asked)
    assert made_before(said) == kept


@pytest.mark.usefixtures("quick_export")
def test_other_weights_are_another_model(place: Path) -> None:
    pipe = small_pipe()
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] += 1
    manifest, said = exported(place / "other", pipe=pipe, targets=(), verify=False)
    assert made_before(said) == []
    assert manifest.weights != Manifest.read(place / "engine").weights


def test_the_graph_alone(place: Path) -> None:
    manifest, said = exported(place / "graph", targets=(), verify=False)
    assert set(files_of(place / "graph")) == {GRAPH, DATA}
    assert [line.split()[0] for line in said] == ["preflight", "export", "write"]
    assert manifest.verification is None
    assert manifest.targets == ()


def test_kept_in_the_cache(place: Path) -> None:
    manifest, _ = exported(None)
    assert manifest.folder is not None
    assert manifest.folder.is_relative_to(default_root())
    assert files_of(manifest.folder) == files_of(place / "engine")
    (built,) = (default_root() / "build").glob(f"*/{ENGINE}")
    assert built.samefile(manifest.folder / ENGINE)  # no second time on the disk
    (manifest.folder / "runtime.cache").write_text("of the engine's driver")
    again, _ = exported(None)
    assert again.folder == manifest.folder
    assert (manifest.folder / "runtime.cache").exists()
    assert exported(None, max_size=(128, 64))[0].folder != manifest.folder


@pytest.mark.slow
def test_fp8_is_calibrated_and_leaves_the_pipeline_alone(place: Path) -> None:
    pipe, inner = small_pipe(), []
    before = weights_digest(pipe.transformer)
    _, said = exported(place / "fp8", pipe=pipe, precision="fp8", show=inner.append)
    manifest = Manifest.read(place / "fp8")
    assert set(files_of(place / "fp8")) == {AMAX, GRAPH, DATA, ENGINE}
    assert manifest.calibration is not None
    assert manifest.calibration.model_dump(exclude={"sha256"}) == {
        "method": "max",
        "prompts": 1,
        "steps": 2,
    }
    assert made_before(said) == []
    assert "calibrating: prompt 1 of 1" in inner
    assert weights_digest(pipe.transformer) == before
    assert {type(linear) for _, linear in FLUX1.quantizable(pipe.transformer)} == {nn.Linear}
    _, said = exported(place / "fp8", precision="fp8")
    assert made_before(said) == ["calibrate", "export", "verify", "build"]


@pytest.mark.usefixtures("quick_export")
def test_a_calibration_is_of_its_steps_and_prompts(place: Path) -> None:
    alone = {"precision": "fp8", "targets": (), "verify": False}
    exported(place / "fp8", **alone)
    for change in ({"steps": 1}, {"prompts": ["a kite"]}, {"method": "smoothquant"}):
        _, said = exported(place / "fp8", **alone, **change)
        assert made_before(said) == [], change
    assert made_before(exported(place / "fp8", **alone)[1]) == ["calibrate", "export"]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": flip_a_bit,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_in_what_was_written(place: Path, damage: Callable[[Path], Any]) -> None:
    before = files_of(place / "engine")
    damage(place / "engine" / GRAPH)
    _, said = exported(place / "engine")
    fault = "damaged" if damage is not DAMAGES["gone"] else "missing"
    (line,) = [line for line in said if line.startswith("write: ")]
    assert line.startswith(f"write: {GRAPH} {fault}")
    assert line.endswith(f" in {place / 'engine'}; writing it again")
    assert made_before(said) == ["export", "verify", "build"]
    assert files_of(place / "engine") == before


@pytest.mark.usefixtures("quick_export")
@pytest.mark.parametrize(("name", "how"), [(GRAPH, "empty"), (DATA, "one bit")])
def test_damage_in_the_cache(place: Path, name: str, how: str) -> None:
    before = files_of(place / "engine")
    (path,) = (place / "cache" / "tensorrt" / "export").glob(f"*/{name}")
    DAMAGES[how](path)
    shutil.rmtree(place / "engine")
    _, said = exported(place / "engine")
    assert any(re.match(f"export: {name} is damaged.*; running the stage again", x) for x in said)
    assert made_before(said) == ["verify", "build"]
    assert files_of(place / "engine") == before


def failed(out: Path, **changes: Any) -> HastenError:
    with pytest.raises(HastenError) as caught:
        exported(out, **changes)
    assert caught.value.fix
    return caught.value


def test_faults_are_found_before_anything_is_made(place: Path) -> None:
    shutil.rmtree(place / "cache")
    pipe = small_pipe()
    pipe.transformer.proj_out.base_layer = nn.Linear(2, 2)
    error = failed(place / "new", pipe=pipe, precision="fp8", targets=("sm86", "sm90"))
    assert [fault for fault in error.faults if "sm86" in fault]
    assert [fault for fault in error.faults if "sm90" in fault]
    assert [fault for fault in error.faults if "LoRA" in fault]
    assert len(error.faults) == 3
    assert {path.name for path in place.iterdir()} == {"engine", "said"}


def test_what_is_no_pipeline_of_ours(place: Path) -> None:
    class Other:
        name_or_path = None

    assert "has no transformer" in failed(place / "new", pipe=Other()).faults[0]


@pytest.mark.usefixtures("quick_export")
def test_no_space_for_the_graph(place: Path) -> None:
    shutil.rmtree(place / "cache")
    with files_up_to(100_000):  # the weights are larger
        error = failed(place / "new")
    assert isinstance(error, EngineError)
    assert error.faults[0].startswith("export: no space left")
    assert names_below(default_root()) == set()
    assert not (place / "new").exists()
    _, said = exported(place / "new", targets=(), verify=False)
    assert made_before(said) == []


def test_no_space_for_what_is_written(place: Path) -> None:
    with files_up_to(100_000):
        error = failed(place / "new")
    assert error.faults == (f"{place / 'new'}: no space left for the export",)
    assert {path.name for path in place.iterdir()} == {"cache", "engine", "said"}
    _, said = exported(place / "new")
    assert made_before(said) == ["export", "verify", "build"]
    assert files_of(place / "new") == files_of(place / "engine")


@pytest.mark.usefixtures("quick_export")
def test_a_link_without_an_end(place: Path) -> None:
    (place / "loop").symlink_to("loop")
    assert failed(place / "loop").faults == (f"{place / 'loop'}: a link to itself",)


def test_a_second_start_reads_no_large_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WORTH_IT", 0)
    exported(None, targets=("sm86",))
    read: list[str] = []
    true = files.hashlib.file_digest

    def seen(file: Any, name: str) -> Any:
        read.append(Path(file.name).name)
        return true(file, name)

    monkeypatch.setattr(files.hashlib, "file_digest", seen)
    _, said = exported(None, targets=("sm86",))
    assert made_before(said) == ["export", "verify", "build"]
    assert read == []


def test_a_link_is_followed(place: Path) -> None:
    """What a link leads to is replaced, and the link stays."""
    (place / "engine").rename(place / "elsewhere")
    (place / "engine").symlink_to("elsewhere")
    exported(place / "engine", targets=(), verify=False)
    assert (place / "engine").is_symlink()
    assert Manifest.read(place / "elsewhere").targets == ()
    assert set(files_of(place / "elsewhere")) == {GRAPH, DATA}
    assert {path.name for path in place.iterdir()} == {"cache", "elsewhere", "engine", "said"}


@pytest.mark.parametrize("stage", ["export", "verify"])
def test_a_stage_that_runs_out_of_memory(
    place: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """One line, however many errors the libraries have put around it."""

    def broken(*_: Any) -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise RuntimeError(
                "An error occurred when running the pass\nwith many lines"
            ) from error

    shutil.rmtree(place / "cache" / "tensorrt" / stage)
    name = {"export": "export_onnx", "verify": "verify"}[stage]
    monkeypatch.setattr(stages, name, broken)
    error = failed(place / "new")
    assert isinstance(error, EngineError)
    assert error.faults == (f"{stage}: out of memory",)
    assert "finished stages are kept" in error.fix


def test_a_stage_that_fails_keeps_those_before_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("verify", "build"):
        shutil.rmtree(place / "cache" / "tensorrt" / name)

    def broken(*_: Any) -> None:
        raise EngineError("the graph lies too far off", "report it")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "verify", broken)
        assert failed(place / "new").faults == ("the graph lies too far off",)
    assert not (place / "new").exists()
    _, said = exported(place / "new")
    assert made_before(said) == ["export"]
