"""The rows by name: each takes a pipeline as it was loaded and returns what to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from studies.peers.rows.applied import Applied, Unsupported, one_line
from studies.peers.workload import Workload

from hasten.recipe import resolve

__all__ = ["BASE", "KINDS", "Applied", "Kind", "Spec", "Unsupported", "one_line", "read_spec"]

BASE = "diffusers"
"""The row that all ratios are to."""

Apply = Callable[[Any, str, Workload], Applied]


@dataclass(frozen=True)
class Kind:
    """Where a row is made (module:function), what it imports, and what its argument may be.

    choices: words, of which it may have one; steps: numbers of computed steps, each its own
    variant; recipe: a hasten recipe, which must be there. eight_bits: its weights end up smaller
    than they were loaded.
    """

    function: str
    packages: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    steps: bool = False
    recipe: bool = False
    eight_bits: bool = False

    def load(self) -> Apply:
        """Import what the row needs and return its function; ImportError says what is missing."""
        for package in self.packages:
            import_module(package)
        module, _, name = self.function.partition(":")
        apply: Apply = getattr(import_module(f"studies.peers.rows.{module}"), name)
        return apply


FP8 = ("torchao.quantization",)
DIT = ("cache_dit",)
KINDS = {
    BASE: Kind("plain:eager"),
    "diffusers-compile": Kind("plain:compiled"),
    "diffusers-torchao-fp8": Kind("float8:compiled_fp8", FP8, ("all", "untuned"), eight_bits=True),
    "flux-fast": Kind("flux_fast:flux_fast", FP8, ("all", "quick")),  # fusing copies weights
    "cache-dit-eager": Kind("cached:cached_eager", DIT, steps=True),
    "cache-dit-fp8-compile": Kind("cached:cached_fp8", FP8 + DIT, steps=True, eight_bits=True),
    "cache-dit-fp8-untuned": Kind("cached:cached_untuned", FP8 + DIT, steps=True, eight_bits=True),
    "cache-dit-own-fp8": Kind("cached:cached_own", FP8 + DIT, steps=True, eight_bits=True),
    "hasten": Kind("own:optimized", recipe=True),
}


@dataclass(frozen=True)
class Spec:
    """A row as it is asked for: KIND or KIND:ARGUMENT."""

    kind: str
    argument: str = ""

    @property
    def text(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else self.kind

    @property
    def eight_bits(self) -> bool:
        """Whether less memory is needed once the row is set up than to load its weights."""
        kind = KINDS[self.kind]
        return resolve(self.argument).quantize is not None if kind.recipe else kind.eight_bits

    @property
    def variants(self) -> list[str]:
        """What one process measures one after the other; [""] where there is one thing alone."""
        return self.argument.split(",") if KINDS[self.kind].steps else [""]

    def name(self, variant: str) -> str:
        """How the variant's row is called."""
        return f"{self.kind}:{variant}" if variant else self.text


def read_spec(text: str, computed: list[int]) -> Spec:
    """A row by its text; a cache row without numbers gets `computed`. ValueError, or HastenError
    for a recipe, says what is wrong with it."""
    name, _, argument = text.partition(":")
    if name not in KINDS:
        raise ValueError(f"no row is called {name!r}: choose from {', '.join(KINDS)}")
    kind = KINDS[name]
    if kind.steps:
        argument = argument or ",".join(map(str, computed))
        if not all(part.isdigit() for part in argument.split(",")):
            raise ValueError(f"{text}: write {name}:18 or {name}:18,10")
    elif kind.recipe:
        if not argument:
            raise ValueError(f"{text}: name a preset or a .toml file, e.g. hasten:cache-compile")
        resolve(argument)
    elif argument not in ("", *kind.choices):
        known = ", ".join(kind.choices) or "no argument"
        raise ValueError(f"{text}: {name} takes {known}")
    return Spec(name, argument)
