"""Weights that cannot be read where they are: caches need none, and what needs them says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import hasten
from hasten.errors import HastenError
from hasten.models.fingerprint import fingerprint, unreadable
from hasten.recipe import Recipe

Call = Callable[..., Tensor]
Unreadable = Callable[[Any, Path], None]

CACHE = {"cache": {"interval": 2}}
READERS: dict[str, dict[str, Any]] = {
    "quantize": {"quantize": {"scheme": "int8"}},
    "fuse": {"fuse": {}},
}
PRODUCTS = ("aten.detach", "aten.t.", "aten.mm", "aten.addmm", "aten.linear")


class Packed(Tensor):
    """As a quantising library's tensor: it multiplies, and anything else asked of it raises."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> Packed:
        made = Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)  # type: ignore[attr-defined]
        assert isinstance(made, Packed)
        made.plain = plain
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Packed({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not str(func).startswith(PRODUCTS):
            raise NotImplementedError(f"{func} of a packed tensor")

        def plain(value: Any) -> Any:
            return value.plain if isinstance(value, Packed) else value

        result = func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
        return Packed(result) if str(func).startswith(PRODUCTS[:2]) else result


def packed(transformer: Any, _folder: Path) -> None:
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name:
            module.weight = nn.Parameter(Packed(module.weight.detach()), requires_grad=False)


def grouped(transformer: Any, folder: Path) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(
        transformer,
        onload_device=cpu,
        offload_device=cpu,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )


def one_by_one(transformer: Any, _folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(transformer, execution_device=torch.device("cpu"))


WAYS = {"packed": packed, "grouped": grouped, "one by one": one_by_one}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_cache_needs_no_weights(
    way: Unreadable, make_pipe: Any, call: Call, tmp_path: Path
) -> None:
    plain, other = make_pipe(), make_pipe()
    way(other.transformer, tmp_path)
    assert unreadable(other.transformer)
    assert torch.equal(call(other), call(plain))
    fast = hasten.optimize(other, Recipe.from_dict(CACHE))
    assert torch.equal(call(fast), call(hasten.optimize(plain, Recipe.from_dict(CACHE))))


REFUSED = [
    ("packed", "quantize", "Packed"),
    ("grouped", "quantize", "enable_group_offload"),
    ("grouped", "fuse", "enable_group_offload"),
    ("one by one", "quantize", "enable_sequential_cpu_offload"),
    ("one by one", "fuse", "enable_sequential_cpu_offload"),
]


@pytest.mark.parametrize(("way", "section", "said"), REFUSED)
def test_what_reads_weights_says_why_it_cannot(
    way: str, section: str, said: str, pipe: Any, call: Call, tmp_path: Path
) -> None:
    WAYS[way](pipe.transformer, tmp_path)
    expected = call(pipe)
    with pytest.raises(HastenError, match=said):
        hasten.optimize(pipe, Recipe.from_dict(READERS[section]))
    assert torch.equal(call(pipe), expected)


def test_the_table_is_made_by_the_models_own_linears(pipe: Any, call: Call, tmp_path: Path) -> None:
    packed(pipe.transformer, tmp_path)
    expected = call(pipe)
    fast = hasten.optimize(pipe, Recipe.from_dict(READERS["fuse"]))
    torch.testing.assert_close(call(fast), expected, rtol=1e-4, atol=1e-4)


def test_a_fingerprint_is_of_values_and_not_of_where_they_are(make_pipe: Any) -> None:
    one, two = make_pipe().transformer, make_pipe().transformer
    assert fingerprint(one) == fingerprint(two)
    with torch.no_grad():
        two.proj_out.weight.mul_(1.5)
    assert fingerprint(one) != fingerprint(two)
