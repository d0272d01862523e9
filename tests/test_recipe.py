"""Recipes: round trip, refusal of everything wrong at once, no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hasten.errors import HastenError, InputError, RecipeError
from hasten.passes.cache.plan import computed_steps
from hasten.recipe import (
    BudgetCache,
    Compile,
    IntervalCache,
    Offload,
    Recipe,
    ResidualCache,
    Sampling,
    ScheduleCache,
    _name_of,
    parse_size,
    preset_names,
    read_recipe,
    resolve,
)

sides = st.integers(1, 512).map(lambda n: 16 * n)
recipes = st.builds(
    Recipe,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    description=st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40),
    sampling=st.none()
    | st.builds(
        Sampling,
        steps=st.none() | st.integers(1, 1000),
        guidance=st.none() | st.floats(0, 100),
        size=st.none() | st.builds("{}x{}".format, sides, sides),
        max_sequence_length=st.none() | st.integers(1, 512),
    ),
    cache=st.none()
    | st.builds(BudgetCache, budget=st.integers(1, 1000))
    | st.builds(
        ScheduleCache,
        steps=st.just(9),
        compute=st.sets(st.integers(1, 8)).map(lambda steps: (0, *sorted(steps))),
        predictor=st.sampled_from(["reuse", "linear"]),
        sigmas=st.none() | st.just(tuple(1 - i / 9 for i in range(9))),
        fingerprint=st.none() | st.just("0123456789abcdef"),
        expected_error=st.none() | st.floats(0, 10),
        calibrated=st.booleans(),
    )
    | st.builds(
        ResidualCache,
        threshold=st.floats(0, exclude_min=True, allow_infinity=False),
        warmup_steps=st.integers(1, 1000),
        max_consecutive=st.integers(1, 1000),
        first_blocks=st.integers(1, 1000),
        predictor=st.sampled_from(["reuse", "linear"]),
    )
    | st.builds(
        IntervalCache,
        start_step=st.integers(0, 10),
        interval=st.integers(1, 1000),
        end_step=st.none() | st.integers(10, 1000),
        predictor=st.sampled_from(["reuse", "linear"]),
    ),
    compile=st.none()
    | st.builds(
        Compile,
        mode=st.sampled_from(["blocks", "full"]),
        dynamic=st.none() | st.booleans(),
    ),
    offload=st.none() | st.builds(Offload, kind=st.sampled_from(["none", "model"])),
)


@given(recipes)
def test_toml_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_named_and_described(name: str) -> None:
    preset = resolve(name)
    assert preset.name == name
    assert preset.description
    assert Recipe.from_toml(preset.to_toml()) == preset


def test_preset_cache_is_the_articles_and_fewer_steps_its_rival() -> None:
    cache = resolve("cache").cache
    assert cache is not None
    assert computed_steps(cache, 50) == 18
    sampling = resolve("fewer-steps").sampling
    assert sampling is not None
    assert sampling.steps == 18


def test_how_many_steps_an_adaptive_cache_computes_is_not_known_before() -> None:
    cache = Recipe.from_toml('[cache]\nkind = "residual"\nthreshold = 1').cache
    assert cache == ResidualCache(threshold=1.0)
    assert computed_steps(ResidualCache(), 50) is None


@pytest.mark.parametrize(
    ("toml", "faults"),
    [
        ("[cahe]\ninterval = 2", ["unknown key 'cahe' (did you mean 'cache'?)"]),
        ("[cache]\nintervall = 2", ["unknown key 'cache.intervall' (did you mean 'interval'?)"]),
        ("[cache]\ninterval = 0", ["cache.interval = 0"]),
        ('[cache]\ninterval = "3"', ['cache.interval = "3"']),
        ("[cache]\nstart_step = 1.5", ["cache.start_step = 1.5"]),
        ("[cache]\nstart_step = 5\nend_step = 2", ["end_step = 2 is before start_step = 5"]),
        ('[sampling]\nsize = "100x512"', ["width 100 is not a multiple of 16"]),
        ("[sampling]\nguidance = nan", ["sampling.guidance"]),
        ('[offload]\nkind = "disk"', ['offload.kind = "disk"']),
        ('name = "a b"', ['name = "a b"']),
        ('[cache]\nkind = "magic"', ['cache.kind = "magic"']),
        ("[cache]\nbudget = 0", ["cache.budget = 0"]),
        (
            '[cache]\nkind = "schedule"\nsteps = 5\ncompute = [1, 2]',
            ["must begin with step 0"],
        ),
        (
            '[cache]\nkind = "schedule"\nsteps = 5\ncompute = [0, 5]',
            ["stay below steps = 5"],
        ),
        (
            '[cache]\nkind = "schedule"\nsteps = 5\ncompute = [0, 2]\nweights = [[1.0]]',
            ["weights must have 2 entries"],
        ),
        ('[cache]\nkind = "residual"\nthreshold = 0.0', ["cache.threshold = 0.0"]),
        ('[cache]\nkind = "residual"\nthreshold = inf', ["cache.threshold = Infinity"]),
        (
            '[cache]\nkind = "residual"\nwarmup_steps = 0\nmax_consecutive = 0\nfirst_blocks = 0',
            ["cache.warmup_steps = 0", "cache.max_consecutive = 0", "cache.first_blocks = 0"],
        ),
        (
            '[cache]\nkind = "residual"\ntreshold = 0.1',
            ["unknown key 'cache.treshold' (did you mean 'threshold'?)"],
        ),
        (
            '[cache]\ninterval = 0\npredictor = "magic"\n[compile]\nmode = "fast"',
            ["cache.interval = 0", 'cache.predictor = "magic"', 'compile.mode = "fast"'],
        ),
        ("[cache", ["not valid TOML"]),
    ],
)
def test_every_fault_is_reported_at_once(toml: str, faults: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_toml(toml, source="my.toml")
    assert len(caught.value.faults) == len(faults)
    for fault in faults:
        assert any(fault in line for line in caught.value.faults), caught.value.faults
    assert all(line.startswith("my.toml: ") and "\n" not in line for line in caught.value.faults)
    assert caught.value.fix


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        resolve("cache").name = "other"  # type: ignore[misc]


def test_but_replaces_sections_and_validates() -> None:
    assert resolve("cache-compile").but(cache=None).cache is None
    with pytest.raises(ValidationError):
        resolve("cache").but(name="not a name")


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'cache-compile'\?"):
        resolve("cache-compil")


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "quick.toml"
    path.write_text("[cache]\ninterval = 4\n")
    assert resolve(path).name == "quick"
    assert resolve(str(path)) == read_recipe(path)
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(InputError, match="not UTF-16"):
        read_recipe(path)
    with pytest.raises(InputError, match="no such recipe file"):
        resolve(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="directory"):
        read_recipe(tmp_path)


def test_a_path_in_a_recipe_file_starts_at_the_file(tmp_path: Path) -> None:
    def path_of(written: str) -> str | None:
        (tmp_path / "engine.toml").write_text(f'[engine]\npath = "{written}"\n')
        engine = read_recipe(tmp_path / "engine.toml").engine
        return engine and engine.path

    assert path_of("flux") == str(tmp_path / "flux")
    assert path_of("/opt/flux") == "/opt/flux"
    assert path_of("~/flux") == "~/flux"
    plain = Recipe.from_dict({"engine": {"path": "flux"}}).engine
    assert plain is not None
    assert plain.path == "flux"


@pytest.mark.parametrize(
    "making", [{"max_size": "512x512"}, {"calibration": "smoothquant"}, {"verify": False}]
)
def test_a_finished_engine_is_not_told_how_to_be_made(making: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"engine: {next(iter(making))}: applies to exporting"):
        Recipe.from_dict({"engine": {"path": "flux", **making}})
    Recipe.from_dict({"engine": making})
    Recipe.from_dict({"engine": {"path": "flux", "calibration": "max", "verify": True}})


@pytest.mark.parametrize("text", ["512x512", "512X768", " 16×8192 "])
def test_sizes(text: str) -> None:
    width, height = parse_size(text)
    assert width % 16 == height % 16 == 0


@pytest.mark.parametrize("text", ["512", "x", "0x16", "512x513", "8208x16", "-16x16", "16x16x16"])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "nearest", "no_smaller"),
    [("100x518", "96x512", "112x528"), ("9000x1", "8192x16", "8192x16")],
)
def test_the_nearest_size(text: str, nearest: str, no_smaller: str) -> None:
    for at_most, size in ((False, nearest), (True, no_smaller)):
        with pytest.raises(InputError) as caught:
            parse_size(text, at_most=at_most)
        assert caught.value.fix == f"the closest valid size is {size}"


def test_the_json_schema_describes_every_section() -> None:
    schema = Recipe.json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    caches = [section for section in schema["$defs"] if section.endswith("Cache")]
    assert set(caches) == {"IntervalCache", "ScheduleCache", "BudgetCache", "ResidualCache"}
    assert schema["$defs"]["ResidualCache"]["properties"]["kind"]["const"] == "residual"


def test_reading_recipes_imports_no_torch() -> None:
    code = (
        "import sys, hasten; from hasten.recipe import resolve; resolve('cache');"
        "import hasten.passes.cache.plan; import hasten.models.defaults;"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_carry_faults_and_one_fix() -> None:
    error = HastenError(["one", "two"], "do this")
    assert error.faults == ("one", "two")
    assert str(error) == "one\ntwo\nfix: do this"


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("schnell-für-4090", "schnell-fur-4090"),
        ("my recipe", "my-recipe"),
        ("v1.2_a", "v1.2_a"),
        ("x" * 64, "x" * 64),
        ("x" * 65, "x" * 55 + "-9537c5fd"),
        ("紅", "recipe-"),
    ],
)
def test_a_file_of_any_name_gives_its_recipe_one(tmp_path: Path, stem: str, name: str) -> None:
    path = tmp_path / f"{stem}.toml"
    path.write_text("[cache]\n")
    assert resolve(path).name.startswith(name)


@given(st.text(min_size=1).filter(lambda stem: "\0" not in stem and "/" not in stem))
def test_every_stem_is_made_a_valid_name(stem: str) -> None:
    name = _name_of(stem)
    assert Recipe(name=name).name == name
    assert _name_of(name) == name


def test_a_copy_of_a_preset_is_called_as_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(resolve("cache").to_toml())
    assert resolve(path) == resolve("cache").but(name="mine")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_recipes_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "für zwei"\r\n[cache]\r\ninterval = 2\r\n', encoding)
    assert resolve(path).description == "für zwei"


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("a = " + "[" * 3000, "nested too deeply"),
        ("a = " + "[" * 20 + "]" * 20, "a: nested too deeply"),
        ("[sampling]\nsteps = " + "9" * 5000, "a number has thousands of digits"),
        (
            "[sampling]\nguidance = " + "9" * 400,
            "sampling.guidance: the number exceeds 64 bits",
        ),
        (
            "[cache]\ninterval = 0x" + "f" * 9000,
            "cache.interval: the number exceeds 64 bits",
        ),
        ('[engine]\npath = "a\\u0000"', "engine.path: contains the control character U\\+0000"),
        ('description = "a\\u001b[2J"', "description: contains the control character U\\+001B"),
        ('["\\u001b"]', "recipe: a key contains the control character U\\+001B"),
        ('[cache]\ninterval = "' + "x" * 10**5 + '"', "cache.interval = .* Input should be"),
        ("k" * 10**5 + " = 1", "unknown key 'kkk"),
        ("\n".join(f"k{i} = 1" for i in range(999)), "and 979 more like these"),
    ],
    ids=lambda value: value[:20],
)
def test_odd_values_are_faults_of_one_short_line(toml: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.from_toml(toml, source="mine.toml")
    assert all(len(fault) <= 400 for fault in caught.value.faults)
    assert len(caught.value.faults) <= 21
    assert caught.value.fix


@pytest.mark.parametrize("weight", [1e300, -1e30, 1000.1])
def test_weights_that_draw_black_pictures_are_refused(weight: float) -> None:
    cache = {"kind": "schedule", "steps": 2, "compute": [0, 1], "weights": [[1.0], [weight]]}
    with pytest.raises(RecipeError, match=r"than or equal to -?1000"):
        Recipe.from_dict({"cache": cache})


def test_which_recipes_change_nothing() -> None:
    assert Recipe(name="a", description="b").changes_nothing
    assert [name for name in preset_names() if resolve(name).changes_nothing] == ["baseline"]
