"""Rows by name, and which layers and steps a peer is told to take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies.peers.rows import KINDS, Spec, Unsupported, read_spec
from studies.peers.rows.cached import even_mask
from studies.peers.rows.float8 import check_fp8, is_quantized
from studies.peers.workload import Workload
from torch import nn

from hasten.errors import RecipeError
from hasten.recipe import preset_names

CPU = Workload("tiny", "cpu", "float32", (64,), 2, 1, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_a_function_that_is_there(kind: str) -> None:
    for package in KINDS[kind].packages:
        pytest.importorskip(package)
    assert callable(KINDS[kind].load())


def test_a_missing_package_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cache_dit", None)
    with pytest.raises(ImportError, match="cache_dit"):
        KINDS["cache-dit-eager"].load()


def test_a_cache_row_has_a_variant_for_each_number_of_steps() -> None:
    spec = read_spec("cache-dit-eager:18,10", [17])
    assert [spec.name(variant) for variant in spec.variants] == [
        "cache-dit-eager:18",
        "cache-dit-eager:10",
    ]
    assert read_spec("cache-dit-eager", [17, 13]).variants == ["17", "13"]


def test_other_rows_have_one(tmp_path: Path) -> None:
    assert read_spec("diffusers-compile", []).variants == [""]
    own = tmp_path / "own.toml"
    own.write_text('[quantize]\nscheme = "fp8"\n')
    assert read_spec(f"hasten:{own}", []) == Spec("hasten", str(own))
    assert read_spec("hasten:cache", []).name("") == "hasten:cache"
    assert read_spec("flux-fast:quick", []).argument == "quick"


def test_rows_of_eight_bits_are_known(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[quantize]\nscheme = "fp8"\n')
    eight = ["diffusers-torchao-fp8:all", "cache-dit-fp8-compile:18", f"hasten:{own}"]
    assert all(read_spec(text, []).eight_bits for text in eight)
    full = ["diffusers", "diffusers-compile", "cache-dit-eager:18", "hasten:cache"]
    assert not any(read_spec(text, []).eight_bits for text in full)


def test_a_recipe_that_is_none_is_an_error_before_anything_starts() -> None:
    with pytest.raises(RecipeError, match="no preset is called 'cahce'"):
        read_spec("hasten:cahce", [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pruna", "choose from diffusers, "),
        ("hasten", "name a preset"),
        ("diffusers-torchao-fp8:some", "takes all"),
        ("diffusers-compile:all", "takes no argument"),
        ("cache-dit-eager:many", "write cache-dit-eager:18"),
        ("cache-dit-eager:18,", "write cache-dit-eager:18"),
    ],
)
def test_a_row_that_is_none_says_what_would_be_one(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_spec(text, [18])


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_a_mask_computes_the_first_step_and_exactly_as_many_as_asked(
    both: tuple[int, int],
) -> None:
    steps, computed = both
    mask = even_mask(steps, computed)
    assert (len(mask), sum(mask), mask[0]) == (steps, computed, 1)
    gaps = "".join(map(str, mask)).split("1")[1:]
    assert max(map(len, gaps)) - min(map(len, gaps)) <= 1


@pytest.mark.parametrize("computed", [0, 51])
def test_a_mask_that_cannot_be_is_refused(computed: int) -> None:
    with pytest.raises(Unsupported, match="of 50"):
        even_mask(50, computed)


def test_fp8_takes_the_blocks_linears_and_modulations_only_when_told(pipe: Any) -> None:
    linears = [name for name, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)]
    config = pipe.transformer.config
    both = config.num_layers, config.num_single_layers
    plain = [name for name in linears if is_quantized(name, every=False)]
    assert len(plain) == 12 * both[0] + 5 * both[1]
    assert not any("norm" in name or "embed" in name for name in plain)
    every = {name for name in linears if is_quantized(name, every=True)}
    assert len(every - {*plain}) == 2 * both[0] + both[1]
    assert "norm_out.linear" not in every
    assert "proj_out" not in every


def test_fp8_on_a_cpu_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="needs a CUDA GPU"):
        check_fp8(CPU)


def test_the_default_recipes_are_presets_or_still_to_come() -> None:
    from studies.peers.run import PEERS, PRESETS, _default_rows

    rows = _default_rows()
    assert {*PEERS} <= {*rows}
    own = [row.removeprefix("hasten:") for row in rows if row.startswith("hasten:")]
    assert {*own} == {*PRESETS} & {*preset_names()}
    assert all(read_spec(row, [18]) for row in rows)
