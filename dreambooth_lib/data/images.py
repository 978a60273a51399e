"""Read photos and captions from a folder, zip or file, as upright RGB images without metadata.

Nothing is written, and few photos are kept decoded: the others are decoded again when they are
needed, if their files are still the same.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

from PIL import Image

from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.user_text import python_string
from dreambooth_lib.data.captions import find_captions
from dreambooth_lib.data.companions import find_companions
from dreambooth_lib.data.crops import CENTERS, read_centers
from dreambooth_lib.data.decoding import MAX_BYTES, decode, is_photo
from dreambooth_lib.data.masks import pair_masks
from dreambooth_lib.data.sources import (
    CAPTION_SUFFIXES,
    RAW_SUFFIXES,
    TEXT_SUFFIXES,
    DataError,
    SourceFile,
    folders_with_photos,
    list_files,
)
from dreambooth_lib.data.traits import Traits, measure

__all__ = ["DataError", "Images", "Photo", "captioned", "read_photos", "read_source"]

KEPT_PIXELS = 64_000_000  #: of a source's photos, in all, that stay decoded; 192 MB
#: Above so many pixels in all, a source needs a byte for every 1000, as any photos have.
MAX_FLAT_PIXELS = 500_000_000
_PIXELS_PER_BYTE = 1000
_KNOWN_FILES = 20_000

# By the sha256 of a file, so that no start measures photos again that this process has read.
_traits: dict[bytes, Traits] = {}


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image in a file that was read once, to be read again."""

    file: SourceFile
    digest: bytes  #: sha256 of the file
    traits: Traits
    kept: Image.Image | None

    def decode(self) -> Image.Image:
        """Return the image. Raises :class:`DataError` if its file has changed or is gone."""
        if self.kept is not None:
            return self.kept
        data = self.file.read_again(self.digest, MAX_BYTES)
        return decode(str(self.file), self.file.suffix, data)


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo: its file name, its RGB image or where that is stored, and what belongs to it."""

    name: str
    pixels: Image.Image | StoredImage
    caption: str | None = None
    mask: SourceFile | None = None  #: white on the subject; see ``data.masks``
    #: the middle of its crop where it was moved, in parts of width and height; see ``data.crops``
    center: tuple[float, float] | None = None

    @property
    def image(self) -> Image.Image:
        """Return the RGB image without metadata, decoded again if it is not kept.

        Raises :class:`DataError` if its file has changed or is gone.
        """
        return self.pixels.decode() if isinstance(self.pixels, StoredImage) else self.pixels

    @cached_property
    def traits(self) -> Traits:
        """Return its size, a digest of its pixels, and what the quality checks need."""
        return self.pixels.traits if isinstance(self.pixels, StoredImage) else measure(self.pixels)


class Images(Sequence[Image.Image]):
    """The photos' images as a sequence that decodes each one when it is asked for."""

    def __init__(self, photos: Sequence[Photo]):
        self._photos = photos

    def __len__(self) -> int:
        return len(self._photos)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        chosen = self._photos[index]
        return chosen.image if isinstance(chosen, Photo) else [photo.image for photo in chosen]


class BadPhotosError(DataError):
    """Photos that cannot be used, beside others that can."""

    def __init__(self, errors: dict[str, DataError]):
        first, *others = errors.values()
        also = f"; {listed([*errors][1:])} cannot be used either" if others else ""
        self.problem = f"{str(first).removesuffix('.')}{also}"  #: without what to do else
        super().__init__(
            f"{self.problem}; or go on without: left_out = "
            f"[{', '.join(map(python_string, errors))}]."
        )
        self.names = tuple(errors)  #: of their files
        self._errors = errors

    def __reduce__(self) -> tuple[Any, ...]:
        # By itself, another process would get the sentence instead of the errors.
        return type(self), (self._errors,)


class Source(NamedTuple):
    """The photos of a folder or zip, and a sentence on each kind of file that is not used."""

    photos: list[Photo]
    notes: list[str]


def captioned(photos: list[Photo], prompt: str, identifier: str = "{}") -> list[Photo]:
    """Return the photos with ``prompt`` as the caption of those that have none.

    Each ``{}`` in a caption becomes the identifier, as in every prompt.
    """
    return [replace(p, caption=(p.caption or prompt).replace("{}", identifier)) for p in photos]


def read_images(folder: Path, names: Collection[str]) -> list[Photo]:
    """Read the images of these names in a folder, sorted by name, and nothing else there.

    Raises :class:`DataError` for a damaged one.
    """
    return _read_all(folder, [file for file in list_files(folder) if file.name in names])


def read_photos(source: str | Path | Subject) -> list[Photo]:
    """Read all photos in a folder (not in its sub-folders) or a zip, or the one at a path, by name.

    Of a subject, read its photos without those that it leaves out.

    They are turned upright by EXIF, colours become sRGB by the ICC profile, transparency becomes
    white, 16 bits are scaled to 8, and of several frames the first is read. A zip's photos may be
    in one sub-folder. Captions come from ``NAME.txt`` beside the photo or else from
    ``metadata.jsonl`` or ``metadata.csv`` (``file_name`` and ``text``). Other files are passed
    over, and masks belong to their photos; :func:`read_source` names them. Raises
    :class:`BadPhotosError` for photos that are damaged or above ``decoding.MAX_PIXELS``, and
    :class:`DataError` if there are no others, and for zips that are damaged, encrypted, unpack to
    too much or reach outside.
    """
    return read_source(source).photos


