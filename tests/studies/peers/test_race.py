"""Who runs beside whom and in what order, and that a bad row costs only itself."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from studies.peers.race import MARGIN, Options, Race, turns
from studies.peers.record import Record
from studies.peers.remote import Clock
from studies.peers.results import all_results
from studies.peers.rows import Spec
from studies.peers.workload import Workload

from hasten.results import Environment
from studies.peers import remote

GIB = 2**30
ENVIRONMENT = Environment(device="cpu", torch="2", diffusers="0", hasten="0", date="2026-11-27")
Row = dict[str, Any]
Run = Callable[..., Race]
CACHED = Spec("cache-dit-eager", "18,10")


def own(name: str) -> Spec:
    return Spec("hasten", name)


@pytest.fixture(autouse=True)
def _no_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows here have made-up names; those that begin with `small` have eight bits."""
    eight = property(lambda spec: spec.argument.startswith("small"))
    monkeypatch.setattr(Spec, "eight_bits", eight)


@pytest.fixture
def race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run rows that behave as told; the race comes back, and nothing it started is left."""
    # By its folder: as a module of `tests` it would import torch, each time.
    monkeypatch.setattr(remote, "MODULE", "fake_worker")
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def run(
        specs: Sequence[Spec],
        rows: dict[str, Row] | None = None,
        *,
        total: int | None = None,
        clock: Clock | None = None,
        rounds: int = 2,
        **options: Any,
    ) -> Race:
        behaviour = {"total": total, "rows": rows or {}}
        (tmp_path / "behaviour.json").write_text(json.dumps(behaviour))
        workload = Workload(str(tmp_path), "cpu", "float32", (512, 1024), 50, rounds, 8)
        race = Race(workload, Options(**options), clock or Clock(), lambda: None, lambda _: None)
        race.run(specs, tmp_path / "scratch", tmp_path / "logs")
        assert not any(alive(event["pid"]) for event in events(tmp_path))
        return race

    return run


def events(folder: Path, *, row: str | None = None, do: str | None = None) -> list[Row]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [
        event for event in found if row in (None, event["row"]) and do in (None, event["do"])
    ]  # fmt: skip


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def row_of(race: Race, name: str, group: int | None = None) -> Record:
    return next(row for row in race.rows if row.name == name and group in (None, row.group))


def speedup(race: Race, name: str, folder: str = "512") -> float | None:
    found = all_results(race.rows, race.workload, ENVIRONMENT, "command")
    return next(row.speedup for row in found[folder].rows if row.recipe == name)


def test_each_round_begins_one_row_later() -> None:
    assert [turns("abc", number) for number in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
    assert turns([], 1) == []


def test_rows_take_turns_on_the_same_images(race: Run, tmp_path: Path) -> None:
    found = race([own("a"), CACHED], {"hasten:a": {"seconds": 2.0, "probe": 0.5}})
    timed = [one for one in events(tmp_path, do="image") if one["number"] < 1000]
    order = [(one["row"].split(":")[0], one["variant"], one["number"]) for one in timed]
    base, a, more, less = (
        ("diffusers", ""), ("hasten", ""), ("cache-dit-eager", "18"), ("cache-dit-eager", "10")
    )  # fmt: skip
    assert order == [
        *((*one, 0) for one in (base, a, more, less)),
        *((*one, 1) for one in (base, a, more, less)),
        *((*one, 2) for one in (a, more, less, base)),
        *((*one, 3) for one in (a, more, less, base)),
    ]
    assert [row.name for row in found.rows] == [
        "baseline", "hasten:a", "cache-dit-eager:18", "cache-dit-eager:10"
    ]  # fmt: skip
    assert [row.status for row in found.rows] == ["ok"] * 4
    fast = row_of(found, "hasten:a")
    small, large = fast.row(512, 50), fast.row(1024, 50)
    assert small.seconds_per_image is not None
    assert small.seconds_per_image.samples == (2.0, 2.0)
    assert large.transformer_ms_per_step == pytest.approx(20)
    assert small.extra["latent distance"] == pytest.approx(0.5)
    assert speedup(found, "hasten:a") == pytest.approx(2)
    less_computed = row_of(found, "cache-dit-eager:10").row(512, 50).steps_computed
    assert less_computed is not None
    assert less_computed.max == 10
    assert fast.held_bytes == 7
    assert row_of(found, "baseline").held_bytes == 7


def test_what_a_process_took_to_start_stands_in_its_first_row(race: Run) -> None:
    found = race([CACHED])
    first, second = row_of(found, "cache-dit-eager:18"), row_of(found, "cache-dit-eager:10")
    assert (first.load_seconds, first.setup_seconds) == (1.0, 2.0)
    assert first.timings[1024].first_image_seconds == 4.0
    assert second.setup_seconds is None
    assert tomllib.loads(second.settings or "") == {
        "settings": {"own": "cache-dit-eager:18,10", "variant": "10"}
    }


def test_groups_are_what_fits_and_each_has_the_one_base(race: Run, tmp_path: Path) -> None:
    takes = {"memory": 10 * GIB}
    rows = {"diffusers": takes, **{f"hasten:{name}": takes for name in "abc"}}
    found = race([own(name) for name in "abc"], rows, total=30 * GIB + int(2 * MARGIN), rounds=1)
    assert [(row.name, row.group) for row in found.rows] == [
        ("baseline", 0), ("hasten:a", 0), ("hasten:b", 0), ("baseline", 1), ("hasten:c", 1)
    ]  # fmt: skip
    assert len({event["pid"] for event in events(tmp_path, row="diffusers")}) == 1
    again = row_of(found, "baseline", 1)
    assert len(again.timings[512].samples) == 1
    assert again.setup_seconds == 2.0
    assert speedup(found, "hasten:c", "512-group-1") == pytest.approx(1)


def test_a_row_that_shrinks_needs_room_for_its_weights_alone(race: Run) -> None:
    rows = {
        "diffusers": {"memory": 10 * GIB, "grows": 14 * GIB},
        **{f"hasten:{name}": {"memory": 10 * GIB, "shrinks": 4 * GIB, "grows": 6 * GIB}
           for name in ("small-a", "small-b", "large")},
    }  # fmt: skip
    specs = [own("small-a"), own("small-b"), own("large")]
    found = race(specs, rows, total=14 * GIB + 6 * GIB + 10 * GIB + MARGIN, rounds=1)
    assert [(row.name, row.group) for row in found.rows if row.name != "baseline"] == [
        ("hasten:small-a", 0), ("hasten:small-b", 0), ("hasten:large", 1)
    ]  # fmt: skip


def test_the_number_of_rows_at_once_can_be_limited(race: Run) -> None:
    found = race([own(name) for name in "abc"], resident=2, rounds=1)
    assert [row.group for row in found.rows if row.name == "baseline"] == [0, 1, 2]


def test_out_of_memory_beside_others_is_tried_again_beside_the_base_alone(race: Run) -> None:
    rows = {
        "diffusers": {"memory": GIB},
        "hasten:a": {"memory": 2 * GIB},
        "hasten:large": {"memory": 28 * GIB},
        "hasten:huge": {"memory": 90 * GIB},
    }
    specs = [own("a"), own("large"), own("huge")]
    found = race(specs, rows, total=30 * GIB, rounds=1)
    large, huge = row_of(found, "hasten:large"), row_of(found, "hasten:huge")
    assert (large.status, large.group) == ("ok", 1)
    assert (huge.status, huge.reason) == (
        "out of memory",
        "OutOfMemoryError: no room to build",
    )


@pytest.mark.parametrize(
    ("behaviour", "status", "says"),
    [
        ({"refuses": "import"}, "unsupported", "not on this device"),
        ({"refuses": "apply"}, "unsupported", "not on this device"),
        ({"crashes": "apply"}, "failed", "SIGSEGV"),
        ({"crashes": "image"}, "failed", "SIGSEGV"),
        ({"hangs": "apply"}, "too slow to set up", "given up"),
        ({"hangs": "image"}, "too slow to set up", "given up"),
    ],
)
def test_a_row_that_cannot_run_keeps_its_place_and_costs_no_other(
    race: Run, behaviour: Row, status: str, says: str
) -> None:
    found = race([own("bad"), own("good")], {"hasten:bad": behaviour}, setup_limit=3, rounds=1)
    bad = row_of(found, "hasten:bad")
    assert bad.status == status
    assert says in (bad.reason or "")
    shown = bad.row(512, 50)
    assert shown.status == ("unsupported" if status == "unsupported" else "failed")
    assert says in (shown.reason or "")
    assert row_of(found, "hasten:good").status == "ok"
    assert [row.name for row in found.rows] == ["baseline", "hasten:bad", "hasten:good"]


def test_without_its_base_a_row_is_still_timed(race: Run) -> None:
    found = race([own("a")], {"diffusers": {"crashes": "build"}}, rounds=1)
    assert row_of(found, "baseline").status == "failed"
    assert row_of(found, "hasten:a").status == "ok"
    assert speedup(found, "hasten:a") is None


class ClockUntil(Clock):
    """A deadline that comes soon after a command has begun, however slow this machine is."""

    def __init__(self, begun: Callable[[], object]) -> None:
        super().__init__()
        self.begun = begun

    def left(self) -> float:
        if self.deadline is None and self.begun():
            self.deadline = self.spent() + 0.5
        return super().left()


def test_at_the_deadline_all_stops_and_every_row_says_so(race: Run, tmp_path: Path) -> None:
    def applying() -> object:
        path = tmp_path / "events.jsonl"
        return path.exists() and events(tmp_path, row="hasten:slow", do="build")

    rows = {"hasten:slow": {"hangs": "apply", "child": True}}
    found = race([own("slow"), own("never")], rows, clock=ClockUntil(applying), resident=2)
    for name in ("slow", "never"):
        row = row_of(found, f"hasten:{name}")
        assert (row.status, row.reason) == ("stopped", "the deadline came")
    child = tmp_path / "child"
    assert not child.exists() or not alive(int(child.read_text()))


def test_a_row_that_dies_between_images_keeps_what_was_measured(
    race: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ask = remote.Remote.ask

    def kill_late(self: remote.Remote, command: str, *arguments: Any, **what: Any) -> Row:
        if self.spec == own("a") and what.get("number") == 3:
            asked.append(command)
            self.process.kill()
        return ask(self, command, *arguments, **what)

    monkeypatch.setattr(remote.Remote, "ask", kill_late)
    found = race([own("a")])
    row = row_of(found, "hasten:a")
    assert asked
    assert row.status == "ok"
    _, note = row.row(512, 50).notes
    assert "fewer images than planned: failed: its process was ended by SIGKILL" in note
    assert [len(timing.samples) for timing in row.timings.values()] == [2, 1]


def test_a_warm_start_is_a_new_process_with_the_first_ones_caches(
    race: Run, tmp_path: Path
) -> None:
    found = race([own("a")], warm=True, rounds=1)
    extra = row_of(found, "hasten:a").row(1024, 50).extra
    assert (extra["warm setup s"], extra["warm first image s"]) == (2.0, 4.0)
    cold, again = events(tmp_path, row="hasten:a", do="apply")
    assert cold["pid"] != again["pid"]
    assert (cold["caches"], again["caches"]) == (0, 1)
