"""The judge: a small convolutional network that names thing, style and background colour.

It is trained on real composites only (random jitter, flips, a little blur and noise) and never on a
held-out triple, so the generator is not fitted to its judgement of generated images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import Pack, sample_composites, triples
from training.optimise import Job, autocast, fit
from training.run import Run
from training.vocabulary import COLOURS, STYLES

__all__ = ["Classifier", "accuracy", "load_classifier", "real_accuracy", "train_classifier"]

BATCH = 512
PEAK = 3e-3
WIDTHS = (32, 64, 128, 256)


class Classifier(nn.Module):
    """B×3×128×128 in [0, 1] -> logits of thing, style and colour."""

    def __init__(self, things: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, 2, 2, bias=False)]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*layers)
        self.sizes = (things, len(STYLES), len(COLOURS))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(widths[-1] * 16, sum(self.sizes))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        hidden = self.trunk(images * 2 - 1).flatten(1)
        return torch.split(self.head(self.dropout(hidden)), self.sizes, dim=1)


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply random flips, a blur of random strength and noise, similar to a decoder's errors."""
    count, device = len(images), images.device
    chance = torch.rand(3, count, 1, 1, 1, device=device, generator=generator)
    images = torch.where(chance[0] < 0.5, images, images.flip(-1))
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, soft, chance[1])
    noise = torch.randn(images.shape, device=device, generator=generator)
    return images + 0.06 * chance[2] * noise


def load_classifier(run: Run, pack: Pack) -> Classifier:
    state = run.load("classifier.pt")
    if state is None:
        raise FileNotFoundError(f"{run.folder} has no classifier: run that phase first")
    model = Classifier(pack.things).to(run.device)
    model.load_state_dict(state["model"])
    return model.eval()


@torch.inference_mode()
def accuracy(model: Classifier, images: Tensor, wanted: Tensor) -> dict[str, float]:
    """Shares of B images in [0, 1] whose thing, style, colour is the wanted B×3 triple's."""
    hits = []
    for part, target in zip(images.split(256), wanted.split(256), strict=True):
        best = torch.stack([logits.argmax(1) for logits in model(part)], dim=1)
        hits.append(best == target)
    thing, style, colour = torch.cat(hits).float().mean(0).tolist()
    return {"thing": thing, "style": style, "background": colour}


def real_accuracy(run: Run, pack: Pack, model: Classifier, count: int = 2048) -> dict[str, float]:
    """Accuracy on real composites of held-out triples with fresh jitter."""
    generator = run.generator(11)
    rows = triples(pack.things, seen=False, device=run.device)
    pick = torch.randint(len(rows), (count,), device=run.device, generator=generator)
    wanted = rows[pick]
    images = sample_composites(pack, 2 * wanted[:, 0] + wanted[:, 1], wanted[:, 2], generator)
    return accuracy(model, images, wanted)


def train_classifier(run: Run, pack: Pack, budget: float) -> None:
    torch.manual_seed(run.seed + 10)
    model = Classifier(pack.things).to(run.device, memory_format=torch.channels_last).train()
    rows = triples(pack.things, seen=True, device=run.device)
    batch = 16 if run.smoke else BATCH

    def batch_loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(rows), (batch,), device=run.device, generator=generator)
        wanted = rows[pick]
        images = sample_composites(pack, 2 * wanted[:, 0] + wanted[:, 1], wanted[:, 2], generator)
        images = disturb(images, generator).contiguous(memory_format=torch.channels_last)
        with autocast(run.device):
            found = model(images)
        losses = [
            F.cross_entropy(logits.float(), wanted[:, i], label_smoothing=0.05)
            for i, logits in enumerate(found)
        ]
        return torch.stack(losses).sum()

    clock = fit(run, Job("classifier", budget, PEAK, 100), model, batch_loss)
    if clock.progress >= 1.0:
        judge = load_classifier(run, pack)
        numbers = real_accuracy(run, pack, judge)
        run.finish("classifier", steps=clock.step, seconds=clock.seconds, **numbers)
