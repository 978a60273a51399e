"""Score an evaluation's images by the paper's measures, and average them with intervals.

:func:`score` reads what :func:`dreambench.draw_all` drew. Each row names its encoder: published
numbers differ by exactly that, and by how the identifier and self-pairs are handled. Here the
identifier is stripped from the prompt before the text encoder, and an image is never paired with
itself. :mod:`.measures` defines the measures.

The method "real images" has one row per subject, the subject_fidelity of its photos among
themselves; neither a photo with itself nor near-duplicates are paired.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import Images, read_photos
from dreambooth_lib.data.quality_checks import near_duplicate_groups
from dreambooth_lib.evaluation.dreambench import Benchmark, DrawnImage, Protocol, images_of
from dreambooth_lib.evaluation.masks import embed_masked
from dreambooth_lib.evaluation.measures import (
    EVALUATORS,
    JUDGES,
    Embedded,
    Evaluator,
    ImageFiles,
    Judge,
    Values,
)
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.metrics.encoders import Encoder, embed_files
from dreambooth_lib.training.sampling import fill

if TYPE_CHECKING:
    import torch


REAL = "real images"  #: the method of the photos themselves


@dataclass(frozen=True)
class Row:
    """One score. ``prompt`` and ``seed`` are None where it covers all of them."""

    method: str
    subject: str
    kind: str
    encoder: str
    measure: str
    prompt: str | None
    seed: int | None
    value: float


def score(
    benchmark: Benchmark,
    methods: Iterable[str],
    out: str | Path,
    encoders: Mapping[str, Encoder],
    protocol: Protocol | None = None,
    base: str = "base",
    evaluators: Iterable[Evaluator] = EVALUATORS,
    judges: Mapping[str, Judge] = JUDGES,
) -> Iterator[Row]:
    """Yield the scores of the images in ``out``: every subject, method, encoder and judge.

    A value that a judge could not tell is NaN, and has no row.
    ``base`` is the method whose class images the others drift from. Embeddings are cached in
    ``out/embeddings``. Raises ``FileNotFoundError`` for an image that was not drawn.
    """
    protocol, out = protocol or Protocol(), Path(out)
    photos = {
        name: {subject.name: embed_photos(encoder, subject) for subject in benchmark.subjects}
        for name, encoder in encoders.items()
    }
    for subject in benchmark.subjects:
        prompts = benchmark.prompts_for(subject)
        for name in encoders:
            value = _among_photos(photos[name][subject.name], subject)
            if value is not None:
                yield from _rows(REAL, subject, name, "subject_fidelity", value, prompts)
        for method in methods:
            files = image_files(benchmark, method, subject, protocol, out, base)
            for name, encoder in encoders.items():
                embedded = _embed(encoder, files, photos[name], out / "embeddings")
                for evaluator in evaluators:
                    for measure, values in evaluator(embedded):
                        yield from _rows(method, subject, name, measure, values, prompts)
            for name, judge in judges.items():
                for measure, values in judge(files):
                    rows = _rows(method, subject, name, measure, values, prompts)
                    yield from (row for row in rows if not np.isnan(row.value))


def image_files(
    benchmark: Benchmark, method: str, subject: Subject, protocol: Protocol, out: Path, base: str
) -> ImageFiles:
    """Return the files of one method's images of one subject, and the base's of the class."""
    identifier, count = subject.identifier, protocol.images_per_prompt
    prompts = [prompt.replace("{}", identifier) for prompt in benchmark.prompts_for(subject)]
    own, others = len(prompts) * count, len(prompts) * count + protocol.class_images

    def paths(method: str) -> list[Path]:
        return [out / image.path for image in images_of(benchmark, method, subject, protocol)]

    def grouped(paths: list[Path]) -> list[list[Path]]:
        return [paths[start : start + count] for start in range(0, len(paths), count)]

    drawn, bases = paths(method), paths(base)
    return ImageFiles(
        method,
        subject,
        [clip_scores.strip_identifier(prompt, identifier) for prompt in prompts],
        grouped(drawn[:own]),
        drawn[own:others],
        bases[own:others],
        protocol.drift_prompts_for(subject),
        grouped(drawn[others:]),
        grouped(bases[others:]),
    )


def _embed(
    encoder: Encoder, files: ImageFiles, photos: "dict[str, torch.Tensor]", cache: Path
) -> Embedded:
    import torch

    def grouped(images: list[list[Path]]) -> "torch.Tensor":
        flat = [path for group in images for path in group]
        return embed_files(encoder, flat, cache).unflatten(0, (len(images), -1))

    others = [rows for name, rows in photos.items() if name != files.subject.name]
    masked_photos, masked_drawn = embed_masked(encoder, files) or (None, None)
    return Embedded(
        photos=photos[files.subject.name],
        drawn=grouped(files.images),
        texts=encoder.embed_texts(files.prompts) if encoder.reads_texts else None,
        class_images=embed_files(encoder, files.class_images, cache),
        base_class_images=embed_files(encoder, files.base_class_images, cache),
        files=files,
        other_photos=torch.cat(others) if others else None,
        drift=grouped(files.drift_images) if files.drift_prompts else None,
        base_drift=grouped(files.base_drift_images) if files.drift_prompts else None,
        masked_photos=masked_photos,
        masked_drawn=masked_drawn,
    )


def _rows(
    method: str, subject: Subject, encoder: str, measure: str, values: Values, prompts: list[str]
) -> Iterator[Row]:
    if isinstance(values, Mapping):  # of other prompts
        prompts, values = list(values), list(values.values())
    array = np.asarray(values, np.float64)
    for place in np.ndindex(array.shape):
        prompt = prompts[place[0]] if place else None
        seed, value = place[1] if len(place) > 1 else None, float(array[place])
        yield Row(method, subject.name, subject.kind, encoder, measure, prompt, seed, value)


def embed_photos(encoder: Encoder, subject: Subject) -> "torch.Tensor":
    """Embed the subject's photos, turned upright: ``[M, D]``."""
    return encoder.embed_images(Images(read_photos(subject)))


