"""The workload of every row, shared by the coordinator and its workers. Does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """One image at a time, `steps` steps, at each of `sizes` (square, pixels) in `rounds` rounds.

    tokens: length of the text embeddings, which are random and differ for every image.
    """

    model: str
    device: str
    dtype: str
    sizes: tuple[int, ...]
    steps: int
    rounds: int
    tokens: int
    guidance: float = 3.5

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Workload:
        return cls(**{**data, "sizes": tuple(data["sizes"])})
