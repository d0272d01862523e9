"""Times presets of two versions of hasten side by side, image by image, and compares their latents.

    git worktree add ../before COMMIT
    python -m studies.versions --before ../before/src --out versions.json

Each version runs in a separate process per preset, with a transformer and decoder of FLUX.1-dev's
shape with random weights and random text embeddings. The versions render images in turns, so that
both run at the same clock rates. The ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PRESETS = ("lossless", "fp8", "balanced", "max")
STEPS = 50


def worker(preset: str, latents: Path) -> None:
    """For each line `SIZE SEED` on stdin, print the seconds per image to stdout."""
    import time

    import torch

    import hasten
    from hasten.recipe import resolve

    pipe = hasten.load_pipeline("shape:flux.1-dev", device="cuda", dtype="bfloat16")
    for name in ("text_encoder", "text_encoder_2"):
        setattr(pipe, name, None)
    torch.cuda.empty_cache()
    fast = hasten.optimize(pipe, resolve(preset).but(text=None, sampling=None))
    print(json.dumps({"ready": fast.summary().splitlines()[:12]}), flush=True)
    for line in sys.stdin:
        size, seed = map(int, line.split())
        draw = torch.Generator("cuda").manual_seed(seed)
        text = {"device": "cuda", "dtype": torch.bfloat16, "generator": draw}
        arguments = {
            "prompt_embeds": torch.randn(1, 512, 4096, **text),
            "pooled_prompt_embeds": torch.randn(1, 768, **text),
            "generator": torch.Generator().manual_seed(seed),
            "width": size,
            "height": size,
            "num_inference_steps": STEPS,
            "guidance_scale": 3.5,
        }
        torch.cuda.synchronize()
        begun = time.perf_counter()
        fast(**arguments, output_type="pt")
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        torch.save(fast(**arguments, output_type="latent").images.cpu(), latents)
        chosen = [line for line in fast.summary().splitlines() if "attention:" in line]
        print(json.dumps({"seconds": seconds, "attention": chosen}), flush=True)


class Version:
    """One version's process for one preset."""

    def __init__(self, source: Path, preset: str, latents: Path) -> None:
        self.latents = latents
        command = [sys.executable, __file__, "--worker", preset, "--latents", str(latents)]
        self.process: Any = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}"},
        )
        self.ready = self._answer()["ready"]

    def draw(self, size: int, seed: int) -> dict[str, Any]:
        self.process.stdin.write(f"{size} {seed}\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a version ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(before: Path, after: Path, preset: str, sizes: list[int], rounds: int) -> Any:
    """Rows of one preset: medians, their ratio, and the distance between the latents."""
    import torch

    scratch = Path("/tmp")
    versions = {
        name: Version(source, preset, scratch / f"latents-{name}.pt")
        for name, source in (("before", before), ("after", after))
    }
    rows = []
    for size in sizes:
        seconds: dict[str, list[float]] = {name: [] for name in versions}
        apart, attention = 0.0, {}
        for turn in range(rounds + 1):
            order = list(versions.items())
            for name, version in order if turn % 2 else reversed(order):
                answer = version.draw(size, seed=turn)
                attention[name] = answer["attention"]
                if turn:  # the first image compiles kernels and records graphs
                    seconds[name].append(answer["seconds"])
            one, two = (torch.load(version.latents).float() for version in versions.values())
            apart = max(apart, float((one - two).norm() / one.norm()))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append(
            {
                "preset": preset,
                "size": size,
                "seconds": seconds,
                "medians": medians,
                "ratio": medians["after"] / medians["before"],
                "latents_apart": apart,
                "attention": attention,
            }
        )
        print(
            f"{preset:9} {size:5} {medians['before']:.4f} {medians['after']:.4f} "
            f"{rows[-1]['ratio']:.4f} {apart:.2e} {attention}",
            flush=True,
        )
    for version in versions.values():
        version.end()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker")
    parser.add_argument("--latents", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path, default=Path("src").absolute())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker, asked.latents)
        return
    import torch

    rows: list[Any] = []
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "steps": STEPS,
        "rounds": asked.rounds,
    }
    for preset in asked.presets:
        rows += compare(asked.before, asked.after, preset, asked.sizes, asked.rounds)
        asked.out.write_text(json.dumps({**facts, "rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
