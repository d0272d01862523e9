"""A worker that answers without a model, as told by behaviour.json in its workload's folder.

For each row: `seconds` of an image, `memory` it takes of the device's `total` until it `shrinks`
to less or an image makes it `grows`, and a command at which it `refuses`, `hangs` or `crashes`.
Every command is written to events.jsonl. `child` starts a process that would outlive a careless
end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from studies.peers.channel import Channel
from studies.peers.rows import Spec, Unsupported
from studies.peers.worker import serve

Answer = dict[str, Any]


class FakeRow:
    def do_import(self, *, row: list[str], workload: dict[str, Any]) -> Answer:
        self.text = Spec(*row).text
        self.folder = Path(workload["model"])
        everything = json.loads((self.folder / "behaviour.json").read_text())
        self.total = everything["total"]
        self.own = everything["rows"].get(self.text, {})
        self._meet("import")
        return {}

    def do_build(self) -> Answer:
        before = self._free()
        if before is not None and self.own.get("memory", 0) > before:
            raise OutOfMemoryError("no room to build")
        memory = self.folder / "memory"
        memory.mkdir(exist_ok=True)
        (memory / str(os.getpid())).write_text(str(self.own.get("memory", 0)))
        self._meet("build")
        return {"load_seconds": 1.0, "free_before": before, "free_bytes": self._free()}

    def do_apply(self) -> Answer:
        if "child" in self.own:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            (self.folder / "child").write_text(str(child.pid))
        if "shrinks" in self.own:
            (self.folder / "memory" / str(os.getpid())).write_text(str(self.own["shrinks"]))
        self._meet("apply")
        return {"setup_seconds": 2.0, "recipe": {"own": self.text}, "allocated_bytes": 5}

    def do_image(self, *, number: int, size: int, variant: str) -> Answer:
        if "grows" in self.own:
            (self.folder / "memory" / str(os.getpid())).write_text(str(self.own["grows"]))
        self._meet("image", number=number, size=size, variant=variant)
        seconds = self.own.get("seconds", 4.0)
        return {
            "seconds": seconds,
            "loop_seconds": seconds / 2,
            "peak_bytes": 100,
            "probe": [1.0, self.own.get("probe", 0.0)],
            "finite": True,
            "computed": int(variant or 50),
            "free_bytes": self._free(),
        }

    def do_held(self) -> Answer:
        self._meet("held")
        return {"held_bytes": 7, "summary": "done"}

    def _meet(self, command: str, **what: Any) -> None:
        """Note the command, then do what is planned for it."""
        caches = len([*Path(os.environ["TRITON_CACHE_DIR"]).parent.glob("compiled")])
        event = {"row": self.text, "do": command, "pid": os.getpid(), "caches": caches, **what}
        with (self.folder / "events.jsonl").open("a") as events:
            events.write(json.dumps(event) + "\n")
        if command == "apply":
            folder = Path(os.environ["TRITON_CACHE_DIR"]).parent
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "compiled").touch()
        if self.own.get("hangs") == command:
            time.sleep(60)
        if self.own.get("crashes") == command:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.own.get("refuses") == command:
            raise Unsupported("not on this device")

    def _free(self) -> int | None:
        if self.total is None:
            return None
        return int(self.total) - sum(
            int(path.read_text())
            for path in (self.folder / "memory").glob("*")
            if Path(f"/proc/{path.name}").exists()
        )


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


if __name__ == "__main__":
    serve(Channel(socket.socket(fileno=int(sys.argv[1]))), FakeRow())  # type: ignore[arg-type]
