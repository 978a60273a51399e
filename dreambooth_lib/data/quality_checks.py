"""Check photos for what may spoil training, and hold one out for validation."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from dreambooth_lib.data.images import Photo

if TYPE_CHECKING:
    pass

_HASH_BITS = 12  # of 64; shifting a photo by 5% changes up to 14, another view 10 and more


_HASH_LEVELS = 20.0  # of 255, mean over an 8x8 thumbnail; other views of a subject start at 23


_BLUR_VARIANCE = 50.0  # sharp photos have 190 and more, those blurred by 1.6 px of 256 below 35


@dataclass(frozen=True)
class Finding:
    """Something about the pictures that a user should know, and which pictures it concerns."""

    kind: str  #: "few", "duplicate", "near-duplicate", "tiny", "blurred" or "extreme-aspect"
    names: tuple[str, ...]
    message: str


def check_pictures(photos: list[Photo], resolution: int = 512) -> list[Finding]:
    """Find what may spoil training: few pictures, copies, small sides, blur, narrow shapes.

    "few" is one or two pictures, copies not counted. "duplicate" has the same pixels.
    "near-duplicate" differs from another picture or its mirror image in at most 12 of 64 bits of a
    difference hash (is each cell of a 9x8 grey thumbnail brighter than its left neighbour?) and in
    at most 20 of 255 levels, on average, of an 8x8 colour thumbnail. "tiny" has a shorter side
    below ``resolution`` pixels. "blurred" has a variance of the Laplacian below 50 in grey levels
    of 0 to 255, its shorter side brought down to 256 pixels. "extreme-aspect" is more than twice as
    long as it is short.
    """
    copies: dict[tuple[tuple[int, int], bytes], list[Photo]] = {}
    for photo in photos:
        digest = hashlib.sha256(photo.image.tobytes()).digest()
        copies.setdefault((photo.image.size, digest), []).append(photo)
    singles = [group[0] for group in copies.values()]
    names = tuple(photo.name for photo in singles)
    findings: list[Finding] = []
    if 0 < len(names) < 3:
        alone = f"{' and '.join(names)} alone {'is' if len(names) == 1 else 'are'} too little"
        text = f"{alone} to learn from; take three to six pictures in different surroundings."
        findings.append(Finding("few", names, text))
    for group in copies.values():
        if len(group) > 1:
            same = tuple(photo.name for photo in group)
            text = f"{', '.join(same)} are the same picture; keep one of them."
            findings.append(Finding("duplicate", same, text))
    for one, other, mirrored in _near_pairs(singles):
        how = "nearly mirror images of each other" if mirrored else "nearly the same picture"
        text = f"{names[one]} and {names[other]} are {how}; keep one of them."
        findings.append(Finding("near-duplicate", (names[one], names[other]), text))
    return findings + [found for photo in photos for found in _check_picture(photo, resolution)]


def near_groups(photos: list[Photo]) -> list[list[int]]:
    """Return the photos' numbers in groups of near-duplicates, in order of their first one.

    Copies are of one group, too, as :func:`check_pictures` tells them. What is measured by pairs or
    by a photo that training did not see must not take two of one group for two pictures.
    """
    group = list(range(len(photos)))
    for one, other, _ in _near_pairs(photos):
        merged, gone = sorted((group[one], group[other]))
        group = [merged if number == gone else number for number in group]
    return [[i for i, of in enumerate(group) if of == first] for first in sorted(set(group))]


def hold_out(photos: list[Photo]) -> tuple[list[Photo], list[Photo]]:
    """Return photos to train on, and one that training never sees (none of fewer than four).

    A group of near-duplicates is held out whole: the smallest, of equals the last, and only where
    three photos or more remain.
    """
    if len(photos) < 4:
        return photos, []
    held = min(reversed(near_groups(photos)), key=len)
    if len(photos) - len(held) < 3:
        return photos, []
    return [p for i, p in enumerate(photos) if i not in held], [photos[i] for i in held]


def _near_pairs(photos: list[Photo]) -> Iterator[tuple[int, int, bool]]:
    """Yield the numbers of two photos that are nearly one picture, and whether mirrored."""
    prints = [[_print(image) for image in (p.image, ImageOps.mirror(p.image))] for p in photos]
    for one, other in combinations(range(len(photos)), 2):
        same, mirrored = (_is_near(print_, prints[other][0]) for print_ in prints[one])
        if same or mirrored:
            yield one, other, not same


def _print(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
    return grey[:, 1:] > grey[:, :-1], colours


def _is_near(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    bits = int((one[0] != other[0]).sum())
    return bits <= _HASH_BITS and float(np.abs(one[1] - other[1]).mean()) <= _HASH_LEVELS


def _check_picture(photo: Photo, resolution: int) -> list[Finding]:
    short, long = sorted(photo.image.size)
    scale = min(1.0, 256 / short)
    width, height = (max(3, round(side * scale)) for side in photo.image.size)
    grey = photo.image.convert("L").resize((width, height), Image.Resampling.LANCZOS)
    g = np.asarray(grey).astype(np.float32)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    problems = {
        "tiny": (short < resolution, f"has a side of {short} pixels, below {resolution}"),
        "blurred": (laplacian.var() < _BLUR_VARIANCE, "looks blurred"),
        "extreme-aspect": (long > 2 * short, "is more than twice as long as short; crop it"),
    }
    return [
        Finding(kind, (photo.name,), f"{photo.name} {text}.")
        for kind, (found, text) in problems.items()
        if found
    ]
