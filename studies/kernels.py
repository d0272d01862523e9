"""Check and time the fused kernels at FLUX.1's shapes on a GPU, compared with inductor.

    python -m studies.kernels RESULTS.json

For each kernel: its error against float64, the share of FP8 codes that differ from the torch
reference's, the time of one call, of inductor's version of the reference, and of moving its bytes
(each input read once, each output written once) at the bandwidth of a large copy on this GPU. Calls
are timed in CUDA graphs, each on different inputs, so that no inputs are in the cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.benchmark.environment import detect
from hasten.kernels import gelu_concat, norm_modulate, qk_norm_rope
from hasten.kernels.quantize import FP8, LIMITS
from hasten.kernels.streams import Streams

WIDTH, HEADS, HIDDEN = 3072, 24, 12288
SHAPES = (Streams(1, 512, 1024), Streams(1, 512, 4096), Streams(2, 512, 1024))
CALLS = 8  # in a graph, on as many sets of inputs
EPS = 1e-6
Codes = torch.dtype | None


def main() -> None:
    torch.manual_seed(0)
    rows = []
    bandwidth = copy_bandwidth()
    for streams in SHAPES:
        for name, case in cases(streams):
            rows.append({"kernel": name, **streams._asdict(), **measured(case, bandwidth)})
            print(_line(rows[-1]), flush=True)
    result = {"schema": 1, "copy_tb_s": bandwidth / 1e12, "rows": rows}
    result["environment"] = detect("tiny", "cuda", "bfloat16").environment.model_dump(mode="json")
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


class Case:
    """One kernel on one set of shapes: how to make inputs, and the three ways to compute."""

    def __init__(
        self,
        inputs: Callable[[], tuple[Any, ...]],
        kernel: Callable[..., tuple[Tensor, Tensor]],
        reference: Callable[..., tuple[Tensor, Tensor]],
        exact: Callable[..., tuple[Tensor, Tensor]],
        bytes_moved: int,
    ) -> None:
        self.inputs = inputs
        self.kernel = kernel
        self.reference = reference
        self.exact = exact
        self.bytes_moved = bytes_moved


def cases(streams: Streams) -> list[tuple[str, Case]]:
    """Every kernel as the blocks use it."""
    found = []
    for codes, kind in ((None, "bf16"), (FP8, "FP8"), (torch.int8, "int8")):
        out = 1 if codes else 2
        for has_delta in (False, True):
            moved = streams.rows * WIDTH * ((6 if has_delta else 2) + out)
            name = f"norm + modulate{', gated residual' if has_delta else ''} → {kind}"
            found.append((name, norm_case(streams, has_delta, codes, moved)))
        for left, right in ((True, True), (True, False), (False, True)):
            if right or codes:
                width = WIDTH * left + HIDDEN * right
                name = " + ".join(["attention"] * left + ["gelu(hidden)"] * right) + f" → {kind}"
                moved = streams.rows * width * (2 + out)
                found.append((name, gelu_case(streams, left, right, codes, moved)))
    found.append(("RMSNorm + RoPE of q, k", rope_case(streams)))
    return found


def norm_case(streams: Streams, has_delta: bool, codes: Codes, moved: int) -> Case:
    offsets = [part * WIDTH for part in range(6)]

    def inputs() -> tuple[Any, ...]:
        x = _random(streams.rows, WIDTH)
        delta = _random(streams.rows, WIDTH) if has_delta else None
        return x, delta, _random(streams.batch, 6 * WIDTH)

    def call(function: Any, *, dtype: torch.dtype | None = None) -> Any:
        extra = {} if dtype is None else {"dtype": dtype}

        def run(x: Tensor, delta: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor]:
            kept = x.to(dtype) if dtype == torch.float64 else x
            if dtype == torch.float64:
                return function(kept, delta, table, offsets, streams, None, EPS, **extra)
            return function(kept, delta, table, offsets, streams, codes, EPS, **extra)

        return run

    return Case(
        inputs,
        call(norm_modulate.norm_modulate_triton),
        call(norm_modulate.norm_modulate_reference),
        call(norm_modulate.norm_modulate_reference, dtype=torch.float64),
        moved,
    )


def gelu_case(streams: Streams, left: bool, right: bool, codes: Codes, moved: int) -> Case:
    def inputs() -> tuple[Any, ...]:
        tokens = streams.text + streams.image
        attention = _random(streams.batch, tokens, WIDTH) if left else None
        hidden = _random(streams.rows, 3 * WIDTH + HIDDEN)[:, 3 * WIDTH :] if right else None
        return attention, hidden

    def exact(attention: Tensor | None, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = [None if part is None else part.double() for part in (attention, hidden)]
        return gelu_concat.gelu_concat_reference(*wide, streams, None, torch.float64)

    return Case(
        inputs,
        lambda *given: gelu_concat.gelu_concat_triton(*given, streams, codes),
        lambda *given: gelu_concat.gelu_concat_reference(*given, streams, codes),
        exact,
        moved,
    )


def rope_case(streams: Streams) -> Case:
    head = WIDTH // HEADS
    angles = torch.rand(streams.text + streams.image, head // 2, device="cuda") * 6
    cos, sin = (f(angles).repeat_interleave(2, 1) for f in (torch.cos, torch.sin))

    def inputs() -> tuple[Any, ...]:
        return _random(streams.rows, 3 * WIDTH + HIDDEN)[:, : 2 * WIDTH], _random(4, head)

    def exact(qk: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        given = qk.double(), weights.double(), cos, sin, streams, EPS
        return qk_norm_rope.qk_norm_rope_reference(*given, torch.float64)

    return Case(
        inputs,
        lambda *given: qk_norm_rope.qk_norm_rope_triton(*given, cos, sin, streams, EPS),
        lambda *given: qk_norm_rope.qk_norm_rope_reference(*given, cos, sin, streams, EPS),
        exact,
        streams.rows * WIDTH * 8,
    )


def measured(case: Case, bandwidth: float) -> dict[str, Any]:
    """Errors, then microseconds per call."""
    given = case.inputs()
    first, second = case.kernel(*_copies(given))
    plain, plain_scales = case.reference(*_copies(given))
    exact, _ = case.exact(*_copies(given))
    coded = first.dtype in LIMITS
    values = first.double() * second if coded else first.double()
    result: dict[str, Any] = {"relative_error": _relative(values, exact)}
    if coded:
        rounded = plain.double() * plain_scales
        result["relative_error_of_reference"] = _relative(rounded, exact)
        result["codes_that_differ"] = float((first.float() != plain.float()).double().mean())
    compiled = torch.compile(case.reference, fullgraph=True, dynamic=False)
    sets = [case.inputs() for _ in range(CALLS)]
    result["fused_us"] = microseconds(case.kernel, sets)
    result["inductor_us"] = microseconds(compiled, sets)
    result["floor_us"] = case.bytes_moved / bandwidth * 1e6
    torch._dynamo.reset()
    return result


def microseconds(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> float:
    """Median microseconds per call, in graphs with one call per set of inputs."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for given in sets:
            function(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for given in sets:
            function(*given)
    median: float = do_bench(graph.replay, warmup=5, rep=30, return_mode="median")
    return median / len(sets) * 1e3


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large device-to-device copy."""
    from triton.testing import do_bench

    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds: float = do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() / milliseconds * 1e3


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _copies(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if x is None else x.clone() for x in given)


def _relative(values: Tensor, exact: Tensor) -> float:
    return float((values - exact).norm() / exact.norm())


def _line(row: dict[str, Any]) -> str:
    shape = f"{row['batch']}×({row['text']}+{row['image']})"
    codes = f"  codes {row['codes_that_differ']:.5f}" if "codes_that_differ" in row else ""
    return (
        f"{row['kernel']:42s} {shape:14s} fused {row['fused_us']:6.1f} µs  "
        f"inductor {row['inductor_us']:6.1f}  floor {row['floor_us']:6.1f}  "
        f"error {row['relative_error']:.5f}{codes}"
    )


if __name__ == "__main__":
    main()
