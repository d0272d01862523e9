"""Messages between two processes, whole or not at all."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from studies.peers.channel import Channel, ClosedError


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_messages_arrive_in_order_however_they_were_cut(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.connection.sendall(b'{"a": 1}\n{"a"')
    assert other.receive(1) == {"a": 1}
    one.connection.sendall(b': 2}\n{"a": 3}\n')
    assert [other.receive(1), other.receive(1)] == [{"a": 2}, {"a": 3}]


def test_no_message_in_time_is_a_timeout_and_costs_nothing(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.connection.sendall(b'{"a"')
    with pytest.raises(TimeoutError):
        other.receive(0.05)
    with pytest.raises(TimeoutError):
        other.receive(-1)
    one.connection.sendall(b": 1}\n")
    assert other.receive(1) == {"a": 1}


def test_a_message_that_is_there_is_received_even_past_its_time(
    ends: tuple[Channel, Channel],
) -> None:
    _, other = ends
    other.pending = b'{"a": 1}\n'
    assert other.receive(-1) == {"a": 1}


def test_the_end_of_the_other_side_is_told(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.close()
    with pytest.raises(ClosedError):
        other.receive(1)
    with pytest.raises(ClosedError):
        other.send({"a": "b" * 10_000_000})
