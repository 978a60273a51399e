"""The paper's measures of an evaluation's pictures, row by row, and their means with intervals.

:func:`score` reads what :func:`draw_all` drew. Each row says what it is
of and by which encoder; published numbers differ by exactly that, and by how the identifier and
self-pairs are handled: here the identifier is stripped from the prompt before the text encoder, and
a picture is never paired with itself.

measure               one row a     what it is
subject_fidelity      picture       CLIP-I or DINO: mean cosine with the subject's photos
prompt_adherence      picture       CLIP-T: cosine with the prompt (no row by a DINO)
memorisation          picture       greatest cosine with one of the subject's photos
prompt_diversity      prompt        DIV: mean LPIPS of pictures of one prompt (encoder lpips-alex,
                                    where that package is installed), and mean 1 - cosine
pres                  subject       PRES: mean cosine of class images with the subject's photos
class_diversity       subject       mean 1 - cosine among class images
prior_drift           subject       mean 1 - cosine of class images with the base's, seed by seed
class_kid             subject       squared MMD of class images and the base's (arXiv 1801.01401)

The method "real pictures" has one row a subject, the subject_fidelity of its photos among
themselves; neither a photo with itself nor near-duplicates of one another are paired.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from dreambooth_lib.core.config import Subject
from dreambooth_lib.data.images import read_pictures
from dreambooth_lib.data.quality_checks import near_groups
from dreambooth_lib.evaluation.dreambench import Benchmark, Picture, Protocol, pictures
from dreambooth_lib.metrics import clip_scores, kid_and_lpips
from dreambooth_lib.metrics.encoders import Encoder, embed_files

if TYPE_CHECKING:
    import torch
    from PIL import Image


REAL = "real pictures"  #: the method of the photos themselves


@dataclass(frozen=True)
class Row:
    """One number. ``prompt`` and ``seed`` are None where it is of all of them."""

    method: str
    subject: str
    kind: str
    encoder: str
    measure: str
    prompt: str | None
    seed: int | None
    value: float


@dataclass(frozen=True)
class Embedded:
    """Unit rows of one encoder for one method and subject, pictures prompt by prompt."""

    photos: "torch.Tensor"  # [M, D]
    drawn: "torch.Tensor"  # [prompts, seeds, D]
    texts: "torch.Tensor | None"  # [prompts, D]; None by a DINO
    class_images: "torch.Tensor"  # [N, D]
    base_class_images: "torch.Tensor"  # [N, D], the base's


#: [prompts, seeds] values, [prompts] values or one.
Values: TypeAlias = "torch.Tensor | list[float] | float"
#: An evaluator gives (measure, values).
Evaluator = Callable[[Embedded], Iterator[tuple[str, Values]]]


def subject_measures(seen: Embedded) -> Iterator[tuple[str, Values]]:
    cosines = seen.drawn @ seen.photos.T  # [prompts, seeds, M]
    yield "subject_fidelity", cosines.mean(-1)
    yield "memorisation", cosines.amax(-1)
    if seen.texts is not None:
        yield "prompt_adherence", (seen.drawn * seen.texts[:, None]).sum(-1)
    if seen.drawn.shape[1] > 1:
        import torch

        yield "prompt_diversity", torch.tensor([clip_scores.diversity(rows) for rows in seen.drawn])


def class_measures(seen: Embedded) -> Iterator[tuple[str, Values]]:
    yield "pres", clip_scores.subject_fidelity(seen.class_images, seen.photos)
    yield "class_diversity", clip_scores.diversity(seen.class_images)
    yield "prior_drift", clip_scores.prior_drift(seen.base_class_images, seen.class_images)
    yield "class_kid", kid_and_lpips.kid(seen.class_images, seen.base_class_images)


EVALUATORS: tuple[Evaluator, ...] = (subject_measures, class_measures)


def score(
    benchmark: Benchmark,
    methods: Iterable[str],
    out: str | Path,
    encoders: Mapping[str, Encoder],
    protocol: Protocol | None = None,
    base: str = "base",
    evaluators: Iterable[Evaluator] = EVALUATORS,
) -> Iterator[Row]:
    """Yield rows of every subject, method and encoder, of pictures that lie in ``out``.

    ``base`` is the method whose class images are those before training. Embeddings are kept in
    ``out/embeddings``. Raises ``FileNotFoundError`` where a picture was not drawn.
    """
    wanted, out = protocol or Protocol(), Path(out)
    for subject in benchmark.subjects:
        prompts = benchmark.of(subject)
        for name, encoder in encoders.items():
            value = _among_photos(encoder, subject)
            if value is not None:
                yield from _rows(REAL, subject, name, "subject_fidelity", value, prompts)
        _, before = _files(benchmark, base, subject, wanted, out)
        identifier, cache, count = subject.identifier, out / "embeddings", wanted.pictures
        texts = [prompt.replace("{}", identifier) for prompt in prompts]
        texts = [clip_scores.strip_identifier(text, identifier) for text in texts]
        for method in methods:
            drawn, class_images = _files(benchmark, method, subject, wanted, out)
            for name, encoder in encoders.items():
                seen = Embedded(
                    photos=embed_photos(encoder, subject),
                    drawn=embed_files(encoder, drawn, cache).unflatten(0, (len(prompts), count)),
                    texts=encoder.texts(texts) if encoder.reads_texts else None,
                    class_images=embed_files(encoder, class_images, cache),
                    base_class_images=embed_files(encoder, before, cache),
                )
                for evaluator in evaluators:
                    for measure, values in evaluator(seen):
                        yield from _rows(method, subject, name, measure, values, prompts)
            if kid_and_lpips.has_lpips() and count > 1:
                groups = [drawn[i : i + count] for i in range(0, len(drawn), count)]
                values = [
                    kid_and_lpips.lpips_diversity(list(map(_opened, group))) for group in groups
                ]
                yield from _rows(method, subject, "lpips-alex", "prompt_diversity", values, prompts)


def _files(
    benchmark: Benchmark, method: str, subject: Subject, wanted: Protocol, out: Path
) -> tuple[list[Path], list[Path]]:
    """A method's pictures of the prompts, and those of the class."""
    every = pictures(benchmark, method, subject, wanted)
    count = len(every) - wanted.class_images
    paths = [out / picture.path for picture in every]
    return paths[:count], paths[count:]


