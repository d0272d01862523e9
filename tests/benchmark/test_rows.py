"""Which rows there are and in which order, whatever is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.benchmark.rows import PlannedRow, plan_rows, rival_of, rotated, with_rivals
from hasten.errors import Faults, InputError
from hasten.recipe import Compile, IntervalCache, Recipe, ResidualCache, Sampling, resolve


def planned(
    *names: str | Recipe, steps: int = 50, references: tuple[str, ...] = ("baseline",)
) -> list[PlannedRow]:
    faults = Faults()
    rows = plan_rows([resolve(name) for name in names], steps, references, faults)
    faults.raise_any()
    return list(rows)


def names(*args: Any, **kwargs: Any) -> list[str]:
    return [row.name for row in planned(*args, **kwargs)]


def test_the_default_table() -> None:
    assert names("baseline", "compile", "cache", "cache-compile") == [
        "baseline",
        "compile",
        "cache",
        "fewer-steps-18",
        "cache-compile",
        "cache-compile-fewer-steps-18",
        "baseline-again",
    ]


def test_an_engine_is_joined_by_its_graph_on_a_cpu_once() -> None:
    assert names("tensorrt-fp8") == [
        "baseline", "tensorrt-fp8", "tensorrt-fp8-onnxruntime", "baseline-again",
    ]  # fmt: skip
    _, asked, graph, _ = (row.recipe for row in planned("tensorrt-fp8"))
    assert graph.engine == asked.engine.model_copy(update={"kind": "onnxruntime"})
    assert names(graph) == ["baseline", "tensorrt-fp8-onnxruntime", "baseline-again"]
    assert names("tensorrt-fp8", graph) == names("tensorrt-fp8")


def test_the_baselines_come_unasked_and_once() -> None:
    assert names() == ["baseline", "baseline-again"]
    assert names("compile", "baseline", "compile") == ["baseline", "compile", "baseline-again"]


def test_a_rival_has_no_cache_and_the_computed_steps() -> None:
    rows = {row.name: row.recipe for row in planned("cache-compile", steps=8)}
    rival = rows["cache-compile-fewer-steps-4"]  # steps 0, 1, 2, 5
    assert rival.cache is None
    assert rival.compile == rows["cache-compile"].compile
    assert rival.sampling is not None
    assert rival.sampling.steps == 4
    assert rival.name == "cache-compile-fewer-steps-4"


def test_each_row_has_its_role_and_rivals_name_their_recipes() -> None:
    mine = Recipe(name="my-fewer-steps-idea", compile=Compile())
    roles = {row.name: (row.role, row.rival_of) for row in planned("cache", mine, "tensorrt-fp8")}
    assert roles == {
        "baseline": ("baseline", ()),
        "cache": ("recipe", ()),
        "fewer-steps-18": ("rival", ("cache",)),
        "my-fewer-steps-idea": ("recipe", ()),
        "tensorrt-fp8": ("recipe", ()),
        "tensorrt-fp8-onnxruntime": ("graph", ()),
        "baseline-again": ("baseline", ()),
    }


def test_the_rival_of_a_graph_is_a_graph_too() -> None:
    engine = resolve("tensorrt-fp8").but(name="both", cache=IntervalCache())
    roles = {row.name: row.role for row in planned(engine)}
    assert roles["both-onnxruntime-fewer-steps-18"] == "graph"
    assert roles["both-fewer-steps-18"] == "rival"


def test_a_recipe_that_is_given_twice_is_one_row_that_says_so() -> None:
    rows = {row.name: row for row in planned("baseline", "compile", "compile", "baseline")}
    assert list(rows) == ["baseline", "compile", "baseline-again"]
    assert rows["compile"].notes == ("given more than once, measured once",)
    assert rows["baseline"].notes == ()


def test_a_recipe_under_two_names_is_two_rows_and_the_second_says_so() -> None:
    twin, plain = resolve("compile").but(name="twin", description="x"), Recipe(name="plain")
    rows = {row.name: row.notes for row in planned("compile", twin, plain)}
    assert rows["compile"] == ()
    assert rows["twin"] == ("the same recipe as compile",)
    assert rows["plain"] == ("the same recipe as baseline",)


def test_a_given_recipe_that_is_the_rival_is_not_measured_twice() -> None:
    mine = Recipe(name="mine", sampling=Sampling(steps=18))
    rows = planned("cache", mine)
    assert [row.name for row in rows] == ["baseline", "cache", "mine", "baseline-again"]
    assert (rows[2].role, rows[2].rival_of) == ("recipe", ("cache",))


def test_a_rival_finds_a_free_name() -> None:
    rows = {
        row.name: row for row in planned("cache", Recipe(name="fewer-steps-18", compile=Compile()))
    }
    assert rows["fewer-steps-18-2"].rival_of == ("cache",)
    assert rows["fewer-steps-18"].role == "recipe"


def test_a_recipes_own_steps_decide_over_the_workloads() -> None:
    own = resolve("cache").but(sampling={"steps": 8})
    assert names(own, steps=50)[2] == "fewer-steps-4"


def test_two_caches_that_compute_equally_many_share_a_rival() -> None:
    linear = Recipe(name="linear", cache=IntervalCache(predictor="linear"))
    rows = planned("cache", linear)
    order = ["baseline", "cache", "fewer-steps-18", "linear", "baseline-again"]
    assert [row.name for row in rows] == order
    assert rows[2].rival_of == ("cache", "linear")


def test_a_rival_that_keeps_more_than_its_steps_is_called_after_its_recipe() -> None:
    strong = Recipe(name="strong", cache=IntervalCache(), sampling=Sampling(guidance=7.0))
    rows = {row.name: row.recipe for row in planned("cache", strong)}
    assert rows["fewer-steps-18"].sampling == Sampling(steps=18)
    assert rows["strong-fewer-steps-18"].sampling == Sampling(steps=18, guidance=7.0)


def test_the_longest_name_still_has_a_valid_rival() -> None:
    recipe = Recipe(name="x" * 64, cache=IntervalCache(), compile=Compile())
    rival = rival_of(recipe, 50)
    assert rival is not None
    assert len(rival.name) == 64
    assert rival.name.endswith("x-fewer-steps-18")


def test_other_references_run_before_what_is_scored_against_them() -> None:
    order = names("cache", "compile", references=("baseline", "compile"))
    assert order == ["baseline", "compile", "cache", "fewer-steps-18", "baseline-again"]


ADAPTIVE = Recipe(name="adaptive", cache=ResidualCache())


def test_a_cache_that_decides_as_it_goes_gets_its_rival_once_measured() -> None:
    rows = planned("cache", ADAPTIVE, "compile")
    order = ["baseline", "cache", "fewer-steps-18", "adaptive", "compile", "baseline-again"]
    assert [row.name for row in rows] == order
    measured = {"baseline": 50.0, "cache": 18.0}
    assert with_rivals(rows, 50, measured) == tuple(rows), "nothing is known of it yet"
    joined = with_rivals(rows, 50, {**measured, "adaptive": 20.6})
    assert [row.name for row in joined] == [*order[:4], "fewer-steps-21", *order[4:]]
    assert joined[4].recipe.cache is None
    assert joined[4].recipe.sampling == Sampling(steps=21)
    assert joined[4].recipe.name == "fewer-steps-21"
    assert with_rivals(joined, 50, {**measured, "adaptive": 20.6}) == joined


def test_a_measured_rival_that_is_there_already_is_not_run_twice() -> None:
    rows = planned("cache", ADAPTIVE)
    joined = with_rivals(rows, 50, {"adaptive": 17.7})
    assert [row.name for row in joined] == [row.name for row in rows]
    assert joined[2].rival_of == ("cache", "adaptive")
    both = planned(ADAPTIVE, Recipe(name="other", cache=ResidualCache(threshold=0.2)))
    joined = with_rivals(both, 50, {"adaptive": 20.0, "other": 20.4})
    assert [row.name for row in joined].count("fewer-steps-20") == 1
    assert len(joined) == len(both) + 1


def test_a_measured_rival_finds_a_free_name() -> None:
    long = Recipe(name="x" * 64, cache=ResidualCache(), compile=Compile())
    taken = [Recipe(name="fewer-steps-20", compile=Compile()), ADAPTIVE, long]
    rows = planned(*taken)
    joined = with_rivals(rows, 50, {"adaptive": 20.0, "x" * 64: 1.4})
    added = [row for row in joined if row not in rows]
    assert [row.name for row in added] == ["fewer-steps-20-2", "x" * 50 + "-fewer-steps-1"]
    assert all(row.recipe.name == row.name for row in added)


@pytest.mark.parametrize(
    ("recipes", "references", "word"),
    [
        ([Recipe(name="cache", compile=Compile())], (), "'cache'"),
        ([Recipe(name="baseline", compile=Compile())], (), "'baseline'"),
        ([Recipe(name="baseline-again")], (), "'baseline-again'"),
        ([], ("baseline", "compile"), "reference 'compile'"),
    ],
)
def test_clashes_are_input_errors(
    recipes: list[Recipe], references: tuple[str, ...], word: str
) -> None:
    with pytest.raises(InputError, match=word) as caught:
        planned("cache", *recipes, references=references)
    assert caught.value.fix


caches = st.builds(
    IntervalCache,
    start_step=st.integers(0, 60),
    interval=st.integers(1, 60),
    predictor=st.sampled_from(["reuse", "linear"]),
)
recipes = st.builds(
    Recipe,
    name=st.sampled_from(["a", "b", "c", "d-1", "e.f"]),
    cache=st.none() | caches,
    compile=st.none() | st.just(Compile()),
)


@settings(deadline=None)  # other work on the machine is no failure
@given(chosen=st.lists(recipes, max_size=5, unique_by=lambda r: r.name), steps=st.integers(1, 60))
def test_every_plan(chosen: list[Recipe], steps: int) -> None:
    rows = planned(*chosen, steps=steps)
    order = [row.name for row in rows]
    assert order[0] == "baseline"
    assert order[-1] == "baseline-again"
    assert len(set(order)) == len(order)
    assert [name for name in order if name in {r.name for r in chosen}] == [r.name for r in chosen]
    for row in rows:
        assert row.name in (row.recipe.name, "baseline-again")
        rival = rival_of(row.recipe, steps)
        assert (rival is None) == (row.recipe.cache is None)
        if rival is not None:
            assert rival.recipe.cache is None
            assert rival.recipe.sampling is not None
            assert 1 <= (rival.recipe.sampling.steps or 0) <= steps
            (covering,) = (other for other in rows if row.name in other.rival_of)
            assert order.index(covering.name) <= order.index(row.name) + 1


@settings(deadline=None)  # other work on the machine is no failure
@given(count=st.integers(0, 6), turn=st.integers(0, 20))
def test_a_rotation_moves_only_what_is_between_the_baselines(count: int, turn: int) -> None:
    rows = [PlannedRow(str(n), Recipe()) for n in range(count + 2)]
    order = rotated(rows, turn)
    assert sorted(row.name for row in order) == sorted(row.name for row in rows)
    assert (order[0], order[-1]) == (rows[0], rows[-1])
    if count:
        assert order[1] == rows[1 + turn % count]
    assert rotated(rows, 0) == tuple(rows)
