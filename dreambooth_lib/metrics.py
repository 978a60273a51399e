"""How well a run learned its subject and kept its class, by cosines of picture and text embeddings.

The measures follow DreamBooth's evaluation (arXiv 2208.12242, sections 4.1-4.3): subject fidelity
is CLIP-I or DINO by the encoder that is used, prompt adherence is CLIP-T. Diversity and prior
drift use ``1 - cosine`` of the same encoder in place of the paper's LPIPS and PRES, so they compare
with each other but not with the paper's DIV and PRES. A number means something only beside its
encoder (:attr:`Encoder.model_id`) and the same pictures' count and size.
"""

import re
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from dreambooth_lib.encoders import Encoder

if TYPE_CHECKING:
    import torch
    from PIL import Image


def subject_fidelity(generated: "torch.Tensor", reference: "torch.Tensor") -> float:
    """CLIP-I or DINO (arXiv 2208.12242, section 4.2): mean cosine over all N x M pairs.

    ``generated [N, D]``, ``reference [M, D]``; in [-1, 1], higher is closer to the subject.
    Raises ``ValueError`` for empty, non-finite or mismatched embeddings, as all functions here do.
    """
    generated, reference = _units(generated, reference, "generated", "reference")
    return float(generated.mean(0) @ reference.mean(0))


def reference_fidelity(reference: "torch.Tensor") -> float:
    """The ceiling of :func:`subject_fidelity`: mean cosine among the real pictures (Table 1).

    ``reference [M, D]`` without the M self-pairs; in [-1, 1]. Raises ``ValueError`` if M < 2.
    """
    return _mean_among(reference, "reference")


def prompt_adherence(pictures: "torch.Tensor", texts: "torch.Tensor") -> float:
    """CLIP-T (arXiv 2208.12242, section 4.2): mean cosine of each picture with its own prompt.

    ``pictures [N, D]``, ``texts [N, D]`` row by row; in [-1, 1]. ``ValueError`` if counts differ.
    """
    pictures, texts = _units(pictures, texts, "pictures", "texts", by_row=True)
    return float((pictures * texts).sum(-1).mean())


def diversity(pictures: "torch.Tensor") -> float:
    """How much pictures of one prompt differ: mean ``1 - cosine`` over pairs without self-pairs.

    ``pictures [N, D]``; in [0, 2], 0 when all are alike. Raises ``ValueError`` if N < 2.
    """
    return 1 - _mean_among(pictures, "pictures")


def lpips_diversity(pictures: "list[Image.Image]") -> float:
    """DIV (arXiv 2208.12242, section 4.3): mean LPIPS (arXiv 1801.03924) over pairs, by AlexNet.

    Pictures are equally large. In [0, 1] or a little above, 0 when all are alike. Needs the
    ``lpips`` package (:func:`has_lpips`); raises ``ValueError`` for fewer than two pictures.
    """
    import torch

    if len(pictures) < 2:
        raise ValueError("there is only one picture; give two or more to pair.")
    network = _lpips()
    arrays = [np.asarray(picture.convert("RGB"), np.float32) for picture in pictures]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    one, other = torch.triu_indices(len(pictures), len(pictures), 1)
    with torch.inference_mode():
        return float(network(pixels[one], pixels[other]).mean())


def has_lpips() -> bool:
    return find_spec("lpips") is not None


@cache
def _lpips() -> Any:
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def prior_drift(base: "torch.Tensor", tuned: "torch.Tensor") -> float:
    """How far training moved the class: mean ``1 - cosine`` of pictures of one prompt and seed.

    ``base [N, D]``, ``tuned [N, D]`` row by row; in [0, 2], 0 when the class is as it was. PRES's
    question, asked of the base instead of the subject. ``ValueError`` if counts differ.
    """
    base, tuned = _units(base, tuned, "base", "tuned", by_row=True)
    return float(1 - (base * tuned).sum(-1).mean())


