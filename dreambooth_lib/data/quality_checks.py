"""Check photos for problems that would spoil training, and hold one out for validation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dreambooth_lib.data.crops import Size, cut_away
from dreambooth_lib.data.images import Photo, listed

_HASH_BITS = 12  # of 64; shifting a photo by 5% changes up to 14, another view 10 or more
_HASH_LEVELS = 20  # of 255, mean over an 8x8 thumbnail; other views of a subject start at 23
_BLUR_VARIANCE = 50.0  # sharp photos have 190 and more, those blurred by 1.6 px of 256 below 35
_CUT = 0.2  # of a photo, outside the square in its center
_LARGEST_GROUP = 5  # of near-duplicates whose pairs are told one by one


@dataclass(frozen=True)
class Finding:
    """A problem with one or more photos."""

    #: "few", "duplicate", "near-duplicate", "tiny", "blurred", "extreme-aspect" or "cropped"
    kind: str
    names: tuple[str, ...]  #: of the photos
    message: str


def check_photos(
    photos: list[Photo], resolution: int = 512, shapes: Sequence[Size] | None = None
) -> list[Finding]:
    """Find problems that would spoil training.

    "few": there are only one or two photos, copies not counted. "duplicate": the same pixels.
    "near-duplicate": differs from another photo or its mirror image in at most 12 of 64 bits of a
    difference hash (is each cell of a 9x8 grey thumbnail brighter than its left neighbour?) and by
    at most 20 of 255 levels, on average, in an 8x8 colour thumbnail. "tiny": the shorter side is
    below ``resolution`` pixels. "blurred": the variance of the Laplacian is below 50 in grey levels
    of 0 to 255, with the shorter side scaled down to 256 pixels. "extreme-aspect": the longer side
    is more than twice the shorter one. "cropped": the crop leaves out more than a fifth; one
    finding for all such photos. ``shapes`` are the sizes that they are cropped to, by default
    squares.
    """
    copies: dict[tuple[tuple[int, int], bytes], list[Photo]] = {}
    for photo in photos:
        copies.setdefault((photo.traits.size, photo.traits.digest), []).append(photo)
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
            text = f"{listed(same)} are the same photo; keep one of them."
            findings.append(Finding("duplicate", same, text))
    findings += _near_findings(singles)
    shapes = shapes or [(1, 1)] * len(photos)
    cuts = [cut_away(p.traits.size, shape) for p, shape in zip(photos, shapes, strict=True)]
    findings += [
        finding
        for photo, cut in zip(photos, cuts, strict=True)
        for finding in _check_photo(photo, resolution, cut)
    ]
    found = {name for finding in findings if finding.kind == "extreme-aspect"
             for name in finding.names}  # fmt: skip
    if cropped := tuple(
        photo.name for photo, cut in zip(photos, cuts, strict=True)
        if cut > _CUT and photo.name not in found
    ):  # fmt: skip
        loses = "loses" if len(cropped) == 1 else "lose"
        text = f"{listed(cropped)} {loses} more than a fifth to the crop; if that cuts off your "
        text += "subject, choose another crop, such as 'buckets', or crop them yourself."
        findings.append(Finding("cropped", cropped, text))
    return findings


def _near_findings(photos: Sequence[Photo]) -> Iterator[Finding]:
    """Yield a finding on each pair of near-duplicates, or one on a large group of them."""
    names, near = [photo.name for photo in photos], _near_duplicates(photos)
    large = {i: g for g in _groups(near, len(photos)) if len(g) > _LARGEST_GROUP for i in g}
    for a, (others, mirrored) in enumerate(near):
        if a in large:
            if a == large[a][0]:
                group = tuple(names[i] for i in large[a])
                text = f"{listed(group)} are nearly the same photo; keep one of them."
                yield Finding("near-duplicate", group, text)
            continue
        for b, is_mirrored in zip(others.tolist(), mirrored.tolist(), strict=True):
            how = "nearly mirror images of each other" if is_mirrored else "nearly the same photo"
            text = f"{names[a]} and {names[b]} are {how}; keep one of them."
            yield Finding("near-duplicate", (names[a], names[b]), text)


def near_duplicate_groups(photos: Sequence[Photo]) -> list[list[int]]:
    """Return groups of near-duplicates, as indices into ``photos``, in order of their first one.

    Copies and near-duplicates, as :func:`check_photos` finds them, are one group. Scores of pairs
    of photos or of a held-out photo must count a group as one photo.
    """
    return _groups(_near_duplicates(photos), len(photos))


def _groups(near: "list[tuple[np.ndarray, np.ndarray]]", count: int) -> list[list[int]]:
    group = np.arange(count)
    for a, (others, _) in enumerate(near):
        numbers = np.unique(group[[a, *others]])
        if len(numbers) > 1:
            group[np.isin(group, numbers)] = numbers[0]
    return [np.flatnonzero(group == first).tolist() for first in np.unique(group)]


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


def _near_duplicates(photos: Sequence[Photo]) -> "list[tuple[np.ndarray, np.ndarray]]":
    """Return the later near-duplicates of each photo, and which of them are mirrored."""
    if not photos:
        return []
    bits = np.stack([photo.traits.bits for photo in photos])
    levels = np.stack([photo.traits.levels for photo in photos]).astype(np.int16)
    near = []
    for a in range(len(photos)):
        same, mirrored = (
            _is_near(bits[a, side], levels[a, side], bits[a + 1 :, 0], levels[a + 1 :, 0])
            for side in (0, 1)
        )
        others = np.flatnonzero(same | mirrored)
        near.append((others + a + 1, ~same[others]))
    return near


def _is_near(
    bits: np.ndarray, levels: np.ndarray, others_bits: np.ndarray, others_levels: np.ndarray
) -> np.ndarray:
    """Compare one photo's hash with those of others, [n, 64] and [n, 192]; return bool [n]."""
    near = (bits != others_bits).sum(1) <= _HASH_BITS
    index = np.flatnonzero(near)
    difference = np.abs(levels - others_levels[index]).sum(1, dtype=np.int64)
    near[index] = difference <= _HASH_LEVELS * levels.size
    return near


def _check_photo(photo: Photo, resolution: int, cut: float) -> list[Finding]:
    traits, short = photo.traits, min(photo.traits.size)
    is_extreme = max(traits.size) > 2 * short and cut > _CUT  # a bucket may be as long
    problems = {
        "tiny": (short < resolution, f"has a side of {short} pixels, fewer than {resolution}"),
        "blurred": (traits.sharpness < _BLUR_VARIANCE, "looks blurred"),
        "extreme-aspect": (is_extreme, "has an aspect ratio above 2:1; crop it"),
    }
    return [
        Finding(kind, (photo.name,), f"{photo.name} {text}.")
        for kind, (applies, text) in problems.items()
        if applies
    ]