def _among_photos(rows: "torch.Tensor", subject: Subject) -> float | None:
    """Return the mean cosine over pairs of photos that are not near-duplicates; None if none is."""
    groups = near_duplicate_groups(read_photos(subject))
    return clip_scores.reference_fidelity(rows, groups) if len(groups) > 1 else None


def scored_images(
    rows: Iterable[Row], method: str, encoder: str, benchmark: Benchmark, out: str | Path
) -> list[tuple[float, str, Path]]:
    """Return (subject fidelity, label, file) of every image of one method, for :func:`extremes`."""
    found = {
        (subject.name, prompt): (number, fill(prompt, subject))
        for subject in benchmark.subjects
        for number, prompt in enumerate(benchmark.prompts_for(subject))
    }
    scored = []
    for row in rows:
        if (row.method, row.encoder, row.measure) == (method, encoder, "subject_fidelity"):
            number, prompt = found[row.subject, row.prompt or ""]
            path = Path(out) / DrawnImage(method, row.subject, number, row.seed or 0).path
            scored.append((row.value, f"{row.subject}: {prompt}", path))
    return scored


@dataclass(frozen=True)
class Mean:
    """A mean over subjects, prompts and seeds, and its 95% bootstrap interval.

    The interval is over seeds, or over prompts or subjects where each has one value only.
    """

    method: str
    encoder: str
    measure: str
    value: float
    low: float
    high: float
    count: int  #: number of values
    over_seeds: bool = True  #: whether the interval is over seeds


def means(rows: Iterable[Row], samples: int = 1000, seed: int = 0) -> list[Mean]:
    """Return the mean of each method, encoder and measure, with a percentile bootstrap interval.

    Values are resampled within each subject and prompt, so that the interval is over seeds alone; a
    measure with one value per prompt or subject is resampled over those.
    """
    group = attrgetter("method", "encoder", "measure")
    result = []
    for key, members in groupby(sorted(rows, key=group), key=group):
        cells: dict[tuple[str, str | None], list[float]] = {}
        for row in members:
            cells.setdefault((row.subject, row.prompt), []).append(row.value)
        over_seeds = any(len(values) > 1 for values in cells.values())
        if not over_seeds:
            cells = {("", None): [value for (value,) in cells.values()]}
        rng = np.random.default_rng(seed)
        resampled = np.zeros(samples)
        count = sum(map(len, cells.values()))
        for values in cells.values():
            picks = rng.integers(len(values), size=(samples, len(values)))
            # A bootstrap of n values has (n - 1) / n of the variance of their mean.
            wider = (len(values) / max(1, len(values) - 1)) ** 0.5
            moved = np.asarray(values)[picks].mean(1) - fmean(values)
            resampled += (fmean(values) + wider * moved) * len(values) / count
        value = sum(sum(values) for values in cells.values()) / count
        low, high = np.percentile(resampled, [2.5, 97.5])
        result.append(Mean(*key, value, float(low), float(high), count, over_seeds))
    return result
