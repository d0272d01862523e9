"""The protocol of coordinator and worker: JSON objects, one per line, over a socket."""

from __future__ import annotations

import json
import socket
from time import monotonic
from typing import Any

__all__ = ["Channel", "ClosedError"]


class ClosedError(Exception):
    """The other side has closed the connection."""


class Channel:
    """Sends and receives dictionaries; each side waits for the other's reply."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pending = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; raises ClosedError if the other side has closed the connection."""
        try:
            self.connection.settimeout(None)
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ClosedError(str(error)) from error

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """The next message; TimeoutError after `seconds`, ClosedError once there is none."""
        end = None if seconds is None else monotonic() + seconds
        while b"\n" not in self.pending:
            self.pending += self._chunk(None if end is None else end - monotonic())
        line, _, self.pending = self.pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self.connection.close()

    def _chunk(self, left: float | None) -> bytes:
        if left is not None and left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        try:
            chunk = self.connection.recv(65536)
        except TimeoutError:
            raise
        except OSError as error:
            raise ClosedError(str(error)) from error
        if not chunk:
            raise ClosedError("the other side closed the connection")
        return chunk
