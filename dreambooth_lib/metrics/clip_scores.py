"""How well a run learned its subject and kept its class, by cosines of embeddings.

The measures follow DreamBooth's evaluation (arXiv 2208.12242, sections 4.1-4.3): subject fidelity
is CLIP-I or DINO by the encoder that is used, prompt adherence is CLIP-T. Diversity and prior
drift use ``1 - cosine`` of the same encoder in place of the paper's LPIPS and PRES, so they do not
compare with those. A number means something only beside its encoder (:attr:`Encoder.model_id`) and
the same pictures' count and size. Embeddings are rows of any length, ``[N, D]``; empty, non-finite
or mismatched ones raise ``ValueError``.
"""

import math
import re
from typing import TYPE_CHECKING

from dreambooth_lib.metrics.encoders import Encoder

if TYPE_CHECKING:
    import torch
    from PIL import Image


def subject_fidelity(generated: "torch.Tensor", reference: "torch.Tensor") -> float:
    """Return CLIP-I or DINO (section 4.2), in [-1, 1]: the mean cosine over all pairs."""
    generated, reference = unit_rows(generated=generated, reference=reference)
    return float(generated.mean(0) @ reference.mean(0))


def reference_fidelity(reference: "torch.Tensor") -> float:
    """Return the ceiling of :func:`subject_fidelity`, in [-1, 1]: that of the photos (Table 1).

    Without self-pairs, so that it takes two rows.
    """
    return _mean_among("reference", reference)


def prompt_adherence(pictures: "torch.Tensor", texts: "torch.Tensor") -> float:
    """Return CLIP-T (section 4.2), in [-1, 1]: mean cosine of each picture with its own prompt."""
    pictures, texts = unit_rows(by_row=True, pictures=pictures, texts=texts)
    return float((pictures * texts).sum(-1).mean())


def diversity(pictures: "torch.Tensor") -> float:
    """Return how much pictures of one prompt differ, in [0, 2]: mean ``1 - cosine`` over pairs.

    0 when all are alike; without self-pairs, so that it takes two rows.
    """
    return 1 - _mean_among("pictures", pictures)


def prior_drift(base: "torch.Tensor", tuned: "torch.Tensor") -> float:
    """Return how far training moved the class, in [0, 2]: mean ``1 - cosine`` row by row.

    Rows are of one prompt and seed; 0 when the class is as it was. PRES's question, asked of the
    base instead of the subject.
    """
    base, tuned = unit_rows(by_row=True, base=base, tuned=tuned)
    return float(1 - (base * tuned).sum(-1).mean())


def strip_identifier(prompt: str, identifier: str) -> str:
    """``prompt`` without ``identifier`` as a whole word in that case, runs of spaces made one."""
    word = rf"(?<![\w-]){re.escape(identifier)}(?![\w-])"
    return " ".join((re.sub(word, " ", prompt) if identifier else prompt).split())


def evaluate(
    encoder: Encoder,
    reference: "list[Image.Image]",
    generated: "list[Image.Image]",
    prompts: list[str],
    class_images: "list[Image.Image]",
    identifier: str,
    base_class_images: "list[Image.Image] | None" = None,
) -> dict[str, float]:
    """Return every measure of one tuned model by one encoder, ``prompt_adherence`` not by a DINO.

    ``prompts[i]`` made ``generated[i]``; the identifier is stripped before the text encoder.
    ``class_images`` are the tuned model's pictures of one class prompt, and
    ``base_class_images`` the base's with the same seeds, without which there is no
    ``prior_drift``. Raises ``ValueError`` for no pictures, unequal counts, one class image.
    """
    if len(prompts) != len(generated):
        raise ValueError(
            f"there are {len(prompts)} prompts for {len(generated)} generated pictures; give one "
            "prompt a picture, repeated where a prompt made several."
        )
    images, classes = encoder.images(generated), encoder.images(class_images)
    scores = {"subject_fidelity": subject_fidelity(images, encoder.images(reference))}
    if encoder.reads_texts:
        texts = encoder.texts([strip_identifier(prompt, identifier) for prompt in prompts])
        scores["prompt_adherence"] = prompt_adherence(images, texts)
    scores["class_diversity"] = diversity(classes)
    if base_class_images is not None:
        scores["prior_drift"] = prior_drift(encoder.images(base_class_images), classes)
    return scores


def _mean_among(name: str, embeddings: "torch.Tensor") -> float:
    """Return the mean cosine over all pairs less self-pairs."""
    (rows,) = unit_rows(by_row=False, **{name: embeddings})
    count, total = len(rows), rows.sum(0)
    if count < 2:
        raise ValueError(f"there is only one row of {name} embeddings; give two or more to pair.")
    return float((total @ total - count) / (count * (count - 1)))


def unit_rows(by_row: bool = False, **embeddings: "torch.Tensor") -> "list[torch.Tensor]":
    """Return rows of length 1 in float64, and ``by_row`` as many of each."""
    found = []
    for name, given in embeddings.items():
        if given.ndim != 2 or len(given) == 0:
            raise ValueError(
                f"the {name} embeddings have shape {list(given.shape)}; give one row or more."
            )
        rows = given.detach().cpu().double()
        length = rows.norm(dim=-1, keepdim=True)
        for number, size in enumerate(length.flatten().tolist()):
            if not 0 < size < math.inf:
                raise ValueError(
                    f"row {number} of the {name} embeddings is zero or not finite; leave it out."
                )
        found.append(rows / length)
    shapes = {name: list(rows.shape) for name, rows in zip(embeddings, found, strict=True)}
    if len({tuple(shape) if by_row else shape[1] for shape in shapes.values()}) > 1:
        (name, shape), (other, of_other) = shapes.items()
        raise ValueError(
            f"the {name} embeddings are {shape} and the {other} ones {of_other}; embed both with "
            f"one encoder{', one row for one row' if by_row else ''}."
        )
    return found
