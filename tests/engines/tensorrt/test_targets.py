"""Targets by name: what there is, what is refused and why, all at once."""

from __future__ import annotations

import pytest

from hasten import machine
from hasten.engines.tensorrt.targets import (
    FIRST,
    PRECISIONS,
    TARGETS,
    capability_of,
    check_targets,
    parse_targets,
)
from hasten.errors import HastenError, InputError, UnsupportedError
from hasten.quantization import schemes


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("sm89", ("sm89",)),
        ("sm120,sm86, SM89", ("sm86", "sm89", "sm120")),
        ("sm89,sm89", ("sm89",)),
        ("sm90", ("sm90",)),  # a target, though not one there is an engine for
        ("none", ()),
    ],
)
def test_parse(text: str, targets: tuple[str, ...]) -> None:
    assert parse_targets(text) == targets


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["'' is not a target"]),
        ("rtx4090", ["'rtx4090' is not a target"]),
        ("sm89,ada,8.9", ["'ada' is not a target", "'8.9' is not a target"]),
        ("none,sm89", ["'none' is not a target"]),
        ("sm8", ["'sm8' is not a target"]),
    ],
)
def test_no_targets(text: str, faults: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_targets(text)
    assert list(caught.value.faults) == faults
    assert "sm75, sm80, sm86, sm89, sm120, sm121" in caught.value.fix


def test_capability() -> None:
    assert capability_of("sm89") == (8, 9)
    assert capability_of("sm121") == (12, 1)


def refused(targets: tuple[str, ...], precision: str) -> HastenError:
    with pytest.raises(HastenError) as caught:
        check_targets(targets, precision)
    return caught.value


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_target_with_every_precision(precision: str) -> None:
    for target in TARGETS:
        if capability_of(target) >= FIRST[precision]:
            check_targets((target,), precision)
        else:
            error = refused((target,), precision)
            assert isinstance(error, UnsupportedError)
            assert f"target {target} " in error.faults[0]
            assert f"does not support {precision}" in error.faults[0]


def test_fp8_before_ada() -> None:
    error = refused(("sm86", "sm89"), "fp8")
    assert error.faults == ("target sm86 (Ampere: RTX 30, A10, A40) does not support fp8",)
    assert error.fix == (
        "remove sm86 (fp8 works on sm89, sm120, sm121), or export it separately in bf16"
    )
    assert "export it separately in fp16" in refused(("sm75",), "bf16").fix


@pytest.mark.parametrize(
    ("precision", "recipe"), [("fp8", "fp8"), ("bf16", "lossless"), ("fp16", "lossless")]
)
def test_hopper_is_named_with_what_runs_there(precision: str, recipe: str) -> None:
    error = refused(("sm90",), precision)
    assert isinstance(error, UnsupportedError)
    assert "sm90 (Hopper: H100, H200): TensorRT for RTX does not build" in error.faults[0]
    assert f'remove sm90; on this GPU, use the recipe "{recipe}"' in error.fix


def test_an_unknown_target_and_the_nearest() -> None:
    error = refused(("sm88",), "fp8")
    assert isinstance(error, InputError)
    assert error.faults == ("unknown target sm88",)
    assert "did you mean 'sm8" in error.fix


def test_all_faults_at_once() -> None:
    error = refused(("sm86", "sm87", "sm90"), "fp8")
    assert len(error.faults) == 3
    assert refused(("sm89",), "int4").faults == ("precision 'int4' is not one of bf16, fp16, fp8",)


def test_the_machine_knows_the_same_gpus_and_types() -> None:
    assert {capability_of(target) for target in TARGETS} == set(machine.RTX_CAPABILITIES)
    assert FIRST["bf16"] == machine.OLDEST_BF16_CAPABILITY
    assert FIRST["fp8"] == schemes.OLDEST_FP8
