"""Find and read the photos' masks: white on the subject, from a file beside or the alpha channel.

The mask of ``NAME.jpg`` is ``NAME-masklabel.png``, ``NAME_mask.png``, ``mask_NAME.png`` or a black
and white ``NAME.png`` beside it, or ``masks/NAME.png``, or else what its alpha channel shows. See
``data.companions`` for more forms of these names.
"""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.companions import MASKS, photos_of
from dreambooth_lib.data.decoding import MAX_BYTES, decode, decode_alpha, is_photo
from dreambooth_lib.data.sources import DataError, SourceFile, folded, list_masks

if TYPE_CHECKING:
    from dreambooth_lib.data.images import Photo

SUFFIX = "-masklabel.png"  #: of a mask beside its photo, as the kit writes it
_SHAPE = 0.02  # by which a mask's shape may differ from its photo's, as one is rounded


def pair_masks(
    path: Path, photos: Collection[str], others: Mapping[str, SourceFile]
) -> dict[str, SourceFile]:
    """Return the masks by their photos' names, of files beside them and in a folder ``masks``.

    Raises :class:`DataError` for a photo with two masks.
    """
    pairs: dict[str, SourceFile] = {}
    stems = {name: folded(PurePosixPath(name).stem) for name in photos}
    inside = [file for file in list_masks(path) if is_photo(file)]
    for file in [*others.values(), *inside]:
        stem = folded(PurePosixPath(file.name).stem)
        matches = [stem, *photos_of(stem, MASKS, glued=True)]
        found = [name for name, own in stems.items() if own in matches]
        number = re.search(r" \(\d+\)$", stem)
        alike = [name for name in found if number and stems[name].endswith(number[0])]
        for photo in alike or found:
            if photo in pairs:
                raise DataError(f"{file} and {pairs[photo]} are both masks of '{photo}'; keep one.")
            pairs[photo] = file
    return pairs


def read_mask(photo: "Photo") -> Image.Image | None:
    """Return a photo's mask, of mode L and the photo's size; None if it has none.

    Raises :class:`DataError` for a damaged mask, for one of another shape than the photo, and for
    one without a level of 128 or more.
    """
    if photo.mask is None:
        file = getattr(photo.pixels, "file", None)  # None of an image that is in memory only
        return None if file is None else alpha_of(file)
    file, size = photo.mask, photo.traits.size
    mask = mask_in(file)
    if abs(mask.width * size[1] / (mask.height * size[0]) - 1) > _SHAPE:
        raise DataError(
            f"{file} has {mask.width} x {mask.height} pixels, and its photo {size[0]} x {size[1]}; "
            "make the mask again, in the photo's shape."
        )
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def mask_in(file: SourceFile) -> Image.Image:
    """Return what a mask's file shows, of mode L and upright.

    That is the alpha channel, of a cut-out or of what is white on transparent, or else the colours.
    Raises :class:`DataError` for a damaged file, and for one whose levels are 0 and 1.
    """
    mask = alpha_of(file)
    if mask is None:
        mask = decode(str(file), file.suffix, file.read(MAX_BYTES, "a mask")).convert("L")
    most = max(level for level, count in enumerate(mask.histogram()) if count)
    if 0 < most < 128:
        raise DataError(
            f"{file} is almost black (its brightest pixel is {most}); save it with 255 on the "
            "subject."
        )
    return mask


def alpha_of(file: SourceFile) -> Image.Image | None:
    """Return an image file's alpha channel, of mode L and upright; None if it hides nothing."""
    if file.head(3) == b"\xff\xd8\xff":  # a JPEG has none, and may be large
        return None
    alpha = decode_alpha(str(file), file.suffix, file.read(MAX_BYTES, "a photo"))
    return None if alpha is None or alpha.getextrema()[0] == 255 else alpha


def check_masks(photos: "Sequence[Photo]", config: TrainConfig) -> None:
    """Raise :class:`DataError` if the config uses masks and no photo has one; warn if few have."""
    if config.background_weight is None:
        return
    lacking = [photo.name for photo in photos if read_mask(photo) is None]
    if len(lacking) == len(photos):
        raise DataError(
            "background_weight is set but no photo has a mask; put NAME-masklabel.png beside each "
            "NAME.jpg, white on the subject, or leave background_weight out."
        )
    if lacking:
        warnings.warn(f"{len(lacking)} of {len(photos)} photos have no mask, such as {lacking[0]}; "
                      "those are trained on in full.", stacklevel=2)  # fmt: skip


def center_of(mask: Image.Image) -> tuple[float, float] | None:
    """Return the middle of the box around a mask, in parts of width and height; None if black."""
    box = mask.point(lambda level: 255 * (level > 127)).getbbox()
    if box is None:
        return None
    return (box[0] + box[2]) / 2 / mask.width, (box[1] + box[3]) / 2 / mask.height
