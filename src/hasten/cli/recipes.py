"""`hasten recipes`: list the presets, show one, check a file, print the schema."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli.options import Debug, Json, with_call
from hasten.errors import HastenError, RecipeError, unsupported

if TYPE_CHECKING:
    from hasten.machine import Machine
    from hasten.recipe import Recipe
    from hasten.settings import CallOptions

recipes = typer.Typer(
    help="Presets by name, and checks of your own recipe files.", rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(help="A preset's name or a .toml file.", show_default=False)]


@recipes.callback(invoke_without_command=True)
def _list_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@recipes.command("list")
def list_recipes(as_json: Json = False, debug: Debug = False) -> None:
    """Every preset, in the order of their use: speed, closeness and hardware."""
    from hasten.cli.terminal import print_table, print_text
    from hasten.presets import GUIDES, MEASURED
    from hasten.recipe import resolve

    presets = [(resolve(name).description, name, guide) for name, guide in GUIDES.items()]
    if as_json:
        named = [{"name": name, "description": said} for said, name, _ in presets]
        print(json.dumps([one | GUIDES[one["name"]]._asdict() for one in named]))
        return
    head = ("recipe", "speed", "images", "needs", "what it does")
    rows = [(name, *guide, said) for said, name, guide in presets]
    print_table(head, rows, right=" r", drop=("what it does", "images"))
    print()
    print_text(MEASURED)


@recipes.command("show")
def show_recipe(name: Name, as_json: Json = False, debug: Debug = False) -> None:
    """Print a recipe as TOML (or JSON), to read or to start your own from.

    A recipe that is read from a file is called as the file, whatever its key name says.
    """
    from hasten.recipe import resolve

    recipe = resolve(name)
    if as_json:
        print(json.dumps(recipe.model_dump(exclude_none=True), indent=2))
    else:
        print(recipe.to_toml(), end="")


@recipes.command("check")
@with_call("device")
def check_recipe(
    name: Name,
    *,
    call: CallOptions,
    schema_only: Annotated[
        bool, typer.Option("--schema-only", help="Do not look at this machine.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say everything that is wrong with a recipe, and whether it can run on this machine."""
    from hasten.cli.terminal import print_text
    from hasten.recipe import resolve

    try:
        recipe = resolve(name)
    except RecipeError as error:
        if as_json:
            print(json.dumps({"valid": False, "works_here": None, "faults": list(error.faults)}))
        raise
    where, problems_here = ("", []) if schema_only else _problems_here(recipe, call.device)
    if as_json:
        works = None if schema_only else not problems_here
        faults = [fault for fault, _ in problems_here]
        result = {"valid": True, "works_here": works, "faults": faults}
        print(json.dumps(result | {"changes_nothing": recipe.changes_nothing}))
    if problems_here:
        raise unsupported((f"{name}: {fault}", fix) for fault, fix in problems_here)
    if not as_json:
        here = f", and works here on {where}" if where else ""
        nothing = "; it has no sections, so it changes nothing" if recipe.changes_nothing else ""
        print_text(f"{name}: valid{here}{nothing}")


@recipes.command("schema")
def print_schema(debug: Debug = False) -> None:
    """Print the JSON schema of recipe files, for editors."""
    from hasten.recipe import Recipe

    print(json.dumps(Recipe.json_schema(), indent=2))


def _problems_here(recipe: Recipe, device: str) -> tuple[str, list[tuple[str, str]]]:
    """The device meant, and what of the recipe it cannot do."""
    from hasten.check import problems
    from hasten.machine import machine

    here = machine()
    device = here.device_named(device)
    missing = here.device_problem(device)
    if missing is not None:
        return device, [missing]
    own = problems(recipe, here, device.partition(":")[0])
    return device, [*own, *_export_problems(recipe, here, device)]


def _export_problems(recipe: Recipe, here: Machine, device: str) -> list[tuple[str, str]]:
    """What is wrong with what lies at `engine.path`, as far as its manifest says."""
    if recipe.engine is None or recipe.engine.path is None:
        return []
    from hasten.engines.load import read_export

    gpu = here.gpu(device) if recipe.engine.kind == "tensorrt" else None
    target = None if gpu is None else "sm{}{}".format(*gpu.capability)
    try:
        read_export(recipe.engine, target)
    except HastenError as error:
        return [(fault, error.fix) for fault in error.faults]
    return []