def _rows(
    method: str, subject: Subject, encoder: str, measure: str, values: Values, prompts: list[str]
) -> Iterator[Row]:
    array = np.asarray(values, np.float64)
    for place in np.ndindex(array.shape):
        prompt = prompts[place[0]] if place else None
        seed, value = place[1] if len(place) > 1 else None, float(array[place])
        yield Row(method, subject.name, subject.kind, encoder, measure, prompt, seed, value)


def _opened(path: Path) -> "Image.Image":
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def embed_photos(encoder: Encoder, subject: Subject) -> "torch.Tensor":
    """The subject's own photos, upright: ``[M, D]``."""
    return encoder.images([photo.image for photo in read_pictures(subject.pictures)])


def _among_photos(encoder: Encoder, subject: Subject) -> float | None:
    """Mean cosine over pairs of photos of different groups; None where there is no such pair."""
    photos, rows = read_pictures(subject.pictures), embed_photos(encoder, subject)
    group = {i: number for number, of in enumerate(near_groups(photos)) for i in of}
    pairs = [(i, j) for i in group for j in group if i < j and group[i] != group[j]]
    if not pairs:
        return None
    one, other = (rows[list(numbers)].double() for numbers in zip(*pairs, strict=True))
    return float((one * other).sum(-1).mean())


def pictures_by(
    rows: Iterable[Row],
    method: str,
    encoder: str,
    benchmark: Benchmark,
    out: str | Path,
    measure: str = "subject_fidelity",
) -> "list[tuple[float, str, Image.Image]]":
    """(score, subject and prompt, picture) of every picture of one method, for a contact sheet."""
    number = {
        (subject.name, prompt): index
        for subject in benchmark.subjects
        for index, prompt in enumerate(benchmark.of(subject))
    }
    found = []
    for row in rows:
        if (row.method, row.encoder, row.measure) == (method, encoder, measure):
            prompt = number[row.subject, row.prompt or ""]
            path = Path(out) / Picture(method, row.subject, prompt, row.seed or 0).path
            found.append((row.value, f"{row.subject}: {row.prompt}", _opened(path)))
    return found


@dataclass(frozen=True)
class Mean:
    """A mean over subjects, prompts and seeds, and its 95% bootstrap interval."""

    method: str
    encoder: str
    measure: str
    value: float
    low: float
    high: float
    count: int  #: numbers in the mean


def means(rows: Iterable[Row], samples: int = 1000, seed: int = 0) -> list[Mean]:
    """Return the mean of each method, encoder and measure, with a percentile bootstrap interval.

    Numbers of one subject and prompt are resampled among themselves, so that the interval is over
    seeds alone; a measure that has one number a prompt or subject is resampled over those.
    """
    group = attrgetter("method", "encoder", "measure")
    found = []
    for key, of_key in groupby(sorted(rows, key=group), key=group):
        cells: dict[tuple[str, str | None], list[float]] = {}
        for row in of_key:
            cells.setdefault((row.subject, row.prompt), []).append(row.value)
        if all(len(values) == 1 for values in cells.values()):
            cells = {("", None): [value for (value,) in cells.values()]}
        rng = np.random.default_rng(seed)
        drawn = np.zeros(samples)
        count = sum(map(len, cells.values()))
        for values in cells.values():
            picks = rng.integers(len(values), size=(samples, len(values)))
            drawn += np.asarray(values)[picks].sum(1) / count
        value = sum(sum(values) for values in cells.values()) / count
        low, high = np.percentile(drawn, [2.5, 97.5])
        found.append(Mean(*key, value, float(low), float(high), count))
    return found
