"""The order of token rows in the fused blocks: all text rows, then all image rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Streams(NamedTuple):
    """Rows of a batch of token sequences, one stream after the other.

    `batch` sequences have `text` and then `image` tokens each. Rows are ordered by stream, then by
    sequence, so that each stream's rows are one contiguous matrix whatever the batch; attention
    wants them by sequence (batch × (text + image)). With a batch of one both orders are the same.
    """

    batch: int
    text: int
    image: int

    @property
    def text_rows(self) -> int:
        return self.batch * self.text

    @property
    def rows(self) -> int:
        return self.batch * (self.text + self.image)

    def by_stream(self, values: Tensor) -> Tensor:
        """batch × (text + image) × … -> rows × …"""
        if self.batch == 1:
            return values[0]
        parts = torch.split(values, [self.text, self.image], dim=1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def by_sequence(self, rows: Tensor) -> Tensor:
        """rows × … -> batch × (text + image) × …"""
        if self.batch == 1:
            return rows.unsqueeze(0)
        text, image = torch.split(rows, [self.text_rows, self.rows - self.text_rows])
        parts = [part.reshape(self.batch, -1, *rows.shape[1:]) for part in (text, image)]
        return torch.cat(parts, dim=1)

    def per_row(self, text: Tensor, image: Tensor) -> Tensor:
        """Values of each sequence for either stream (batch × … each) -> rows × …"""
        return torch.cat(
            [text.repeat_interleave(self.text, 0), image.repeat_interleave(self.image, 0)]
        )
