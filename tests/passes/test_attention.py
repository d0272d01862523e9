"""The chosen backend reaches every layer that computes attention, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import hasten
from hasten import Recipe, UnsupportedError
from hasten.passes import attention
from hasten.passes.attention import Attend

Call = Callable[..., torch.Tensor]

CUDA = torch.device("cuda")
SHAPE = (1, 12, 2, 16)


def processors(transformer: Any) -> list[Any]:
    return list(transformer.attn_processors.values())


def backends(transformer: Any) -> set[str | None]:
    return {processor._attention_backend for processor in processors(transformer)}


def recipe(backend: str, **sections: Any) -> Recipe:
    return Recipe.from_dict({"attention": {"backend": backend}, **sections})


@pytest.fixture
def shapes_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Batch and tokens of every choice; the choice is "math"."""
    shapes: list[tuple[int, int]] = []

    def choose(attend: Attend, shape: Any, dtype: torch.dtype, device: torch.device) -> str:
        shapes.append(shape[:2])
        assert shape[2:] == (2, 16)
        return "math"

    monkeypatch.setattr(Attend, "backend_for", choose)
    return shapes


@pytest.mark.parametrize("backend", ["native", "math"])
def test_a_named_backend_is_set_once_on_layers_of_our_own(
    backend: str, make_pipe: Callable[[], Any], call: Call
) -> None:
    pipe = make_pipe()
    expected, before = call(pipe), processors(pipe.transformer)
    fast = hasten.optimize(pipe, recipe(backend), copy=True)
    name = {"native": "native", "math": "_native_math"}[backend]
    assert backends(fast.transformer) == {name}
    assert "forward" not in fast.transformer.__dict__
    assert backends(pipe.transformer) == {None}, "the other pipeline's processors"
    torch.testing.assert_close(call(fast), expected)
    assert processors(pipe.transformer) == before
    fast.restore()
    assert processors(fast.transformer) == before


def test_auto_chooses_by_the_shape_of_each_call(shapes_seen: Any, pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = hasten.optimize(pipe, recipe("auto"))
    torch.testing.assert_close(call(fast, num_inference_steps=6), expected)
    assert shapes_seen == [(1, 8 + 4)] * 6
    assert backends(pipe.transformer) == {"_native_math"}
    call(fast, prompt=["a", "b"], height=48, width=64, num_inference_steps=1)
    assert shapes_seen[-1] == (2, 8 + 12)
    fast.restore()
    assert backends(pipe.transformer) == {None}
    assert "forward" not in pipe.transformer.__dict__


def test_auto_reaches_original_blocks_under_the_table(
    shapes_seen: Any, pipe: Any, call: Call
) -> None:
    """The fused forward runs the blocks itself, past the transformer's forward."""
    expected = call(pipe)
    fast = hasten.optimize(pipe, recipe("auto", fuse={"kernels": "off"}))
    torch.testing.assert_close(call(fast), expected, rtol=1e-4, atol=1e-5)
    assert set(shapes_seen) == {(1, 8 + 4)}
    assert backends(pipe.transformer) == {"_native_math"}


def test_a_named_backend_reaches_blocks_under_the_residual_cache(pipe: Any, call: Call) -> None:
    """That cache runs the blocks itself, too."""
    seen: set[str | None] = set()
    before = FluxAttnProcessor.__call__

    class Watched(FluxAttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            seen.add(self._attention_backend)
            return before(self, *args, **kwargs)

    pipe.transformer.set_attn_processor(Watched())
    call(hasten.optimize(pipe, recipe("math", cache={"kind": "residual"})))
    assert seen == {"_native_math"}


def test_undoing_leaves_processors_that_somebody_put_in_since(pipe: Any) -> None:
    fast = hasten.optimize(pipe, recipe("math"))
    mine = FluxAttnProcessor()
    block = pipe.transformer.transformer_blocks[0]
    block.attn.set_processor(mine)
    fast.restore()
    assert block.attn.processor is mine


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"cudnn": 3.0, "flash": 1.0, "efficient": 2.0}, "flash"),
        ({"cudnn": float("inf"), "flash": float("inf"), "efficient": 2.0}, "efficient"),
        ({"cudnn": float("inf"), "flash": float("inf"), "efficient": float("inf")}, "native"),
    ],
    ids=["fastest", "only one", "none"],
)
def test_a_trial_a_shape_and_dtype(
    times: dict[str, float], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def seconds(name: str, *qkv: torch.Tensor) -> float:
        tried.append(name)
        return times[name]

    monkeypatch.setattr(attention, "_random", lambda *given: [torch.zeros(1)] * 3)
    monkeypatch.setattr(attention, "_seconds", seconds)
    attend = Attend("auto")
    for _ in range(2):
        assert attend.backend_for(SHAPE, torch.bfloat16, CUDA) == best
    assert len(tried) == 3
    attend.backend_for((2, *SHAPE[1:]), torch.bfloat16, CUDA)
    attend.backend_for(SHAPE, torch.float32, CUDA)  # which not all of them know
    assert len(tried) == 9


def test_a_backend_that_cannot_do_it_loses_its_trial() -> None:
    q = torch.randn(SHAPE)
    assert attention._seconds("cudnn", q, q, q) == float("inf")


def test_a_trial_leaves_the_users_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    q, k, v = attention._random(SHAPE, torch.float32, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert q.shape == SHAPE
    assert not torch.equal(q, k)
    assert not torch.equal(k, v)


def test_the_product_is_torchs_own() -> None:
    q, k, v = (torch.randn(2, 5, 3, 8) for _ in range(3))
    expected = torch.softmax(torch.einsum("blhd,bmhd->bhlm", q, k) / 8**0.5, -1)
    for backend in ("native", "math", "flash", "auto"):
        torch.testing.assert_close(
            Attend(backend)(q, k, v), torch.einsum("bhlm,bmhd->blhd", expected, v)
        )


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_a_gpus_kernels_are_refused_on_a_cpu(backend: str, pipe: Any) -> None:
    with pytest.raises(UnsupportedError, match="NVIDIA GPU, and this is cpu") as caught:
        hasten.optimize(pipe, recipe(backend))
    assert '"native"' in caught.value.fix
    assert processors(pipe.transformer)[0]._attention_backend is None
