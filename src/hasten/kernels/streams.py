"""The order of token rows in the fused blocks: all text rows, then all image rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Streams(NamedTuple):
    """The row order of a batch of token sequences: by stream, then by sequence.

    Each stream's rows form one contiguous matrix for any batch size. Attention needs the rows by
    sequence (batch × (text + image)). With a batch size of one, both orders are the same.

    Attributes:
        batch: The number of sequences.
        text: Text tokens per sequence, which come first.
        image: Image tokens per sequence.
    """

    batch: int
    text: int
    image: int

    @property
    def text_rows(self) -> int:
        """Number of text rows in the batch."""
        return self.batch * self.text

    @property
    def rows(self) -> int:
        """Number of all rows in the batch."""
        return self.batch * (self.text + self.image)

    def by_stream(self, values: Tensor) -> Tensor:
        """Reorder batch × (text + image) × … to rows × …"""
        if self.batch == 1:
            return values[0]
        parts = torch.split(values, [self.text, self.image], dim=1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def by_sequence(self, rows: Tensor) -> Tensor:
        """Reorder rows × … to batch × (text + image) × …"""
        if self.batch == 1:
            return rows.unsqueeze(0)
        text, image = torch.split(rows, [self.text_rows, self.rows - self.text_rows])
        parts = [part.reshape(self.batch, -1, *rows.shape[1:]) for part in (text, image)]
        return torch.cat(parts, dim=1)

    def per_row(self, text: Tensor, image: Tensor) -> Tensor:
        """Repeat per-sequence values of each stream (batch × … each) for its rows: rows × …"""
        return torch.cat(
            [text.repeat_interleave(self.text, 0), image.repeat_interleave(self.image, 0)]
        )
