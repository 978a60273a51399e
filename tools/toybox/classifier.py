"""Train the examiner of the base: a small ResNet that names class, scene and colour.

It shares nothing with the judge but the world, and checks what the base draws on request. That of
a base that draws two things names the second one and where it lies too.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from tools.toybox.recipes import BUNDLED, Recipe
from tools.toybox.sources import Source, jittered
from tools.toybox.training import Way, fit
from tools.toybox.world import CLASSES, COLOURS, RELATIONS, SCENES, Picture

#: What is asked of a picture -> the answers; the model's logits are these lists end to end.
ANSWERS: dict[str, list[str | None]] = {
    "class": list(CLASSES),
    "scene": list(SCENES),
    "colour": [*COLOURS, None],
}
#: What is asked besides where a second thing may be.
PAIR_ANSWERS: dict[str, list[str | None]] = {
    "relation": [*RELATIONS, None],
    "second": [*CLASSES, None],
}


def new_classifier(pairs: bool = False) -> ResNetForImageClassification:
    asked_of = ANSWERS | PAIR_ANSWERS if pairs else ANSWERS
    names = [f"{asked}: {answer}" for asked, answers in asked_of.items() for answer in answers]
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
    return {
        "class": picture.class_noun,
        "scene": picture.scene,
        "colour": picture.colour,
        "relation": picture.relation,
        "second": picture.second_noun,
    }


def logits(
    model: ResNetForImageClassification, pictures: np.ndarray | torch.Tensor
) -> dict[str, torch.Tensor]:
    """Logits [B, answers] of each question that the model knows, for uint8 [B, H, W, 3]."""
    found = model(torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).logits
    asked_of = ANSWERS
    if found.shape[1] > sum(len(answers) for answers in ANSWERS.values()):
        asked_of = ANSWERS | PAIR_ANSWERS
    parts = found.split([len(answers) for answers in asked_of.values()], dim=1)
    return dict(zip(asked_of, parts, strict=True))


def _row(asked: str, picture: Picture) -> int:
    return (ANSWERS | PAIR_ANSWERS)[asked].index(answers_of(picture)[asked])


def train(
    source: Source, folder: Path, way: Way, recipe: Recipe = BUNDLED
) -> ResNetForImageClassification:
    torch.manual_seed(0)
    model = new_classifier(recipe.pairs > 0)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((12, step))
        pixels, shown = source.batch(recipe.batches["classifier"], rng)
        found = logits(model, jittered(pixels, rng, fine=6, coarse=6))
        loss = torch.zeros((), device=way.device)
        for asked, scores in found.items():
            right = torch.tensor([_row(asked, p) for p in shown]).to(way.device)
            loss = loss + torch.nn.functional.cross_entropy(scores, right)
        return loss

    fit(model, loss_at, way, peak_lr=2e-3, folder=folder)
    return model


@torch.no_grad()
def shares(
    model: ResNetForImageClassification, pictures: np.ndarray, wanted: list[Picture]
) -> dict[str, float]:
    """Return the share of pictures in which each question is answered as ``wanted``."""
    parts = [logits(model, pictures[i : i + 64]) for i in range(0, len(pictures), 64)]
    right = {}
    for asked in parts[0]:
        found = torch.cat([part[asked] for part in parts]).argmax(1).tolist()
        hits = [i == _row(asked, p) for i, p in zip(found, wanted, strict=True)]
        right[asked] = sum(hits) / len(hits)
    return right
