"""Rows in groups that fit the device together, each group in turns with the base row.

The base row's process lives through all groups, so that every ratio is between two rows that took
turns, image by image. Rows are added to a group while the device has memory for one more: as much
as the base row took, or only its weights if the row makes them smaller. A row that runs out of
memory in a group is tried again with the base row only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from studies.peers.contestant import Contestant
from studies.peers.preparation import prepare
from studies.peers.record import Record
from studies.peers.remote import Clock, Lost, Remote
from studies.peers.rows import BASE, Spec
from studies.peers.workload import Workload

__all__ = ["Options", "Race", "turns"]

MARGIN = 3 * 2**29  # bytes
IMPORT_SECONDS = 300.0


@dataclass(frozen=True)
class Options:
    """setup_limit: seconds a row has from weights on the device to its last first image;
    image_limit: seconds a timed image may take; resident: rows at once, the base among them, 0 what
    fits; warm: start each row once more, with the compile caches that it left."""

    setup_limit: float = 300.0
    image_limit: float = 300.0
    resident: int = 0
    warm: bool = False


def turns(racers: Sequence[Any], number: int) -> list[Any]:
    """The order of round `number`: each round begins one racer later."""
    start = number % len(racers) if racers else 0
    return [*racers[start:], *racers[:start]]


class Race:
    """Measures all rows. `rows` is what there is of them at any time; `save` is called whenever it
    has grown, and `say` with a line of progress."""

    def __init__(
        self,
        workload: Workload,
        options: Options,
        clock: Clock,
        save: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.workload = workload
        self.options = options
        self.clock = clock
        self.save = save
        self.say = say
        self.rows: list[Record] = []
        self.base: Contestant | None = None
        self.need = self.need_loaded = 0
        self.free: int | None = None
        self._alive: list[Remote] = []
        self._numbers = count()

    def run(self, specs: Sequence[Spec], scratch: Path, logs: Path) -> None:
        """Measure the base row and `specs` in their order; `scratch` gets the compile caches."""
        self._scratch, self._logs = scratch, logs
        try:
            waiting = self._begin([Spec(BASE), *(spec for spec in specs if spec.kind != BASE)])
            self._set_up_base(*waiting.popleft())
            for group in count():
                members = self._fill(waiting, group)
                self._take_turns(members, group)
                self._finish(members)
                if not waiting:
                    break
            if self.base is not None:
                self._ask_held(
                    self.base.remote, [row for row in self.rows if row.role == "baseline"]
                )
        finally:
            for remote in [*self._alive]:
                self._end(remote)
            self.save()

    # --- processes ---

    def _begin(self, specs: Sequence[Spec]) -> deque[tuple[Remote, list[Record]]]:
        """A process and its rows for each. They import together, before anything is timed."""
        begun = deque((self._start(spec), self._new_rows(spec)) for spec in specs)
        for _, rows in begun:
            self.rows += rows
        for remote, rows in begun:
            try:
                remote.answer(self.clock, IMPORT_SECONDS)
            except Lost as lost:
                _refuse(rows, lost)
        self.say(f"{len(begun)} processes have imported")
        return begun

    def _start(self, spec: Spec, caches: Path | None = None) -> Remote:
        name = spec.text.replace("/", "_").replace(":", "-")
        caches = caches or self._scratch / f"{next(self._numbers)}-{name}"
        self._logs.mkdir(parents=True, exist_ok=True)
        remote = Remote(spec, self.workload, caches, self._logs / f"{name}.log")
        self._alive.append(remote)
        remote.tell("import", row=[spec.kind, spec.argument], workload=self.workload.to_json())
        return remote

    def _start_again(self, spec: Spec, caches: Path | None = None) -> Remote:
        """A further process of a row, its imports done; where that fails, it is `lost`."""
        remote = self._start(spec, caches)
        with suppress(Lost):
            remote.answer(self.clock, IMPORT_SECONDS)
        return remote

    def _end(self, remote: Remote) -> None:
        remote.end()
        self._alive.remove(remote)

    def _new_rows(self, spec: Spec) -> list[Record]:
        sizes = self.workload.sizes
        return [Record.new(spec.kind, spec.name(variant), sizes) for variant in spec.variants]

    # --- stages ---

    def _set_up_base(self, remote: Remote, rows: list[Record]) -> None:
        racers = self._set_up(remote, rows)
        self._plain_row = deepcopy(rows[0])
        self.base = racers[0] if racers else None

    def _fill(self, waiting: deque[tuple[Remote, list[Record]]], group: int) -> list[Contestant]:
        """Set up rows for as long as there is room for one more."""
        members: list[Contestant] = []
        while waiting and self._has_room(waiting[0][0].spec, members):
            remote, rows = waiting.popleft()
            members += self._set_up(remote, rows)
            lost = remote.lost
            if lost is not None and lost.status == "out of memory" and members:
                waiting.appendleft(
                    (self._start_again(remote.spec), self._new_records(remote.spec, rows))
                )
                break
        for one in members:
            one.row.group = group
        return members

    def _has_room(self, spec: Spec, members: list[Contestant]) -> bool:
        if not members:
            return True
        processes = 1 + len({one.remote for one in members})
        if self.options.resident and processes >= self.options.resident:
            return False
        need = self.need_loaded if spec.eight_bits else self.need
        return self.free is None or self.free >= need

    def _set_up(self, remote: Remote, rows: list[Record]) -> list[Contestant]:
        """The contestants of a process, none where it was lost, which its rows then say."""
        try:
            room = prepare(remote, rows, self.clock, self.options.setup_limit, self.save)
        except Lost as lost:
            _refuse(rows, lost)
            self.say(f"{remote.spec.text}: {lost}")
            self._end(remote)
            self.save()
            return []
        if self.base is None:
            self.need = _taken(room.before, room.after)
            self.need_loaded = _taken(room.before, room.loaded)
        self.free = room.after
        firsts = [timing.first_image_seconds or 0.0 for timing in rows[0].timings.values()]
        seconds = (rows[0].setup_seconds or 0.0) + sum(firsts)
        self.say(f"{remote.spec.text}: loaded in {rows[0].load_seconds:.1f} s, then warm in "
                 f"{seconds:.1f} s")  # fmt: skip
        pairs = zip(remote.spec.variants, rows, strict=True)
        return [Contestant(remote, variant, row) for variant, row in pairs]

    def _take_turns(self, members: list[Contestant], group: int) -> None:
        if group and not members:
            return
        base = self._base_of(group)
        racers = [*([base] if base else []), *members]
        for number in range(self.workload.rounds):
            for place, size in enumerate(self.workload.sizes):
                image = number * len(self.workload.sizes) + place
                for racer in turns(racers, number):
                    racer.render(image, size, self.clock, self.options.image_limit)
                for racer in members if base else []:
                    racer.compare(base, size)
            self.save()
            self.say(f"group {group}: round {number + 1} of {self.workload.rounds}")

    def _base_of(self, group: int) -> Contestant | None:
        """The base among this group's rows: its own samples, in a row of its own."""
        if self.base is None:
            return None
        if group:
            row = deepcopy(self._plain_row)
            place = next(i for i, other in enumerate(self.rows) if other.group == group)
            self.rows.insert(place, row)
            self.base = Contestant(self.base.remote, "", row)
        self.base.row.group = group
        return self.base

    def _finish(self, members: list[Contestant]) -> None:
        """What is asked once the group's images are done; its processes end here. The base's goes
        on, so nothing may empty the memory that it reuses."""
        for remote in dict.fromkeys(one.remote for one in members):
            rows = [one.row for one in members if one.remote is remote]
            self._ask_held(remote, rows)
            self._end(remote)
            if self.options.warm and rows[0].status == "ok" and self.clock.left() > 0:
                self._warm_start(remote, rows[0])
            self.save()

    def _ask_held(self, remote: Remote, rows: list[Record]) -> None:
        try:
            answer = remote.ask("held", self.clock, self.options.image_limit)
        except Lost:
            return  # the images are measured; the row says enough
        for row in rows:
            row.held_bytes, row.summary = answer["held_bytes"], answer["summary"]

    def _warm_start(self, before: Remote, row: Record) -> None:
        """Note setup and first images of a new process that finds the first one's caches."""
        remote = self._start_again(before.spec, before.caches)
        rows = self._new_rows(before.spec)
        try:
            prepare(remote, rows, self.clock, self.options.setup_limit, self.save)
        except Lost as lost:
            self.say(f"{before.spec.text}: no warm start: {lost}")
            return
        finally:
            self._end(remote)
        row.warm_setup_seconds = rows[0].setup_seconds
        for size, timing in rows[0].timings.items():
            row.timings[size].warm_image_seconds = timing.first_image_seconds
        self.say(f"{before.spec.text}: started with warm caches")

    def _new_records(self, spec: Spec, rows: list[Record]) -> list[Record]:
        """New rows in the places of `rows`, as if nothing had happened."""
        fresh = self._new_rows(spec)
        place = next(index for index, row in enumerate(self.rows) if row is rows[0])
        self.rows[place : place + len(rows)] = fresh
        return fresh


def _taken(before: int | None, after: int | None) -> int:
    return 0 if before is None or after is None else before - after + MARGIN


def _refuse(rows: list[Record], lost: Lost) -> None:
    for row in rows:
        row.status, row.reason = lost.status, lost.reason
