"""Check photos for problems that would spoil training, and hold one out for validation."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image, ImageOps

from dreambooth_lib.data.images import Photo

_HASH_BITS = 12  # of 64; shifting a photo by 5% changes up to 14, another view 10 or more
_HASH_LEVELS = 20.0  # of 255, mean over an 8x8 thumbnail; other views of a subject start at 23
_BLUR_VARIANCE = 50.0  # sharp photos have 190 and more, those blurred by 1.6 px of 256 below 35


@dataclass(frozen=True)
class Finding:
    """A problem with one or more photos."""

    kind: str  #: "few", "duplicate", "near-duplicate", "tiny", "blurred" or "extreme-aspect"
    names: tuple[str, ...]  #: of the photos
    message: str


def check_photos(photos: list[Photo], resolution: int = 512) -> list[Finding]:
    """Find problems that would spoil training.

    "few": there are only one or two photos, copies not counted. "duplicate": the same pixels.
    "near-duplicate": differs from another photo or its mirror image in at most 12 of 64 bits of a
    difference hash (is each cell of a 9x8 grey thumbnail brighter than its left neighbour?) and by
    at most 20 of 255 levels, on average, in an 8x8 colour thumbnail. "tiny": the shorter side is
    below ``resolution`` pixels. "blurred": the variance of the Laplacian is below 50 in grey levels
    of 0 to 255, with the shorter side scaled down to 256 pixels. "extreme-aspect": the longer side
    is more than twice the shorter one.
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
        text = f"{alone} to learn from; take three to six photos in different surroundings."
        findings.append(Finding("few", names, text))
    for group in copies.values():
        if len(group) > 1:
            same = tuple(photo.name for photo in group)
            text = f"{', '.join(same)} are the same photo; keep one of them."
            findings.append(Finding("duplicate", same, text))
    for a, b, mirrored in _near_duplicates(singles):
        how = "nearly mirror images of each other" if mirrored else "nearly the same photo"
        text = f"{names[a]} and {names[b]} are {how}; keep one of them."
        findings.append(Finding("near-duplicate", (names[a], names[b]), text))
    return findings + [finding for photo in photos for finding in _check_photo(photo, resolution)]


def near_duplicate_groups(photos: list[Photo]) -> list[list[int]]:
    """Return groups of near-duplicates, as indices into ``photos``, in order of their first one.

    Copies and near-duplicates, as :func:`check_photos` finds them, are one group. Scores of pairs
    of photos or of a held-out photo must count a group as one photo.
    """
    group = list(range(len(photos)))
    for a, b, _ in _near_duplicates(photos):
        kept, merged = sorted((group[a], group[b]))
        group = [kept if number == merged else number for number in group]
    return [[i for i, n in enumerate(group) if n == first] for first in sorted(set(group))]


def hold_out(photos: list[Photo]) -> tuple[list[Photo], list[Photo]]:
    """Return the photos to train on and the held-out photo (none of fewer than four photos).

    Near-duplicates are held out together: the last of the smallest groups, if that leaves three
    photos or more.
    """
    if len(photos) < 4:
        return photos, []
    held_out = min(reversed(near_duplicate_groups(photos)), key=len)
    if len(photos) - len(held_out) < 3:
        return photos, []
    return [p for i, p in enumerate(photos) if i not in held_out], [photos[i] for i in held_out]


def _near_duplicates(photos: list[Photo]) -> Iterator[tuple[int, int, bool]]:
    """Yield pairs of near-duplicates, as indices into ``photos``, and whether they are mirrored."""
    hashes = [[_hash(image) for image in (p.image, ImageOps.mirror(p.image))] for p in photos]
    for a, b in combinations(range(len(photos)), 2):
        same, mirrored = (_is_near(hash_, hashes[b][0]) for hash_ in hashes[a])
        if same or mirrored:
            yield a, b, not same


def _hash(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return a difference hash, bool [8, 8], and the levels of a thumbnail, [8, 8, 3]."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
    return grey[:, 1:] > grey[:, :-1], colours


def _is_near(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    bits = int((a[0] != b[0]).sum())
    return bits <= _HASH_BITS and float(np.abs(a[1] - b[1]).mean()) <= _HASH_LEVELS


def _check_photo(photo: Photo, resolution: int) -> list[Finding]:
    short, long = sorted(photo.image.size)
    scale = min(1.0, 256 / short)
    width, height = (max(3, round(side * scale)) for side in photo.image.size)
    grey = photo.image.convert("L").resize((width, height), Image.Resampling.LANCZOS)
    g = np.asarray(grey).astype(np.float32)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    problems = {
        "tiny": (short < resolution, f"has a side of {short} pixels, fewer than {resolution}"),
        "blurred": (laplacian.var() < _BLUR_VARIANCE, "looks blurred"),
        "extreme-aspect": (long > 2 * short, "is more than twice as long as wide; crop it"),
    }
    return [
        Finding(kind, (photo.name,), f"{photo.name} {text}.")
        for kind, (applies, text) in problems.items()
        if applies
    ]
