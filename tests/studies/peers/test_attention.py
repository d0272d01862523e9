"""The trial of attention backends."""

from __future__ import annotations

from typing import Any

from studies.peers.attention import choose, try_backends
from studies.peers.workload import Workload

TIMES = {"a": {1: 2.0, 2: 2.0}, "b": {1: 1.0, 2: 3.0}, "c": {1: 9.0, 2: 9.0}}


def test_the_quickest_over_all_sizes_is_chosen_in_ratios_not_in_seconds() -> None:
    trial = try_backends(["a", "b", "c"], [1, 2], lambda name, count: TIMES[name][count])
    assert trial.chosen == "b"  # 1 × 3 < 2 × 2
    assert trial.milliseconds["a"] == [2000.0, 2000.0]
    assert not trial.refused


def test_a_backend_that_cannot_run_is_told_and_not_chosen() -> None:
    def seconds(name: str, count: int) -> float:
        if name == "b" and count == 2:
            raise RuntimeError("no kernel\nfor this")
        return TIMES[name][count]

    trial = try_backends(["a", "b", "c"], [1, 2], seconds)
    assert trial.chosen == "a"
    assert trial.refused == {"b": "RuntimeError: no kernel"}


def test_where_none_runs_the_first_one_stays() -> None:
    def seconds(name: str, count: int) -> float:
        raise RuntimeError

    assert try_backends(["a", "b"], [1], seconds).chosen == "a"


def test_on_a_cpu_what_needs_a_gpu_is_refused_and_the_choice_is_set(pipe: Any) -> None:
    pipe.register_modules(text_encoder=None, text_encoder_2=None)
    trial = choose(pipe, Workload("-", "cpu", "float32", (64, 128), 2, 1, 8))
    assert "_native_cudnn" in trial.refused
    assert [len(times) for times in trial.milliseconds.values()] == [2, 2]
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    assert processor._attention_backend.value == trial.chosen