def read_source(source: str | Path | Subject) -> Source:
    """Read photos as :func:`read_photos` does, with a sentence on each kind of file left out."""
    subject = source if isinstance(source, Subject) else None
    path = Path(subject.photos if subject else source).expanduser()  # type: ignore[arg-type]
    left_out = subject.left_out or () if subject else ()
    files, texts, raw, others = [], {}, [], []
    for file in list_files(path):
        if file.name in left_out:
            continue
        if file.suffix in RAW_SUFFIXES:
            raw.append(file.name)
        elif file.suffix in TEXT_SUFFIXES:
            if file.suffix in CAPTION_SUFFIXES:
                texts[file.name] = file
        elif is_photo(file):
            files.append(file)
        else:
            others.append(file.name)
    read = _read_all(path, files)
    centers = read_centers(texts.pop(CENTERS, None))
    passed_over = [*left_out, *raw]
    captions, unused = find_captions([*(photo.name for photo in read), *passed_over], texts)
    masks = find_companions(read, passed_over)
    names = [photo.name for photo in read if photo.name not in masks]
    mask_of = pair_masks(path, names, {f.name: f for f in files if f.name in masks})
    photos = [
        replace(photo, caption=captions.get(photo.name), mask=mask_of.get(photo.name),
                center=centers.get(photo.name))
        for photo in read
        if photo.name in names
    ]  # fmt: skip
    if not photos:
        if raw:
            raise DataError(
                f"{path} has only raw photos, such as {raw[0]}; save them as JPEG first."
            )
        where = "put JPEG or PNG files directly into it"
        if inside := folders_with_photos(path):
            also = f", or one of {len(inside) - 1} others" if inside[1:] else ""
            where = f"give its folder '{inside[0]}'{also}, or {where}"
        only = f", only {listed(found)}" if (found := [*texts, *others]) else ""
        raise DataError(f"{path} has no photos{only}; {where}.")
    notes = []
    if left_out:
        notes.append(f"{listed(left_out)} {_are(left_out)} left out, as you chose.")
    if masks:
        taken = (
            "was taken for a mask or map, so it is not trained on (background_weight uses masks); "
            "rename it if it is a photo."
        )
        if len(masks) > 1:
            taken = (
                "were taken for masks or maps, so they are not trained on (background_weight uses "
                "masks); rename them if they are photos."
            )
        notes.append(f"{listed(masks)} {taken}")
    if unused:
        holds = "it holds" if len(unused) == 1 else "they hold"
        notes.append(
            f"{listed(unused)} {_are(unused)} not used, because {holds} no caption of a photo "
            "here; name a caption like its photo, 'a.txt' for 'a.jpg', or list captions in "
            "metadata.csv."
        )
    if raw:
        as_jpeg = "it" if len(raw) == 1 else "them"
        notes.append(
            f"{listed(raw)} {_are(raw)} not used, because raw photos are not read; save {as_jpeg} "
            "as JPEG."
        )
    if others:
        kind = "it is neither a photo nor a caption"
        if len(others) > 1:
            kind = "they are neither photos nor captions"
        notes.append(f"{listed(others)} {_are(others)} not used, because {kind}.")
    return Source(photos, notes)


def listed(names: Iterable[str]) -> str:
    """List up to five names, and how many more there are."""
    names = list(names)
    shown = names if len(names) <= 5 else [*names[:4], f"{len(names) - 4} more files"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _read_all(path: Path, files: list[SourceFile]) -> list[Photo]:
    photos, pixels, size, kept = [], 0, 0, 0
    errors: dict[str, DataError] = {}
    for file in files:
        try:
            data = file.read(MAX_BYTES, "a photo")
            digest, image = hashlib.sha256(data).digest(), None
            traits = _traits.get(digest)
            if traits is None or kept + traits.size[0] * traits.size[1] <= KEPT_PIXELS:
                image = decode(str(file), file.suffix, data)
                if traits is None:
                    if len(_traits) >= _KNOWN_FILES:
                        _traits.clear()
                    traits = _traits[digest] = measure(image)
        except DataError as error:
            errors[file.name] = error
            continue
        area = traits.size[0] * traits.size[1]
        pixels, size = pixels + area, size + len(data)
        if pixels > MAX_FLAT_PIXELS and pixels > _PIXELS_PER_BYTE * size:
            raise DataError(
                f"{path} unpacks {size / 1e6:.1f} MB to more than {MAX_FLAT_PIXELS:,} pixels, "
                "far more than photos have; give photos."
            )
        if kept + area > KEPT_PIXELS:
            image = None
        kept += area if image is not None else 0
        photos.append(Photo(file.name, StoredImage(file, digest, traits, image)))
    if errors and photos:
        raise BadPhotosError(errors)
    for first in errors.values():
        raise first
    return photos
