"""Time quantised linears at FLUX.1's shapes on a GPU against bf16, and T5-XXL with 8-bit weights.

    python -m studies.linears RESULTS.json [--tables]

One linear is the widest of a block, 3072 → 12288, the other the deepest, 15360 → 3072. Every scheme
is timed eagerly and compiled by inductor, which fuses computing the scales with the rounding.
Calls are timed in CUDA graphs, on several inputs in turn. `relative_error` is of the output,
against float64 weights and inputs, which are random. `--tables` prints those of the docs from
RESULTS.json and measures nothing.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch._dynamo
from studies.kernels import CALLS, microseconds
from torch import Tensor, nn

from hasten.benchmark.environment import detect
from hasten.passes.text.weights import store_in_eight_bits
from hasten.quantization.linear import Fp8Linear, quantized
from hasten.recipe import Quantize

TOKENS = {512: 1536, 1024: 4608}  # pixels a side: rows of text and picture
SHAPES = ((3072, 12288), (15360, 3072))  # inputs, outputs
DEVICE = "cuda"
SCHEMES = [
    (scheme, granularity)
    for scheme in ("fp8", "int8", "fp8-weight", "int8-weight")
    for granularity in ("row", "tensor")
    if granularity == "row" or not scheme.endswith("weight")
]
T5_XXL: dict[str, Any] = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
    "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
REPEATS = 9


@torch.no_grad()
def main() -> None:
    path = Path(sys.argv[1])
    if "--tables" not in sys.argv[2:]:
        torch.manual_seed(0)
        rows = [row for shape in SHAPES for row in measured(*shape)]
        result = {"schema": 1, "rows": rows, "text": text_encoder()}
        result["environment"] = detect("tiny", DEVICE, "bfloat16").environment.model_dump(
            mode="json"
        )
        path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(tables(json.loads(path.read_text("utf-8"))))


def measured(inputs: int, outputs: int) -> list[dict[str, Any]]:
    """All schemes of one linear, at each number of rows."""
    linear = nn.Linear(inputs, outputs, device=DEVICE, dtype=torch.bfloat16)
    probe = torch.randn(TOKENS[512], inputs, device=DEVICE, dtype=torch.bfloat16)
    exact = nn.functional.linear(probe.double(), linear.weight.double(), linear.bias.double())
    variants: list[tuple[dict[str, str], nn.Module]] = [({"scheme": "bf16"}, linear)]
    for scheme, granularity in SCHEMES:
        recipe = Quantize(scheme=scheme, granularity=granularity)
        named = {"scheme": scheme, "granularity": granularity}
        variants.append((named, quantized(linear, recipe)))
        if scheme == "fp8":
            static = Fp8Linear.from_linear(linear, granularity, amax=float(probe.abs().max()))
            variants.append(({**named, "activations": "static"}, static))
    return [
        {
            **named,
            "inputs": inputs,
            "outputs": outputs,
            "relative_error": _relative(layer(probe), exact),
            "us": {str(size): _times(layer, rows, inputs) for size, rows in TOKENS.items()},
        }
        for named, layer in variants
    ]


def _times(layer: nn.Module, rows: int, inputs: int) -> dict[str, float]:
    sets = [(torch.randn(rows, inputs, device=DEVICE, dtype=torch.bfloat16),) for _ in range(CALLS)]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    return {"eager": microseconds(layer, sets), "compiled": microseconds(compiled, sets)}


def text_encoder() -> list[dict[str, Any]]:
    """T5-XXL with random weights on 512 tokens, in bf16 and with 8-bit weights."""
    from transformers import T5Config, T5EncoderModel

    tokens = torch.randint(0, T5_XXL["vocab_size"], (1, 512), device=DEVICE)
    rows = []
    expected: Tensor | None = None
    for scheme in (None, "fp8-weight", "int8-weight"):
        torch.manual_seed(0)
        with torch.device(DEVICE):
            encoder = T5EncoderModel(T5Config(**T5_XXL)).to(torch.bfloat16).eval()
        if scheme:
            store_in_eight_bits(encoder, scheme)
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        output = encoder(tokens)[0].float()
        expected = output if expected is None else expected
        rows.append(
            {
                "scheme": scheme or "bf16",
                "held_bytes": held,
                "seconds": median(_seconds(encoder, tokens) for _ in range(REPEATS)),
                "relative_error": _relative(output, expected),
            }
        )
        del encoder
    return rows


def _seconds(encoder: nn.Module, tokens: Tensor) -> float:
    torch.cuda.synchronize()
    start = perf_counter()
    encoder(tokens)
    torch.cuda.synchronize()
    return perf_counter() - start


def _relative(values: Tensor, exact: Tensor) -> float:
    return float((values.to(exact.dtype) - exact).norm() / exact.norm())


def tables(result: dict[str, Any]) -> str:
    """Both as Markdown."""
    return f"{linears_table(result['rows'])}\n\n{encoder_table(result['text'])}"


def linears_table(rows: list[dict[str, Any]]) -> str:
    """Times relative to eager bf16, both linears together, and the larger of their errors."""
    head = "| scheme | 512², eager | compiled | 1024², eager | compiled | error |"
    found = [head, "|---|---:|---:|---:|---:|---:|"]
    names = dict.fromkeys(_name(row) for row in rows)
    for name in names:
        same = [row for row in rows if _name(row) == name]
        cells = [
            f"{_together(same, size, how) / _together(_plain(rows), size, 'eager'):.2f}"
            for size in map(str, TOKENS)
            for how in ("eager", "compiled")
        ]
        error = max(row["relative_error"] for row in same)
        found.append(f"| {name} | {' | '.join(cells)} | {error:.4f} |")
    return "\n".join(found)


def _name(row: dict[str, Any]) -> str:
    if row["scheme"] == "bf16":
        return "bf16"
    return f"`{row['scheme']}`, a {row['granularity']}{', static' * ('activations' in row)}"


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["scheme"] == "bf16"]


def _together(rows: list[dict[str, Any]], size: str, how: str) -> float:
    return sum(float(row["us"][size][how]) for row in rows)


def encoder_table(rows: list[dict[str, Any]]) -> str:
    """Memory as the difference to bf16, since both include the rest of the process."""
    plain = rows[0]["held_bytes"]
    lines = ["| T5-XXL | GiB saved | ms / prompt |", "|---|---:|---:|"]
    lines += [
        f"| `{row['scheme']}` | {(plain - row['held_bytes']) / 2**30:.1f} "
        f"| {row['seconds'] * 1e3:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
