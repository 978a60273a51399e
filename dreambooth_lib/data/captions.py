"""Find the photos' captions, and check that a base can learn the identifier from them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.caption_tables import read_json, read_table, read_text
from dreambooth_lib.data.sources import (
    PHOTO_SUFFIXES,
    TABLES,
    DataError,
    SourceFile,
    folded,
    list_files,
)

if TYPE_CHECKING:
    from dreambooth_lib.data.images import Photo

MAX_CAPTION = 2**16  #: bytes of a caption's file
_BESIDE = (".txt", ".caption")
# Where a text may be cut: before words, signs, and each character of scripts without spaces.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\uffff\U00010000-\U0010ffff"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def find_captions(
    names: Sequence[str], texts: Mapping[str, SourceFile]
) -> tuple[dict[str, str | None], list[str]]:
    """Return the captions by the photos' names, and the names of texts that are none.

    A photo's caption is ``NAME.EXT.txt``, ``NAME.txt``, the same with ``.caption``, its row in
    ``metadata.jsonl`` or ``metadata.csv``, its ``NAME.json`` (``caption``), or its entry in any
    other ``.json`` as kohya's scripts write it (``caption`` and ``tags`` by the photo's name), the
    first of these that is there; upper and lower case are the same. Raises :class:`DataError` for
    text that is not UTF-8 or too large, and for tables that are broken or name a photo that is
    missing. Other JSON files are no captions.
    """
    by_name = _by_folded_name(texts)
    captions: dict[str, str | None] = {}
    used = set()
    for file in texts.values():
        if file.suffix == ".json" and (of_file := read_json(file, names)):
            used.add(file.name)
            captions |= of_file
    for table in reversed(TABLES):
        if table in by_name:
            used.add(by_name[table].name)
            captions |= read_table(by_name[table], names)
    for name in names:
        if beside := _beside(name, texts, by_name):
            used.add(beside.name)
            captions[name] = read_text(beside, MAX_CAPTION, "a caption").strip()
    found = {name: caption or None for name, caption in captions.items()}
    return found, [name for name in texts if name not in used]


def _by_folded_name(texts: Mapping[str, SourceFile]) -> dict[str, SourceFile]:
    return {folded(name): file for name, file in reversed([*texts.items()])}


def _beside(
    photo: str, texts: Mapping[str, SourceFile], by_name: Mapping[str, SourceFile]
) -> SourceFile | None:
    """Return the file beside a photo that has its caption; the same case goes first."""
    names = [f"{n}{suffix}" for suffix in _BESIDE for n in (photo, PurePosixPath(photo).stem)]
    files = [texts.get(name) for name in names] + [by_name.get(folded(name)) for name in names]
    return next((file for file in files if file), None)


def write_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Write captions, by the names of photos in a folder, to text files beside the photos.

    A caption goes to the file that it is read from; ``metadata.csv`` and other tables stay as they
    are, as text files go first. Raises ``DiskError`` where the folder cannot be written.
    """
    files = {file.name: file for file in list_files(folder)}
    texts = {name: file for name, file in files.items() if file.suffix in _BESIDE}
    by_name = _by_folded_name(texts)
    photos = [name for name, file in files.items() if file.suffix in PHOTO_SUFFIXES]
    stems = Counter(folded(PurePosixPath(name).stem) for name in photos)
    for name, caption in captions.items():
        stem = PurePosixPath(name).stem
        shares = stems[folded(stem)] > 1  # as a.jpg beside a.png does
        place = f"{name}.txt" if shares else f"{stem}.txt"
        old = _beside(name, texts, by_name)
        if old and (not shares or folded(old.name).startswith(f"{folded(name)}.")):
            place = old.name
        replace_file(folder / place, caption.encode())


def with_identifier(caption: str, noun: str, written: str = "") -> str:
    """Return a caption with ``{}`` before its first class noun, or else with the subject first.

    The noun may be ``written`` otherwise, such as ``{noun}`` in a prompt.
    """
    own = _whole_word(noun)
    if own.search(caption):
        return own.sub(lambda found: f"{{}} {written or found[0]}", caption, count=1)
    return f"a {{}} {written or noun}, {caption}".removesuffix(", ")


def class_caption(caption: str, subject: Subject) -> str:
    """Return a caption of the class: without the identifier, or with the noun in its place.

    The noun takes its place where the caption does not have it elsewhere.
    """
    identifier, noun = _whole_word(subject.identifier), _whole_word(subject.class_noun)
    if noun.search(identifier.sub(" ", caption)):
        return " ".join(identifier.sub(" ", caption).split()).replace(" ,", ",").lstrip(", ")
    return identifier.sub(lambda _: subject.class_noun, caption)


def lacking_identifier(photos: "Sequence[Photo]", subject: Subject) -> list[str]:
    """Return the names of the photos whose captions lack the identifier.

    ``{}`` in a caption stands for the identifier.
    """
    word = _whole_word(subject.identifier)
    captions = {p.name: p.caption.replace("{}", subject.identifier) for p in photos if p.caption}
    return [name for name, text in captions.items() if not word.search(text)]


def _whole_word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)  # as CLIP lowers text


