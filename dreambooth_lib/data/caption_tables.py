"""Read captions from tables and from JSON files."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from dreambooth_lib.data.sources import DataError, SourceFile, folded

MAX_TABLE = 2**26  #: bytes of a table of captions


def read_text(file: SourceFile, limit: int, what: str) -> str:
    """Read UTF-8 text. Raises :class:`DataError` for any other, and above ``limit`` bytes."""
    try:
        return file.read(limit, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8; save it as UTF-8 text.") from error


def read_table(file: SourceFile, names: Sequence[str]) -> dict[str, str]:
    """Return the captions of a table by their photos' names, which are among ``names``.

    Raises :class:`DataError` for a broken table, and for a photo that is missing.
    """
    rows = _csv_rows if file.suffix == ".csv" else _json_rows
    known = {folded(name): name for name in names} | {name: name for name in names}
    captions = {}
    for where, row in rows(file, read_text(file, MAX_TABLE, "a table of captions")):
        match row:
            case {"file_name": str(name), "text": str(caption)}:
                pass
            case {"file_name": str(name), "caption": str(caption)}:
                pass
            case _:
                raise DataError(f"{where} lacks the strings 'file_name' and 'text'; add them.")
        photo = known.get(name) or known.get(folded(_plain(name)))
        if photo is None:
            raise DataError(f"{where} names '{name}', which is missing; correct that line.")
        captions[photo] = caption.strip()
    return captions


def _plain(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")))  # without "./"


def _json_rows(file: SourceFile, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"line {number} of {file}"
        try:
            if line.strip():
                yield where, json.loads(line)
        except RecursionError as error:
            raise DataError(f"{where} is nested too deeply; correct that line.") from error
        except ValueError as error:
            raise DataError(f"{where} is not valid JSON ({error}); correct that line.") from error


def _csv_rows(file: SourceFile, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield f"line {reader.line_num} of {file}", row
    except csv.Error as error:
        where = f"line {reader.line_num} of {file}"
        raise DataError(f"{where} is not valid CSV ({error}); correct that line.") from error


def read_json(file: SourceFile, names: Sequence[str]) -> dict[str, str]:
    """Return the captions of a JSON file beside a photo, or as kohya's; none of any other."""
    try:
        read = json.loads(read_text(file, MAX_TABLE, "a table of captions"))
    except (DataError, ValueError, RecursionError):
        return {}
    stems: dict[str, list[str]] = {}
    for name in names:
        for key in {folded(name), folded(PurePosixPath(name).stem)}:
            stems.setdefault(key, []).append(name)
    own = stems.get(folded(PurePosixPath(file.name).stem), [])
    entries = [(name, read) for name in own]
    if isinstance(read, dict) and not own:
        keys = {key: folded(PurePosixPath(key.replace("\\", "/")).name) for key in read}
        entries = [(name, read[key]) for key in read for name in stems.get(keys[key], [])]
    captions = {}
    for name, entry in entries:
        texts = [entry.get(key) for key in ("caption", "tags")] if isinstance(entry, dict) else []
        if text := ", ".join(text.strip() for text in texts if isinstance(text, str)):
            captions[name] = text
    return captions
