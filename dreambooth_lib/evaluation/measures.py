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
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dreambooth_lib.core.config import Subject
from dreambooth_lib.core.files import open_image
from dreambooth_lib.metrics import clip_scores, kid_and_lpips

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ImageFiles:
    """One method's images of one subject, as files; ``subject.pictures`` are the photos."""

    method: str
    subject: Subject
    prompts: list[str]  #: without the identifier: "a dog in the jungle"
    images: list[list[Path]]  #: [prompts][seeds]
    class_images: list[Path]
    base_class_images: list[Path]


@dataclass(frozen=True)
class Embedded:
    """Unit embeddings by one encoder for one method and subject."""

    photos: "torch.Tensor"  # [M, D]
    drawn: "torch.Tensor"  # [prompts, seeds, D]
    texts: "torch.Tensor | None"  # [prompts, D]; None for a DINO
    class_images: "torch.Tensor"  # [N, D]
    base_class_images: "torch.Tensor"  # [N, D], the base's
    files: ImageFiles | None = None  #: what was embedded; :func:`.scores.score` always gives it


#: Shape [prompts, seeds], [prompts] or a scalar.
Values: TypeAlias = "torch.Tensor | list[list[float]] | list[float] | float"
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


EVALUATORS: tuple[Evaluator, ...] = (subject_measures, class_measures)


def prompt_lpips(files: ImageFiles) -> Iterator[tuple[str, Values]]:
    """Yield DIV, where the ``lpips`` package is installed and a prompt has several images."""
    if kid_and_lpips.has_lpips() and len(files.images[0]) > 1:
        yield (
            "prompt_diversity",
            [kid_and_lpips.lpips_diversity(list(map(open_image, group))) for group in files.images],
        )


#: By the name that stands in the row's ``encoder``.
JUDGES: dict[str, Judge] = {"lpips-alex": prompt_lpips}
