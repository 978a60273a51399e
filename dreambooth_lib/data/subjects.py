"""Load a subject, or the subjects of a folder in the layout of the DreamBooth data set."""

import os
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.errors import printable
from dreambooth_lib.core.subject import DEFAULT_IDENTIFIER, Subject
from dreambooth_lib.data.captions import check_captions
from dreambooth_lib.data.crops import Size, bucket_of
from dreambooth_lib.data.identifiers import check_folder_name
from dreambooth_lib.data.images import DataError, read_source
from dreambooth_lib.data.quality_checks import check_photos


def load_subject(
    source: str | Path,
    class_noun: str,
    identifier: str = DEFAULT_IDENTIFIER,
    name: str = "",
    left_out: Collection[str] = (),
) -> Subject:
    """Return the subject whose photos are in a folder or zip, after checking them.

    Files that are named in ``left_out`` are passed over, such as a damaged photo.

    Warns of each finding of :func:`check_photos` but "tiny", which depends on the resolution, of
    captions that lack the identifier, and of files beside the photos that are not used.
    Raises :class:`DataError` as :func:`read_photos` does, and ``ConfigError`` for empty words.
    """
    folder = os.path.realpath(os.path.expanduser(source))
    subject = Subject(folder, class_noun, identifier, name, left_out=(*left_out,))
    for message in check_subject(subject):
        warnings.warn(message, stacklevel=2)
    return subject


def check_subject(subject: Subject, sizes: Sequence[Size] = ()) -> list[str]:
    """Return a sentence on each problem that :func:`load_subject` warns of.

    ``sizes`` are those of the buckets that the photos are cropped to, if not to squares.
    """
    photos, messages = read_source(subject)
    shapes = [bucket_of(photo.traits.size, sizes) for photo in photos] if sizes else None
    findings = check_photos(photos, shapes=shapes)
    messages += [finding.message for finding in findings if finding.kind != "tiny"]
    messages += check_captions(photos, subject) + check_folder_name(subject)
    return [printable(message) for message in messages]


def load_dataset(folder: str | Path) -> list[Subject]:
    """Return the subjects of a folder in the DreamBooth data set's layout, in its table's order.

    ``folder``, or ``dataset`` in it, has ``prompts_and_classes.txt`` and a folder for each subject.
    The table has the columns ``subject_name,class`` and optionally ``type`` ("live" or "object");
    without it, dogs and cats are live. Subjects without a folder are left out. Raises
    :class:`DataError` for a missing or broken table and for folders that are not in it.
    """
    places = (Path(folder) / "dataset", Path(folder))
    tables = [place / "prompts_and_classes.txt" for place in places]
    table = next((table for table in tables if table.is_file()), None)
    if table is None:
        raise DataError(f"{folder} has no prompts_and_classes.txt; give the data set's folder.")
    root, rows = table.parent, _class_table(table)
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    for unknown in sorted(folders - rows.keys()):
        raise DataError(f"the folder '{unknown}' is not in the table of {table}; add its class.")
    if not folders:
        raise DataError(f"{root} has no folder for any subject of {table.name}; add one.")
    try:
        return [
            Subject(str((root / name).resolve()), class_noun, name=name, kind=kind)
            for name, (class_noun, kind) in rows.items()
            if name in folders
        ]
    except ConfigError as error:
        raise DataError(f"{table}: {error}") from error


def read_table(path: Path) -> str:
    """Read ``prompts_and_classes.txt``; raise :class:`DataError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; save it as UTF-8 text.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); check its permissions.") from error


def _class_table(path: Path) -> dict[str, tuple[str, str]]:
    text = read_table(path)
    lines = [line.strip() for line in text.splitlines()]
    header = next((line for line in lines if re.fullmatch("subject_name,class(,type)?", line)), "")
    if not header:
        raise DataError(f"{path} has no table with the header 'subject_name,class'; add one.")
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
