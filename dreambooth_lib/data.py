"""A subject's pictures, checked; the DreamBooth data set's layout; tensors and their order."""

import hashlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from dreambooth_lib.config import DEFAULT_IDENTIFIER, Subject
from dreambooth_lib.pictures import DataError, Photo, read_pictures

if TYPE_CHECKING:
    import torch

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
    findings: list[Finding] = []
    copies: dict[tuple[tuple[int, int], bytes], list[Photo]] = {}
    for photo in photos:
        digest = hashlib.sha256(photo.image.tobytes()).digest()
        copies.setdefault((photo.image.size, digest), []).append(photo)
    for group in copies.values():
        if len(group) > 1:
            names = tuple(photo.name for photo in group)
            text = f"{', '.join(names)} are the same picture; keep one of them."
            findings.append(Finding("duplicate", names, text))
    singles = [group[0] for group in copies.values()]
    if 0 < len(singles) < 3:
        names = tuple(photo.name for photo in singles)
        alone = f"{' and '.join(names)} alone {'is' if len(names) == 1 else 'are'} too little"
        text = f"{alone} to learn from; take three to six pictures in different surroundings."
        findings.insert(0, Finding("few", names, text))
    for one, other, mirrored in _near_pairs(singles):
        how = "nearly mirror images of each other" if mirrored else "nearly the same picture"
        names = (singles[one].name, singles[other].name)
        text = f"{names[0]} and {names[1]} are {how}; keep one of them."
        findings.append(Finding("near-duplicate", names, text))
    for photo in photos:
        findings += _check_picture(photo, resolution)
    return findings


def near_groups(photos: list[Photo]) -> list[list[int]]:
    """The photos' numbers in groups of copies and near-duplicates, in order of their first one.

    As :func:`check_pictures` tells them. What is measured by pairs or by a photo that training did
    not see must not take two of one group for two pictures.
    """
    group = list(range(len(photos)))
    for one, other, _ in _near_pairs(photos):
        merged, gone = sorted((group[one], group[other]))
        group = [merged if number == gone else number for number in group]
    return [[i for i, of in enumerate(group) if of == first] for first in sorted(set(group))]


def hold_out(photos: list[Photo]) -> tuple[list[Photo], list[Photo]]:
    """Photos to train on, and one that training never sees (none of fewer than four photos).

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
    """Numbers of two photos that are nearly one picture, and whether mirrored."""
    prints = [(_print(p.image), _print(ImageOps.mirror(p.image))) for p in photos]
    for (one, (plain, mirrored)), (other, (print_, _)) in combinations(enumerate(prints), 2):
        same = _is_near(plain, print_)
        if same or _is_near(mirrored, print_):
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
    size = [max(3, round(side * scale)) for side in photo.image.size]
    grey = photo.image.convert("L").resize((size[0], size[1]), Image.Resampling.LANCZOS)
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


def load_subject(
    source: str | Path, class_noun: str, identifier: str = DEFAULT_IDENTIFIER, name: str = ""
) -> Subject:
    """The subject in a folder or zip, after reading all its pictures once.

    Warns once per finding of :func:`check_pictures`, save "tiny", which depends on the resolution.
    Raises :class:`DataError` as :func:`read_pictures` does, and ``ConfigError`` for empty words.
    """
    subject = Subject(str(Path(source).resolve()), class_noun, identifier, name)
    for finding in check_pictures(read_pictures(source)):
        if finding.kind != "tiny":
            warnings.warn(finding.message, stacklevel=2)
    return subject


def load_dataset(folder: str | Path) -> list[Subject]:
    """The subjects of a folder in the DreamBooth data set's layout, in the order of its table.

    ``folder`` or its ``dataset`` holds ``prompts_and_classes.txt`` and a folder per subject. The
    table has the columns ``subject_name,class`` and may have ``type`` ("live" or "object");
    without it, dogs and cats are live. Subjects without a folder are left out. Raises
    :class:`DataError` for a missing or broken table and for folders that are not in it.
    """
    root = Path(folder)
    if (root / "dataset" / "prompts_and_classes.txt").is_file():
        root = root / "dataset"
    table = root / "prompts_and_classes.txt"
    if not table.is_file():
        raise DataError(f"{folder} has no prompts_and_classes.txt; give the data set's folder.")
    rows = _class_table(table)
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    for unknown in sorted(folders - rows.keys()):
        raise DataError(f"the folder '{unknown}' is not in the table of {table}; add its class.")
    if not folders:
        raise DataError(f"{root} has no folder of a subject in {table.name}; add one.")
    return [
        Subject(str((root / name).resolve()), class_noun, name=name, kind=kind)
        for name, (class_noun, kind) in rows.items()
        if name in folders
    ]


def _class_table(path: Path) -> dict[str, tuple[str, str]]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    header = next((line for line in lines if re.fullmatch("subject_name,class(,type)?", line)), "")
    if not header:
        raise DataError(f"{path} has no table 'subject_name,class'; add one below that line.")
    rows: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(lines[lines.index(header) + 1 :], lines.index(header) + 2):
        if not line:
            break
        cells = [cell.strip() for cell in line.split(",")]
        if header.count(",") == 1:
            cells.append("live" if cells[-1] in ("dog", "cat") else "object")
        if len(cells) != 3 or not all(cells) or cells[2] not in ("live", "object"):
            raise DataError(f"line {number} of {path} is '{line}'; write it as '{header}'.")
        rows[cells[0]] = (cells[1], cells[2])
    return rows


def to_tensor(
    image: Image.Image,
    resolution: int,
    crop: str = "center",
    flip: bool = False,
    generator: "torch.Generator | None" = None,
) -> "torch.Tensor":
    """The picture as float32 of [3, resolution, resolution] in [-1, 1].

    The largest square, in the middle or, with ``crop="random"``, at a place that ``generator``
    draws, is resized by Lanczos; ``flip`` mirrors it. Raises :class:`DataError` for another crop.
    """
    import torch

    if crop not in ("center", "random"):
        raise DataError(f"crop is '{crop}'; it can be 'center' or 'random'.")
    side, spare = min(image.size), max(image.size) - min(image.size)
    offset = spare // 2
    if crop == "random":
        offset = int(torch.randint(spare + 1, (1,), generator=generator))
    left, top = (offset, 0) if image.width > image.height else (0, offset)
    # Cropping within the resize never makes the long side, which may be of millions of pixels.
    box = (left, top, left + side, top + side)
    square = image.convert("RGB").resize((resolution,) * 2, Image.Resampling.LANCZOS, box=box)
    if flip:
        square = ImageOps.mirror(square)
    pixels = torch.from_numpy(np.asarray(square).astype(np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def shuffled(count: int, seed: int, start: int, length: int) -> list[int]:
    """Items ``start`` to ``start + length - 1`` of an endless stream of 0 to ``count - 1``.

    The stream goes through all items in a new order each epoch. It depends on nothing but the
    arguments, so that resuming needs no state. Raises :class:`DataError` if ``count`` is below 1.
    """
    if count < 1:
        raise DataError(f"there are {count} items to shuffle; give 1 or more.")
    epochs = range(start // count, -(-(start + length) // count))
    stream = [int(i) for e in epochs for i in np.random.default_rng((seed, e)).permutation(count)]
    return stream[start % count :][:length]
