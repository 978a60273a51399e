"""Copy the parts of a run to a drive: whole, checked, and without what is nobody else's business.

Photos go there as PNG files of what training sees, without their metadata. Configs name what lies
beside them on the drive, and everything else by its path from the run's folder.
"""

import functools
import json
import os
import shutil
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreambooth_lib.core.config_types import MODELS
from dreambooth_lib.core.digests import (
    DIGESTS,
    file_digest,
    forget_digest,
    note_digest,
    renew_digest,
)
from dreambooth_lib.core.disk import require_room
from dreambooth_lib.core.files import (
    Fingerprint,
    copy_file,
    fingerprint,
    replace_file,
    replacing_folder,
    visible_files,
)
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.crops import write_centers
from dreambooth_lib.data.images import DataError, Photo, read_photos
from dreambooth_lib.data.masks import SUFFIX, read_mask
from dreambooth_lib.training.runs import CLASS_PHOTOS, PHOTOS

#: Bytes above which weights are rounded and a pipeline is left out: a free Drive has 15 GB in all.
LARGE = 2**30
#: Files that may have local paths in them: a run's config, the manifest of a set of class images,
#: and what a LoRA notes about its base.
NAMING_PATHS = ("config.toml", "manifest.json", "base.json")
_JSON = json.loads, functools.partial(json.dumps, indent=2)


def describe(name: str, source: Path) -> Fingerprint:
    """Return the fingerprint of a part's source, which is compared with that of its copy.

    Photos have other names and sizes in the backup, so they are described as one.
    """
    rows = fingerprint(source)
    if name in (PHOTOS, CLASS_PHOTOS):
        return [[".", sum(row[1] for row in rows), max((row[2] for row in rows), default=0)]]
    # Digests follow from the files, and those of rounded weights are others.
    return [row for row in rows if not (is_checkpoint(name) and row[0] == DIGESTS)]


def with_copied_sizes(name: str, stamp: Fingerprint, place: Path) -> Fingerprint:
    """Append the size of its copy to each file's row."""
    copies = fingerprint(place)
    if name in (PHOTOS, CLASS_PHOTOS):
        return [[copy, *stamp[0][1:], size] for copy, size, _ in copies]
    sizes = {copy: size for copy, size, _ in copies}
    return [[*row, sizes.get(row[0])] for row in stamp]


def is_checkpoint(name: str) -> bool:
    """Return whether a part is a checkpoint."""
    return name.startswith("checkpoints/")


def is_large(path: Path) -> bool:
    """Return whether a file or folder is above :data:`LARGE`."""
    return sum(size for _, size, _ in fingerprint(path)) > LARGE


def copy_part(
    name: str, source: Path | Subject, place: Path, stamp: Fingerprint, run: Path
) -> None:
    """Copy a part of the run in the folder ``run``; it appears only once it is complete.

    Raises a :class:`KitError` for a part that is damaged here, or that the drive damages.
    """
    if name in (PHOTOS, CLASS_PHOTOS) or isinstance(source, Subject):
        copy_photos(source, place)
    elif is_checkpoint(name):
        copy_checkpoint(source, place)
    elif source.is_dir():
        require_room(place.parent, sum(size for _, size, _ in stamp))
        with replacing_folder(place) as partial:
            # The digests come before what is rewritten, which renews its own.
            for file in sorted(visible_files(source), key=lambda file: file.name in NAMING_PATHS):
                _copy(source / file, partial / file, run)
    else:
        _copy(source, place, run, stamp[0][1])


def copy_photos(source: Path | Subject, place: Path) -> None:
    """Write photos, of a folder, a zip or a subject, as training sees them.

    Captions, masks and crops go with them.
    """
    photos = read_photos(source)
    with replacing_folder(place) as partial:
        for name, photo in zip(_names(photos), photos, strict=True):
            photo.image.save(partial / f"{name}.png")
            if photo.caption:
                (partial / f"{name}.txt").write_text(photo.caption, encoding="utf-8")
            with suppress(DataError):  # a broken mask stops a training that uses it, not a backup
                if (mask := read_mask(photo)) is not None:
                    mask.save(partial / f"{name}{SUFFIX}")
        if any(photo.center for photo in photos):
            named = zip(_names(photos), photos, strict=True)
            write_centers(partial, [replace(photo, name=f"{name}.png") for name, photo in named])
        copies = read_photos(partial)
        if not all(map(_is_same, photos, copies)) or len(photos) != len(copies):
            raise OSError(f"the copies of the photos in {place} differ from the photos")