def kid(pictures: "torch.Tensor", base: "torch.Tensor") -> float:
    """Kernel distance of two sets of pictures (KID, arXiv 1801.01401), on unit embeddings.

    ``pictures [N, D]``, ``base [M, D]``: the unbiased estimate of the squared maximum mean
    discrepancy by the kernel ``(x . y / D + 1) ** 3``, rows scaled to length ``sqrt(D)`` so that
    the kernel sees numbers of the size it was made for. About 0, below it by chance, for sets
    alike. Not comparable with KID on Inception features. ``ValueError`` for fewer than two rows.
    """
    one, other = _units(pictures, base, "pictures", "base")
    if min(len(one), len(other)) < 2:
        raise ValueError("there is only one row of embeddings; give two or more to compare sets.")

    def among(rows: "torch.Tensor") -> "torch.Tensor":
        kernel = (rows @ rows.T + 1) ** 3
        return (kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1))

    return float(among(one) + among(other) - 2 * ((one @ other.T + 1) ** 3).mean())


def strip_identifier(prompt: str, identifier: str) -> str:
    """``prompt`` without ``identifier`` as a whole word in that case, runs of spaces made one."""
    word = rf"(?<![\w-]){re.escape(identifier)}(?![\w-])"
    return " ".join((re.sub(word, " ", prompt) if identifier else prompt).split())


def evaluate(
    encoder: Encoder,
    reference: "list[Image.Image]",
    generated: "list[Image.Image]",
    prompts: list[str],
    class_pictures: "list[Image.Image]",
    identifier: str,
    base_class_pictures: "list[Image.Image] | None" = None,
) -> dict[str, float]:
    """Every measure of one tuned model by one encoder.

    ``prompts[i]`` made ``generated[i]``; the identifier is stripped before the text encoder.
    ``class_pictures`` are the tuned model's pictures of one class prompt, and
    ``base_class_pictures`` the base's with the same seeds, in the same order. Gives
    ``subject_fidelity``, ``prompt_adherence`` (not by a DINO), ``class_diversity`` and, with the
    base's, ``prior_drift``. ``ValueError`` for no pictures, unequal counts, one class picture.
    """
    if len(prompts) != len(generated):
        raise ValueError(
            f"there are {len(prompts)} prompts for {len(generated)} generated pictures; give one "
            "prompt a picture, repeated where a prompt made several."
        )
    pictures, of_class = encoder.images(generated), encoder.images(class_pictures)
    scores = {"subject_fidelity": subject_fidelity(pictures, encoder.images(reference))}
    if encoder.reads_texts:
        texts = encoder.texts([strip_identifier(prompt, identifier) for prompt in prompts])
        scores["prompt_adherence"] = prompt_adherence(pictures, texts)
    scores["class_diversity"] = diversity(of_class)
    if base_class_pictures is not None:
        scores["prior_drift"] = prior_drift(encoder.images(base_class_pictures), of_class)
    return scores


def _mean_among(embeddings: "torch.Tensor", name: str) -> float:
    rows = _unit(embeddings, name)
    count, total = len(rows), rows.sum(0)
    if count < 2:
        raise ValueError(f"there is only one row of {name} embeddings; give two or more to pair.")
    return float((total @ total - count) / (count * (count - 1)))  # all pairs less self-pairs


def _units(
    one: "torch.Tensor", other: "torch.Tensor", name: str, other_name: str, by_row: bool = False
) -> "tuple[torch.Tensor, torch.Tensor]":
    one, other = _unit(one, name), _unit(other, other_name)
    if one.shape[1] != other.shape[1] or (by_row and len(one) != len(other)):
        raise ValueError(
            f"the {name} embeddings are {list(one.shape)} and the {other_name} ones "
            f"{list(other.shape)}; embed both with one encoder"
            + (", one row for one row." if by_row else ".")
        )
    return one, other


def _unit(embeddings: "torch.Tensor", name: str) -> "torch.Tensor":
    """Rows of length 1 in float64: ``[N, D]``, N >= 1, finite and not zero."""
    if embeddings.ndim != 2 or embeddings.shape[0] == 0:
        raise ValueError(
            f"the {name} embeddings have shape {list(embeddings.shape)}; give one row or more."
        )
    rows = embeddings.detach().cpu().double()
    length = rows.norm(dim=-1, keepdim=True)
    wrong = (~(length.isfinite() & (length > 0))).flatten().nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"row {wrong[0]} of the {name} embeddings is zero or not finite; leave it out."
        )
    return rows / length
