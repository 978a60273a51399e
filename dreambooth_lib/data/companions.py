"""Tell by their names which pictures are masks, maps or thumbnails of photos beside them."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from dreambooth_lib.data.sources import folded

if TYPE_CHECKING:
    from dreambooth_lib.data.images import Photo

MASKS = "masklabel|masks?|matte|alpha"
_MAPS = (
    f"{MASKS}|masked|depth|canny|edges|seg|segmentation|openpose|dwpose|densepose|pose|lineart|"
    "scribble|softedge|hed|mlsd|normals?|control|conditioning|thumb|thumbnail"
)
_MORE = (  # as in p0_depth_map, p0_mask0 or p0_lineart_anime
    r"([-_ ]?(maps?|image|img|anime|realistic|coarse|standard|full|face|faceonly|hand|hed|pidinet|"
    r"pidisafe|safe|midas|zoe|leres|bae|anything|ade20k|coco|inverted|v?\d+))*"
)
_COPY = r"(?P<copy> \(\d+\))?"  # what a browser adds to the name of a second download
_NEVER_PHOTOS = re.compile(rf".*[-_ .](masklabel|condlabel){_COPY}")


def photos_of(stem: str, words: str = _MAPS, glued: bool = False) -> list[str]:
    """Return what the photo is called that a name says that it is a mask or map of: all readings.

    ``words`` is a pattern. A word stands apart or behind a digit; if ``glued``, anywhere. A mask
    with a number in parentheses is that of a photo with the same one, or of one without: it was
    downloaded twice.
    """
    apart = "[-_ .(]*" if glued else r"([-_ .(]+|(?<=\d))"
    after = re.compile(rf"{apart}({words}){_MORE}\)?{_COPY}")
    before = re.compile(rf"({words}){_MORE}[-_ .]+")
    places = range(1, len(stem))
    ends = {stem[:place]: match for place in places if (match := after.fullmatch(stem, place))}
    photos = [photo + match["copy"] for photo, match in ends.items() if match["copy"]] + [*ends]
    return photos + [stem[place:] for place in places if before.fullmatch(stem, 0, place)]


def find_companions(photos: "Iterable[Photo]", unused: Iterable[str]) -> list[str]:
    """Return the names of pictures that are masks, maps or thumbnails of other photos.

    ``unused`` are names of photos that are not read.
    """
    stems = {photo.name: _stem(photo.name) for photo in photos}
    drawn = {photo.name for photo in photos if photo.traits.is_black_and_white}
    elsewhere = {_stem(name) for name in unused}
    photographed = {stems[name] for name in stems.keys() - drawn} | elsewhere
    known = {*stems.values()} | elsewhere

    def is_companion(name: str) -> bool:
        stem, is_drawn = stems[name], name in drawn
        if _NEVER_PHOTOS.fullmatch(stem) or (is_drawn and stem in photographed):
            return True
        if is_drawn and photographed and photos_of(stem):
            return True
        return not known.isdisjoint(photos_of(stem, glued=is_drawn))

    return [name for name in stems if is_companion(name)]


def _stem(name: str) -> str:
    return folded(PurePosixPath(name).stem)
