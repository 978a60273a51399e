"""Train the examiner of the base: a small ResNet that names class, scene and colour.

It shares nothing with the judge but the world, and checks what the base draws on request.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from tools.toybox.training import fit
from tools.toybox.world import CLASSES, COLOURS, SCENES, Picture, World

#: What is asked of a picture -> the answers; the model's logits are these lists end to end.
ANSWERS: dict[str, list[str | None]] = {
    "class": list(CLASSES),
    "scene": list(SCENES),
    "colour": [*COLOURS, None],
}


def new_classifier() -> ResNetForImageClassification:
    names = [f"{asked}: {answer}" for asked, answers in ANSWERS.items() for answer in answers]
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[64, 128, 192],
        depths=[2, 2, 2],
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return ResNetForImageClassification(config)


def answers_of(picture: Picture) -> dict[str, str | None]:
    return {"class": picture.class_noun, "scene": picture.scene, "colour": picture.colour}


def logits(model: ResNetForImageClassification, pictures: np.ndarray) -> dict[str, torch.Tensor]:
    """Logits [B, answers] of each question for uint8 pictures [B, 64, 64, 3]."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    parts = model(pixels).logits.split([len(answers) for answers in ANSWERS.values()], dim=1)
    return dict(zip(ANSWERS, parts, strict=True))


def train(world: World, folder: Path, steps: int, batch: int = 48) -> ResNetForImageClassification:
    torch.manual_seed(0)
    model = new_classifier()

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((12, step))
        pixels, shown = world.batch(batch, rng)
        jitter = rng.normal(0, 6, pixels.shape) + rng.normal(0, 6, (batch, 1, 1, 3))
        found = logits(model, (pixels + jitter).clip(0, 255).astype(np.uint8))
        loss = torch.zeros(())
        for asked, answers in ANSWERS.items():
            right = torch.tensor([answers.index(answers_of(p)[asked]) for p in shown])
            loss = loss + torch.nn.functional.cross_entropy(found[asked], right)
        return loss

    fit(model, loss_at, steps=steps, peak_lr=2e-3, folder=folder)
    return model


@torch.no_grad()
def shares(
    model: ResNetForImageClassification, pictures: np.ndarray, wanted: list[Picture]
) -> dict[str, float]:
    """Return the share of pictures in which each question is answered as ``wanted``."""
    parts = [logits(model, pictures[i : i + 64]) for i in range(0, len(pictures), 64)]
    right = {}
    for asked, answers in ANSWERS.items():
        found = torch.cat([part[asked] for part in parts]).argmax(1).tolist()
        hits = [answers[i] == answers_of(p)[asked] for i, p in zip(found, wanted, strict=True)]
        right[asked] = sum(hits) / len(hits)
    return right