def _names(photos: list[Photo]) -> list[str]:
    """Return a name for each photo's copy; sorted, the copies keep the order of the photos."""
    names = [Path(photo.name).stem for photo in photos]
    files = [f"{name}.png" for name in names]
    if files == sorted({*files}):
        return names
    return [f"{number:05d} {name}" for number, name in enumerate(names)]


def _is_same(photo: Photo, copied: Photo) -> bool:
    def known(photo: Photo) -> tuple[Any, ...]:
        return photo.traits.size, photo.traits.digest, photo.caption or None, photo.center

    return known(photo) == known(copied)


def copy_checkpoint(source: Path, place: Path) -> None:
    """Copy a checkpoint, with large weights in float16, if it is sound; check the copy.

    Raises :class:`CheckpointError` if either is damaged, and ``OSError`` if the drive writes other
    weights than it was given.
    """
    from dreambooth_lib.training import checkpoints

    weights, names = checkpoints.TENSORS, [name.name for name in visible_files(source)]
    rounded = [weights] if weights in names and is_large(source / weights) else []
    # What is copied as it is, is checked by its copy, against the same digests.
    checkpoints.check_digests(source, {*names} - {*rounded})
    sizes = {name: (source / name).stat().st_size for name in (*names, weights)}  # none is gone
    require_room(place.parent, sum(sizes.values()) - sum(sizes[name] // 2 for name in rounded))
    with replacing_folder(place) as partial:
        for name in (name for name in names if name not in rounded):
            copy_file(source / name, partial / name)
        try:
            checkpoints.check_digests(partial, rounded)
        except checkpoints.CheckpointError:
            checkpoints.check_digests(source)  # if that is the damaged one
            raise
        for name in rounded:
            written = checkpoints.round_weights(source / name, partial / name)
            if file_digest(partial / name) != written:
                raise OSError(f"{partial / name} differs from what was written")
            note_digest(partial / name, written)


def delete_removed(name: str, known: Fingerprint, stamp: Fingerprint, place: Path) -> Fingerprint:
    """Delete the files of a folder's copy that the folder no longer has; return the others."""
    if name in (PHOTOS, CLASS_PHOTOS):
        return known
    names = {file for file, *_ in stamp}
    for file, *_ in known:
        if file not in names and (place / file).exists():
            if is_checkpoint(name):
                forget_digest(place, file)
            hide_and_delete(place / file)
    return [row for row in known if row[0] in names]


def hide_and_delete(path: Path) -> None:
    """Delete a file or folder so that whatever is left, if interrupted, cannot pass for it.

    Its files are emptied first, as Drive's trash counts towards its quota.
    """
    if not path.name.startswith("."):
        path = path.rename(path.with_name(f".{path.name}.gone"))
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            os.truncate(file, 0)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _copy(source: Path, place: Path, run: Path, size: int | None = None) -> None:
    """Copy a file; those that may name local paths without them."""
    if source.name in NAMING_PATHS:
        _rewrite(source, place, lambda fields: _make_portable(fields, run))
    else:
        copy_file(source, place, size)


def localize(file: Path, run: Path) -> None:
    """Make paths absolute again in one of :data:`NAMING_PATHS`; they are relative to ``run``."""

    def change(fields: dict[str, Any]) -> None:
        for name in MODELS:
            if str(fields.get(name)).startswith("../"):
                fields[name] = os.path.normpath(run / fields[name])

    _rewrite(file, file, change)


def _make_portable(fields: dict[str, Any], run: Path) -> None:
    """Take local paths out of the fields of a run's config, manifest or note."""
    if isinstance(fields.get("subject"), dict):
        fields["subject"]["photos"] = PHOTOS
        fields["subject"].pop("left_out", None)  # these are not copied, and copies have new names
    if "class_folder" in fields:
        fields["class_folder"] = CLASS_PHOTOS
    for name in MODELS:
        if os.path.isabs(str(fields.get(name, ""))):
            fields[name] = os.path.relpath(fields[name], run.resolve())


def _rewrite(source: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a TOML or JSON file's fields, as ``change`` changes them, to ``place``.

    If there are digests beside ``place``, its own is written anew.
    """
    import tomli_w

    before = file_digest(source)
    text = source.read_text(encoding="utf-8")
    load, dump = (tomllib.loads, tomli_w.dumps) if source.suffix == ".toml" else _JSON
    fields = load(text)
    change(fields)
    replace_file(place, (text if fields == load(text) else dump(fields)).encode())
    renew_digest(place, before)
