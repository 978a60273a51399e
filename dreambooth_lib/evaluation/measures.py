"""Define what :mod:`.scores` measures of one method's images of one subject.

An :data:`Evaluator` reads embeddings and is called once for each encoder; a :data:`Judge` reads the
images themselves and is called once. Both yield (measure, values), and the row of each value names
the encoder or the judge.

measure               one row per   definition
subject_fidelity      image         CLIP-I or DINO: mean cosine with the subject's photos
prompt_adherence      image         CLIP-T: cosine with the prompt (no row for a DINO)
memorisation          image         largest cosine with one of the subject's photos
prompt_diversity      prompt        DIV: mean LPIPS among images of a prompt (encoder lpips-alex,
                                    where that package is installed), and mean 1 - cosine
pres                  subject       PRES: mean cosine of class images with the subject's photos
class_diversity       subject       mean 1 - cosine among class images
prior_drift           subject       mean 1 - cosine of class images with the base's, seed by seed
class_kid             subject       KID: squared MMD to the base's class images (arXiv 1801.01401)
retrieval_precision   image         how early it finds the subject's photos among look-alikes, the
                                    base's class images and other subjects' photos: average
                                    precision (arXiv 2512.19026, whose gallery has photos only)
masked_fidelity       image         subject_fidelity of what masks show, where all photos and
                                    images have one (:mod:`.masks`); 0 if it is empty
prompt_drift          drift prompt  mean 1 - cosine with the base's images, seed by seed (half of
                                    that is the drift of peft's benchmark of image generation)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dreambooth_lib.core.files import open_image
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.metrics import clip_scores, identity, kid_and_lpips

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ImageFiles:
    """One method's images of one subject, as files; ``subject.photos`` are the photos."""

    method: str
    subject: Subject
    prompts: list[str]  #: without the identifier: "a dog in the jungle"
    images: list[list[Path]]  #: ``[prompts][seeds]``
    class_images: list[Path]
    base_class_images: list[Path]
    drift_prompts: list[str] = field(default_factory=list)
    drift_images: list[list[Path]] = field(default_factory=list)  #: ``[drift prompts][seeds]``
    base_drift_images: list[list[Path]] = field(default_factory=list)


@dataclass(frozen=True)
class Embedded:
    """Unit embeddings by one encoder for one method and subject."""

    photos: "torch.Tensor"  # [M, D]
    drawn: "torch.Tensor"  # [prompts, seeds, D]
    texts: "torch.Tensor | None"  # [prompts, D]; None for a DINO
    class_images: "torch.Tensor"  # [N, D]
    base_class_images: "torch.Tensor"  # [N, D], the base's
    # What :func:`.scores.score` always gives, and has:
    files: ImageFiles | None = None
    other_photos: "torch.Tensor | None" = None  # [K, D], of other subjects; None for one subject
    drift: "torch.Tensor | None" = None  # [drift prompts, seeds, D]
    base_drift: "torch.Tensor | None" = None
    masked_photos: "torch.Tensor | None" = None  # [M, D]; None without masks
    masked_drawn: "torch.Tensor | None" = None  # [prompts, seeds, D]; zeros for an empty mask


#: Shape [prompts, seeds], [prompts] or a scalar; or by other prompts, a value each.
Values: TypeAlias = "torch.Tensor | list[list[float]] | list[float] | float | Mapping[str, float]"
#: Yields (measure, values) of one encoder's embeddings.
Evaluator = Callable[[Embedded], Iterator[tuple[str, Values]]]
#: Yields (measure, values) of the images; a value that it cannot tell is NaN.
Judge = Callable[[ImageFiles], Iterator[tuple[str, Values]]]


def subject_measures(embedded: Embedded) -> Iterator[tuple[str, Values]]:
    cosines = embedded.drawn @ embedded.photos.T  # [prompts, seeds, M]
    yield "subject_fidelity", cosines.mean(-1)
    yield "memorisation", cosines.amax(-1)
    if embedded.texts is not None:
        yield "prompt_adherence", (embedded.drawn * embedded.texts[:, None]).sum(-1)
    if embedded.drawn.shape[1] > 1:
        import torch

        diversities = [clip_scores.diversity(rows) for rows in embedded.drawn]
        yield "prompt_diversity", torch.tensor(diversities)


def class_measures(embedded: Embedded) -> Iterator[tuple[str, Values]]:
    yield "pres", clip_scores.subject_fidelity(embedded.class_images, embedded.photos)
    yield "class_diversity", clip_scores.diversity(embedded.class_images)
    yield "prior_drift", clip_scores.prior_drift(embedded.base_class_images, embedded.class_images)
    yield "class_kid", kid_and_lpips.kid(embedded.class_images, embedded.base_class_images)


def identity_measures(embedded: Embedded) -> Iterator[tuple[str, Values]]:
    import torch

    look_alikes = [embedded.base_class_images]
    if embedded.other_photos is not None:
        look_alikes.append(embedded.other_photos)
    found = identity.average_precision(
        embedded.drawn.flatten(0, 1), embedded.photos, torch.cat(look_alikes)
    )
    yield "retrieval_precision", found.reshape(embedded.drawn.shape[:2])
    if embedded.masked_photos is not None and embedded.masked_drawn is not None:
        yield "masked_fidelity", (embedded.masked_drawn @ embedded.masked_photos.T).mean(-1)


def drift_measures(embedded: Embedded) -> Iterator[tuple[str, Values]]:
    if embedded.drift is not None and embedded.base_drift is not None and embedded.files:
        pairs = zip(embedded.files.drift_prompts, embedded.base_drift, embedded.drift, strict=True)
        yield (
            "prompt_drift",
            {prompt: clip_scores.prior_drift(base, tuned) for prompt, base, tuned in pairs},
        )


EVALUATORS: tuple[Evaluator, ...] = (
    subject_measures, class_measures, identity_measures, drift_measures,
)  # fmt: skip


def prompt_lpips(files: ImageFiles) -> Iterator[tuple[str, Values]]:
    """Yield DIV, where the ``lpips`` package is installed and a prompt has several images."""
    if kid_and_lpips.has_lpips() and len(files.images[0]) > 1:
        yield (
            "prompt_diversity",
            [kid_and_lpips.lpips_diversity(list(map(open_image, group))) for group in files.images],
        )


#: By the name that stands in the row's ``encoder``.
JUDGES: dict[str, Judge] = {"lpips-alex": prompt_lpips}
