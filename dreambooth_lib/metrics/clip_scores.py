"""Score how well a run learnt its subject and preserved its class, by cosines of embeddings.

The scores follow DreamBooth's evaluation (arXiv 2208.12242, sections 4.1-4.3): subject fidelity
is CLIP-I or DINO, depending on the encoder, and prompt adherence is CLIP-T. Diversity and prior
drift use ``1 - cosine`` by the same encoder in place of the paper's LPIPS and PRES, and cannot be
compared with these. Scores compare only for the same encoder (:attr:`Encoder.model_id`) and the
same number and size of images. Embeddings are ``[N, D]``, of any length; empty, non-finite or
mismatched ones raise ``InputError``.
"""

import math
import re
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from dreambooth_lib.core.errors import InputError

if TYPE_CHECKING:
    import torch


def subject_fidelity(generated: "torch.Tensor", reference: "torch.Tensor") -> float:
    """Return CLIP-I or DINO (section 4.2), in [-1, 1]: the mean cosine over all pairs."""
    generated, reference = unit_rows(generated=generated, reference=reference)
    return float(generated.mean(0) @ reference.mean(0))


def reference_fidelity(
    reference: "torch.Tensor", groups: Sequence[Sequence[int]] | None = None
) -> float:
    """Return the ceiling of :func:`subject_fidelity`, in [-1, 1]: the photos' own (Table 1).

    Self-pairs are left out, so there must be two rows. ``groups`` are rows of near-duplicates:
    pairs within a group are left out, too, and there must be two groups.
    """
    if groups is None or len(groups) == len(reference):
        return _mean_pair_cosine("reference", reference)
    (rows,) = unit_rows(reference=reference)
    cosines = [float(rows[i] @ rows[j]) for a, b in combinations(groups, 2) for i in a for j in b]
    if not cosines:
        raise InputError("all reference photos are near-duplicates; give two that differ.")
    return fmean(cosines)


def diversity(images: "torch.Tensor") -> float:
    """Return how much images of one prompt differ, in [0, 2]: the mean ``1 - cosine`` of pairs.

    It is 0 if all are alike. Self-pairs are left out, so there must be two rows.
    """
    return 1 - _mean_pair_cosine("images", images)


def prior_drift(base: "torch.Tensor", tuned: "torch.Tensor") -> float:
    """Return how far training changed the class, in [0, 2]: the mean ``1 - cosine`` row by row.

    Rows at one index have the same prompt and seed; 0 is no change. PRES compares class images with
    the subject; this compares them with the base's.
    """
    return float(1 - row_cosines(base, tuned).mean())


def row_cosines(images: "torch.Tensor", others: "torch.Tensor") -> "torch.Tensor":
    """Return the cosine of each image with the text or image of the same row, in [-1, 1]: [N]."""
    images, others = unit_rows(by_row=True, images=images, others=others)
    return (images * others).sum(-1)


def strip_identifier(prompt: str, identifier: str) -> str:
    """Return ``prompt`` without the whole word ``identifier`` (by case) and repeated spaces."""
    word = rf"(?<![\w-]){re.escape(identifier)}(?![\w-])"
    return " ".join((re.sub(word, " ", prompt) if identifier else prompt).split())


def _mean_pair_cosine(name: str, embeddings: "torch.Tensor") -> float:
    (rows,) = unit_rows(by_row=False, **{name: embeddings})
    count, total = len(rows), rows.sum(0)
    if count < 2:
        raise InputError(f"there is only one row of {name} embeddings; give two or more to pair.")
    return float((total @ total - count) / (count * (count - 1)))


def unit_rows(by_row: bool = False, **embeddings: "torch.Tensor") -> "list[torch.Tensor]":
    """Return all embeddings as float64 rows of length 1, on the CPU.

    Raises ``InputError`` for wrong shapes and, with ``by_row``, different numbers of rows.
    """
    normalized = []
    for name, tensor in embeddings.items():
        if tensor.ndim != 2 or len(tensor) == 0:
            raise InputError(
                f"the {name} embeddings have shape {list(tensor.shape)}; give one row or more."
            )
        rows = tensor.detach().cpu().double()
        length = rows.norm(dim=-1, keepdim=True)
        for number, size in enumerate(length.flatten().tolist()):
            if not 0 < size < math.inf:
                raise InputError(
                    f"row {number} of the {name} embeddings is zero or not finite; leave it out."
                )
        normalized.append(rows / length)
    shapes = {name: list(rows.shape) for name, rows in zip(embeddings, normalized, strict=True)}
    if len({tuple(shape) if by_row else shape[1] for shape in shapes.values()}) > 1:
        (name, shape), (name_2, shape_2) = shapes.items()
        raise InputError(
            f"the {name} embeddings are {shape} and the {name_2} ones {shape_2}; embed both with "
            f"one encoder{', the same number of rows each' if by_row else ''}."
        )
    return normalized
