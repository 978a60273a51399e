"""Note what of its photos a run trains on, and tell what of it has changed since.

RUN/photo_digests.json   the photos' digests and, in the same order, their captions, the middles of
                         their crops and the digests of their masks

Names do not count, so that copies of the photos elsewhere are the same ones.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from dreambooth_lib.core.checked_json import read_object, write_object
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.crops import center_for
from dreambooth_lib.data.images import DataError, Photo, captioned, listed, read_photos
from dreambooth_lib.data.masks import read_mask

PHOTOS_FILE = "photo_digests.json"  #: in a run's folder: which photos it trains on
_WORDS = {"digests": "photos", "captions": "captions", "crops": "crops", "masks": "masks"}


def digests_of(photos: list[Photo]) -> list[str]:
    """Return the digests of photos, whatever their names and order."""
    return sorted(photo.traits.digest.hex() for photo in photos)


def known_digests(folder: Path) -> list[str] | None:
    """Return the digests of the photos that a run trains on; None if that was not noted."""
    digests = (read_object(folder / PHOTOS_FILE) or {}).get("digests")
    return digests if isinstance(digests, list) else None


def note(folder: Path, photos: list[Photo], config: TrainConfig) -> None:
    """Note in a run's folder what of the photos its config trains on."""
    now = _columns(photos, config)
    if read_object(folder / PHOTOS_FILE) != now:
        write_object(folder / PHOTOS_FILE, now)


def why_other_photos(folder: Path, config: TrainConfig) -> str | None:
    """Say in a sentence what of a config's photos is not as the run in a folder noted it, or None.

    What was not noted, or cannot be read now, is not compared.
    """
    known = read_object(folder / PHOTOS_FILE) or {}
    try:
        now = _columns(read_photos(config.subject), config) if known else {}
    except DataError:
        return None
    changed = [_WORDS[name] for name in now if known.get(name, now[name]) != now[name]]
    if not changed:
        return None
    return (
        f"{folder} holds a run that was trained with other "
        f"{'photos' if 'photos' in changed else listed(changed)} than {config.subject.photos} "
        "has now; choose another folder for a new run."
    )


def _columns(photos: list[Photo], config: TrainConfig) -> dict[str, list[Any]]:
    """Return the columns of the note; crops and masks as far as the config uses them."""
    subject, rows = config.subject, []
    for photo in captioned(photos, subject.instance_prompt, subject.identifier):
        mask = None if config.background_weight is None else read_mask(photo)
        rows.append(
            [
                photo.traits.digest.hex(),
                photo.caption,
                [*center_for(photo, config.crop)],
                mask and hashlib.sha256(mask.tobytes()).hexdigest(),
            ]
        )
    columns = zip(*sorted(rows, key=json.dumps), strict=True)
    return dict(zip(_WORDS, map(list, columns), strict=True))
