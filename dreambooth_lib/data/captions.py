"""Find the photos' captions, and check that a base can learn the identifier from them."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config import Subject
from dreambooth_lib.data.sources import TABLES, DataError, SourceFile

if TYPE_CHECKING:
    from dreambooth_lib.data.images import Photo

MAX_CAPTION = 2**16  #: bytes of a caption's file
MAX_TABLE = 2**26  #: bytes of a table of captions
_BESIDE = (".txt", ".caption")


def find_captions(
    names: Sequence[str], texts: Mapping[str, SourceFile]
) -> tuple[dict[str, str | None], list[str]]:
    """Return the captions by the photos' names, and the names of texts that are none.

    A photo's caption is ``NAME.txt``, ``NAME.EXT.txt``, the same with ``.caption``, or its row in
    ``metadata.jsonl`` or ``metadata.csv``, the first of these that is there; upper and lower case
    are the same. Raises :class:`DataError` for text that is not UTF-8 or too large, and for tables
    that are broken or name a photo that is missing.
    """
    by_name = {name.lower(): file for name, file in reversed([*texts.items()])}
    captions: dict[str, str | None] = {}
    used = set()
    for table in reversed(TABLES):
        if table in by_name:
            used.add(by_name[table].name)
            captions |= _table(by_name[table], names)
    for name in names:
        stem = PurePosixPath(name).stem
        exact = [f"{stem}{suffix}" for suffix in _BESIDE]
        files = [texts[n] for n in exact if n in texts]
        beside = [f"{start}{suffix}".lower() for suffix in _BESIDE for start in (stem, name)]
        files += [by_name[n] for n in beside if n in by_name]
        if files:
            used.add(files[0].name)
            captions[name] = _text(files[0], MAX_CAPTION, "a caption").strip()
    found = {name: caption or None for name, caption in captions.items()}
    return found, [name for name in texts if name not in used]


def _text(file: SourceFile, limit: int, what: str) -> str:
    try:
        return file.read(limit, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8; save it as UTF-8 text.") from error


def _table(file: SourceFile, names: Sequence[str]) -> dict[str, str]:
    rows = _csv_rows if file.suffix == ".csv" else _json_rows
    known = {name.lower(): name for name in names} | {name: name for name in names}
    captions = {}
    for where, row in rows(file, _text(file, MAX_TABLE, "a table of captions")):
        match row:
            case {"file_name": str(name), "text": str(caption)}:
                pass
            case {"file_name": str(name), "caption": str(caption)}:
                pass
            case _:
                raise DataError(f"{where} lacks the strings 'file_name' and 'text'; add them.")
        photo = known.get(name) or known.get(name.lower())
        if photo is None:
            raise DataError(f"{where} names '{name}', which is missing; correct that line.")
        captions[photo] = caption.strip()
    return captions


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


def check_captions(photos: "Sequence[Photo]", subject: Subject) -> list[str]:
    """Return a sentence on captions that lack the identifier; none if all of them have it.

    ``{}`` in a caption stands for the identifier.
    """
    word = rf"(?<!\w){re.escape(subject.identifier)}(?!\w)"
    captions = {p.name: p.caption.replace("{}", subject.identifier) for p in photos if p.caption}
    lacking = [n for n, text in captions.items() if not re.search(word, text, re.IGNORECASE)]
    if not lacking:
        return []
    verb = "lacks" if len(lacking) == 1 else "lack"
    return [
        f"{len(lacking)} of {len(captions)} captions, of {lacking[0]}"
        f"{' and others' if len(lacking) > 1 else ''}, {verb} the identifier "
        f"'{subject.identifier}', so that training cannot bind it to these photos; write '{{}}' "
        f"where a caption names the subject, as in 'a {{}} {subject.class_noun} on the grass'."
    ]


def check_lengths(
    photos: "Sequence[Photo]", subject: Subject, tokenizers: Sequence[tuple[Any, int]]
) -> list[str]:
    """Return a sentence on each caption that the base's text encoders do not read to its end.

    Raises :class:`DataError` for an identifier beyond what they read.
    """
    texts = {f"the caption of {photo.name}": photo.caption for photo in photos if photo.caption}
    texts["the class prompt"] = subject.class_prompt
    texts["the instance prompt"] = subject.instance_prompt
    messages = []
    for name, raw in texts.items():
        text = raw.replace("{}", subject.identifier)
        if not (cut := cut_words(text, tokenizers)):
            continue
        read = text.strip().removesuffix(cut)
        if subject.identifier in text and subject.identifier not in read:
            raise DataError(
                f"{name} has the identifier '{subject.identifier}' beyond what the base reads, so "
                "that nothing would be learned of it; put it first."
            )
        shown = cut if len(cut) <= 80 else f"{cut[:60]}… {cut[-15:]}"
        messages.append(f"{name} is longer than the base reads: it is cut before '{shown}'.")
    if len(messages) > 5:
        messages[4:] = [f"{len(messages) - 4} more captions are longer than the base reads."]
    return messages


def cut_words(text: str, tokenizers: Sequence[tuple[Any, int]]) -> str:
    """Return the words at the end of a prompt that the text encoders do not read, "" if none.

    ``tokenizers`` are those of all encoders, and the tokens that each reads; what one of them
    reads is not cut.
    """
    return min((_beyond(text, *tokenizer) for tokenizer in tokenizers), key=len, default="")


def _beyond(text: str, tokenizer: Any, limit: int) -> str:
    def fits(end: int) -> bool:
        ids = tokenizer(text[:end], truncation=False, verbose=False).input_ids
        return len(ids) <= limit

    text = text.strip()
    if fits(len(text)):
        return ""
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    low, high = 0, len(starts) - 1  # the text fits up to word ``low``, but not with ``high``
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(starts[middle]) else (low, middle - 1)
    return text[starts[low] :]