def check_captions(photos: "Sequence[Photo]", subject: Subject) -> list[str]:
    """Return a sentence on captions that lack the identifier; none if all of them have it."""
    if not (lacking := lacking_identifier(photos, subject)):
        return []
    verb, those = ("lacks", "that photo") if len(lacking) == 1 else ("lack", "those photos")
    count = sum(bool(photo.caption) for photo in photos)
    return [
        f"{len(lacking)} of {count} captions ({lacking[0]}"
        f"{' and others' if len(lacking) > 1 else ''}) {verb} the identifier "
        f"'{subject.identifier}', so the model cannot link it to {those}; put '{{}}' before the "
        f"class noun, as in 'a {{}} {subject.class_noun} on the grass'."
    ]


def check_class_captions(photos: "Sequence[Photo]", subject: Subject) -> list[str]:
    """Return a sentence on the user's own class images whose captions name the subject."""
    captioned = [photo for photo in photos if photo.caption]
    lacking = {*lacking_identifier(captioned, subject)}
    if not (named := [photo.name for photo in captioned if photo.name not in lacking]):
        return []
    return [
        f"{len(named)} captions of your class images, such as that of {named[0]}, name the subject "
        f"by '{{}}' or '{subject.identifier}', which then means the class again; take it out."
    ]


def check_lengths(
    photos: "Sequence[Photo]",
    subject: Subject,
    tokenizers: Sequence[tuple[Any, int]],
    more: str = "",
) -> list[str]:
    """Return a sentence on each caption that the base's text encoders do not read to its end.

    ``more`` says how to make them read more, if that can be. Raises :class:`DataError` for an
    identifier beyond what they read.
    """
    texts = {f"the caption of {photo.name}": photo.caption for photo in photos if photo.caption}
    texts["the class prompt"] = subject.class_prompt
    texts["the instance prompt"] = subject.instance_prompt
    messages = []
    for name, raw in texts.items():
        text = raw.replace("{}", subject.identifier).strip()
        if not (cut := cut_words(text, tokenizers)):
            continue
        first = _whole_word(subject.identifier).search(text)
        if first and first.end() > len(text) - len(cut):
            raise DataError(
                f"{name} has the identifier '{subject.identifier}' past the token limit, so it "
                "would be cut off; move it to the front."
            )
        messages.append(f"{name} is too long: {_told(text, cut, tokenizers)}.")
    return _shortened(messages, more)


def check_class_lengths(
    photos: "Sequence[Photo]", tokenizers: Sequence[tuple[Any, int]], more: str = ""
) -> list[str]:
    """Return a sentence on each caption of class images that the base does not read to its end."""
    texts = {f"the caption of the class image {p.name}": p.caption for p in photos if p.caption}
    return _shortened(
        [
            f"{name} is too long: {_told(text, cut, tokenizers)}."
            for name, text in texts.items()
            if (cut := cut_words(text, tokenizers))
        ],
        more,
    )


def _shortened(messages: list[str], more: str) -> list[str]:
    """Return at most five sentences, the last of them with what makes the base read more."""
    if len(messages) > 5:
        messages[4:] = [f"{len(messages) - 4} more captions are too long."]
    if messages and more:
        messages[-1] = f"{messages[-1].removesuffix('.')}; {more}."
    return messages


def _told(text: str, cut: str, tokenizers: Sequence[tuple[Any, int]]) -> str:
    tokens, limit = count_tokens(text, tokenizers)
    shown = cut if len(cut) <= 80 else f"{cut[:60]}… {cut[-15:]}"
    return (
        f"it has {tokens} tokens, and the base's text encoders read at most {limit}; everything "
        f"from '{shown}' on is cut off"
    )


def warning_of_length(prompt: str, tokenizers: Sequence[tuple[Any, int]], more: str = "") -> str:
    """Return a sentence on a prompt that the text encoders do not read to its end, or ""."""
    if not (cut := cut_words(prompt, tokenizers)):
        return ""
    told = _told(prompt, cut, tokenizers)
    return f"the prompt '{prompt}' is too long: {told}{more and f'; {more}'}."


def count_tokens(text: str, tokenizers: Sequence[tuple[Any, int]]) -> tuple[int, int]:
    """Return a text's tokens, and how many of them are read; special tokens do not count.

    By the tokenizer that reads the text farthest.
    """

    def count(tokenizer: Any, limit: int) -> tuple[int, int]:
        ids, special = (
            len(tokenizer(part, truncation=False, verbose=False).input_ids) for part in (text, "")
        )
        return ids - special, limit - special

    counts = [count(*tokenizer) for tokenizer in tokenizers]
    return min(counts, key=lambda pair: (pair[0] - pair[1], pair[0]))


def cut_words(text: str, tokenizers: Sequence[tuple[Any, int]]) -> str:
    """Return the end of a prompt that the text encoders do not read, from a word on; "" if none.

    ``tokenizers`` are those of all encoders, and the tokens that each reads; what one of them
    reads is not cut.
    """
    return min((_beyond(text, *tokenizer) for tokenizer in tokenizers), key=len, default="")


def _beyond(text: str, tokenizer: Any, limit: int) -> str:
    def fits(end: int) -> bool:
        ids = tokenizer(text[:end].rstrip(), truncation=False, verbose=False).input_ids
        return len(ids) <= limit

    text = text.strip()
    if fits(len(text)):
        return ""
    starts = [word.start() for word in _WORDS.finditer(text)]
    low, high = 0, len(starts) - 1  # the text fits up to word ``low``, but not with ``high``
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(starts[middle]) else (low, middle - 1)
    return text[starts[low] :]
