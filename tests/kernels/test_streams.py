from __future__ import annotations

import torch
from hypothesis import given

from hasten.kernels.streams import Streams
from tests.kernels.cases import STREAMS


@given(STREAMS)
def test_the_two_orders_are_each_others_inverse(streams: Streams) -> None:
    tokens = torch.arange(streams.rows * 3).view(streams.batch, -1, 3)
    rows = streams.by_stream(tokens)
    assert rows.shape == (streams.rows, 3)
    assert torch.equal(streams.by_sequence(rows), tokens)


@given(STREAMS)
def test_text_rows_come_first(streams: Streams) -> None:
    is_text = torch.arange(streams.text + streams.image) < streams.text
    rows = streams.by_stream(is_text.expand(streams.batch, -1))
    assert rows[: streams.text_rows].all()
    assert not rows[streams.text_rows :].any()


@given(STREAMS)
def test_per_row_values_follow_their_sequence(streams: Streams) -> None:
    sequence = torch.arange(streams.batch)[:, None]
    rows = streams.per_row(sequence, 100 + sequence)
    tokens = streams.by_sequence(rows)[..., 0]
    expected = sequence + 100 * (torch.arange(tokens.shape[1]) >= streams.text)
    assert torch.equal(tokens, expected)
