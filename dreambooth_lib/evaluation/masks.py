"""Compare the subject alone: cut out of photos and generated images by masks.

A photo's mask is the one that it is trained with (``data.masks``). That of a generated image
``folder/NAME.png`` is ``folder/masks/NAME.png``, which is read as a photo's, or else the file's own
alpha channel, if that hides anything; it is made elsewhere, such as by rembg or Segment Anything.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.files import open_image
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.data.masks import alpha_of, mask_in, read_mask
from dreambooth_lib.data.sources import MASK_FOLDER, SourceFile
from dreambooth_lib.metrics.encoders import Encoder

if TYPE_CHECKING:
    import torch

    from dreambooth_lib.evaluation.measures import ImageFiles

#: What stands around a subject that is cut out.
GREY = (127, 127, 127)


def embed_masked(
    encoder: Encoder, files: "ImageFiles"
) -> "tuple[torch.Tensor, torch.Tensor] | None":
    """Embed the subject alone, of photos [M, D] and of images [prompts, seeds, D].

    An image whose mask is empty has zeros. None unless both photos and images have masks. Raises
    ``InputError`` if only some of either have masks, for one of another size and for a photo whose
    mask is empty; ``DataError`` for a damaged one.
    """
    import torch

    paths = [path for group in files.images for path in group]
    masks = _of_all({path: find_mask(path) for path in paths})
    if masks is None:
        return None
    source = Path(files.subject.photos)
    photos = {source / photo.name: photo for photo in read_photos(files.subject)}
    photo_masks = _of_all({path: read_mask(photo) for path, photo in photos.items()})
    if photo_masks is None:
        return None
    cut_photos = []
    for (path, photo), mask in zip(photos.items(), photo_masks, strict=True):
        cut = cut_out(photo.image, mask, path)
        if cut is None:
            raise InputError(f"the mask of {path} shows nothing; make it again.")
        cut_photos.append(cut)
    of_photos = encoder.embed_images(cut_photos)
    cuts = [cut_out(open_image(path), mask, path) for path, mask in zip(paths, masks, strict=True)]
    shown = {number: cut for number, cut in enumerate(cuts) if cut is not None}
    rows = torch.zeros(len(paths), of_photos.shape[1])
    if shown:
        rows[list(shown)] = encoder.embed_images(list(shown.values()))
    return of_photos, rows.unflatten(0, (len(files.images), -1))


def cut_out(image: Image.Image, mask: Image.Image, path: Path) -> Image.Image | None:
    """Return the square around the mask, grey where the mask is black; None if all of it is.

    So neither what the subject stands before counts, nor where it stands. Break-A-Scene
    (arXiv 2305.16311) compares subjects so, on black and without the crop.
    """
    if mask.size != image.size:
        raise InputError(f"the mask of {path} is {mask.size} and not {image.size}; make it again.")
    box = mask.getbbox()
    if box is None:
        return None
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    square = Image.new("RGB", (side, side), GREY)
    place = ((side - right + left) // 2, (side - bottom + top) // 2)
    square.paste(image.crop(box), place, mask.crop(box))
    return square


def find_mask(path: Path) -> Image.Image | None:
    """Return the mask of an image file, of mode L, turned upright; None if it has none.

    Raises ``DataError`` for a damaged one.
    """
    beside = path.parent / MASK_FOLDER / f"{path.stem}.png"
    if beside.is_file():
        return mask_in(_source(beside))
    return alpha_of(_source(path))


def _source(path: Path) -> SourceFile:
    return SourceFile(path.name, path.parent, path.stat().st_size)


def _of_all(masks: Mapping[Path, Image.Image | None]) -> list[Image.Image] | None:
    found = [mask for mask in masks.values() if mask is not None]
    if not found:
        return None
    for path, mask in masks.items():
        if mask is None:
            raise InputError(
                f"{path} has no mask and others have; add it to {path.parent / 'masks'}, or remove "
                "all masks."
            )
    return found
