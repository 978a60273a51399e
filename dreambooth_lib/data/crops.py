"""Choose what of a photo is trained on: its bucket, and where its crop lies.

Buckets are sizes of nearly equal area, as SDXL's (arXiv 2307.01952, appendix I): the longer side
grows in steps from the resolution, and the shorter one is the largest that keeps the area within
the square's. A crop that was moved lies where ``crops.json`` beside the photos says.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_lib.core.files import replace_file
from dreambooth_lib.data.masks import center_of, read_mask
from dreambooth_lib.data.sources import DataError, SourceFile

if TYPE_CHECKING:
    from dreambooth_lib.data.images import Photo

CENTERS = "crops.json"  #: the middle of each moved crop, by the photo's name
FOLLOWING = ("subject", "buckets")  #: values of ``crop`` that go where the subject is
LONGEST = 4  #: a bucket's longer side, at most, in shorter ones
_MAX_BYTES = 2**22

Size = tuple[int, int]  #: width and height in pixels
Box = tuple[int, int, int, int]  #: left, top, right and bottom in a photo's pixels


def buckets(resolution: int, multiple: int) -> list[Size]:
    """Return the sizes of buckets, the square first; the sides are multiples of ``multiple``.

    They grow by a sixteenth of the resolution, or by ``multiple`` if that is more: for SDXL these
    are its own 1024 x 1024, 1088 x 960, 1152 x 896, ... to 2048 x 512.
    """
    step = max(1, resolution // 16 // multiple) * multiple
    sizes = [(resolution, resolution)]
    for long in range(resolution // step * step + step, 2 * resolution + 1, step):
        short = resolution**2 // long // step * step
        if short and long <= LONGEST * short:
            sizes += [(long, short), (short, long)]
    return sizes


def bucket_of(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the bucket that leaves out least of a photo of this size."""
    return min(sizes, key=lambda bucket: round(cut_away(size, bucket), 6))


def most_common(sizes: Sequence[Size]) -> Size:
    """Return the size that most have; of several the first."""
    return Counter(sizes).most_common(1)[0][0]


def cut_away(size: Size, shape: Size) -> float:
    """Return the share of a photo that a crop of ``shape`` leaves out."""
    ratio = size[0] * shape[1] / (size[1] * shape[0])
    return 1 - min(ratio, 1 / ratio)


def crop_box(size: Size, shape: Size, center: tuple[float, float] = (0.5, 0.5)) -> Box:
    """Return the largest box of ``shape``'s proportions in a photo, as near to a center as can be.

    ``center`` is in parts of the photo's width and height.
    """
    width, height = size
    if width * shape[1] > height * shape[0]:
        width = max(1, round(height * shape[0] / shape[1]))
    else:
        height = max(1, round(width * shape[1] / shape[0]))
    left = min(max(0, int(center[0] * size[0] - width / 2)), size[0] - width)
    top = min(max(0, int(center[1] * size[1] - height / 2)), size[1] - height)
    return left, top, left + width, top + height


def center_for(photo: "Photo", crop: str) -> tuple[float, float]:
    """Return the middle of a photo's crop: where it was moved, or its mask is, or the photo's.

    The photo's own unless ``crop`` is one of :data:`FOLLOWING`.
    """
    if crop not in FOLLOWING:
        return 0.5, 0.5
    if photo.center is not None:
        return photo.center
    mask = read_mask(photo)
    return (mask and center_of(mask)) or (0.5, 0.5)


def read_centers(file: SourceFile | None) -> dict[str, tuple[float, float]]:
    """Read ``crops.json``. Raises :class:`DataError` unless it has two numbers for each photo."""
    if file is None:
        return {}
    try:
        content = json.loads(file.read(_MAX_BYTES, "a table of crops"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON; move the crops again, or remove it.") from error
    centers = {}
    for name, center in content.items() if isinstance(content, dict) else [("", content)]:
        match center:
            case [float() | int() as x, float() | int() as y] if 0 <= x <= 1 and 0 <= y <= 1:
                centers[name] = (float(x), float(y))
            case _:
                raise DataError(
                    f"{file} has no two numbers from 0 to 1 for '{name}'; move its crop again, or "
                    "remove the file."
                )
    return centers


def write_centers(folder: Path, photos: "Sequence[Photo]") -> None:
    """Write ``crops.json`` for the photos whose crops were moved."""
    centers = {photo.name: photo.center for photo in photos if photo.center is not None}
    replace_file(folder / CENTERS, json.dumps(centers, indent=1).encode())
