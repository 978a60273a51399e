"""Pictures in, checked: folders and zips, the DreamBooth data set, tensors, identifiers.

Everything is read in memory and nothing is written, so a bad input leaves nothing half-made.
"""

import hashlib
import io
import json
import re
import stat
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dreambooth_lib.config import DEFAULT_IDENTIFIER, Subject

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 50_000_000  #: pixels per picture, by its header
MAX_ZIP_BYTES = 2 * 2**30  #: bytes of all members of a zip, unpacked
MAX_ZIP_RATIO = 100  #: unpacked bytes per byte of the zip, for zips above 100 MiB unpacked

#: Pillow's formats that are pictures; others, such as EPS, would start programs to decode them.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000",
            "PPM", "QOI")  # fmt: skip
_NEEDS_DECODER = {".heic", ".heif", ".avif", ".avifs", ".jxl"}
_PICTURES = _NEEDS_DECODER | {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp",
                              ".bmp", ".gif", ".tif", ".tiff"}  # fmt: skip
_COMPANIONS = {".txt", ".json", ".jsonl", ".csv", ".md", ".xml", ".url", ".ini"}
_IGNORED = {"__macosx", "thumbs.db", "desktop.ini"}

_HASH_BITS = 12  # of 64; shifting a photo by 5% changes up to 14, another view 10 and more
_HASH_LEVELS = 20.0  # of 255, mean over an 8x8 thumbnail; other views of a subject start at 23
_BLUR_VARIANCE = 50.0  # sharp photos have 190 and more, those blurred by 1.6 px of 256 below 35
_COMMON_SHARE = 0.85  # of the merged tokens, by frequency; in CLIP "teapot" lies at 0.82
_KNOWN_BAD = {"sks": "a rifle, and guns appear in the pictures"}
_AVOID = {*_KNOWN_BAD, "kkk", "xxx", "nsfw", "nra", "fck", "dbz", "lgbt", "bdsm"}


class DataError(ValueError):
    """Pictures or tables that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class Photo:
    """One picture: its file name, an RGB image without metadata, its caption if it has one."""

    name: str
    image: Image.Image
    caption: str | None = None


@dataclass(frozen=True)
class Finding:
    """Something about the pictures that a user should know, and which pictures it concerns."""

    kind: str  #: "duplicate", "near-duplicate", "tiny", "blurred" or "extreme-aspect"
    names: tuple[str, ...]
    message: str


def read_pictures(source: str | Path) -> list[Photo]:
    """All pictures of a folder (not of its sub-folders) or a zip, sorted by name.

    Turned upright by EXIF, transparency put on white, 16-bit scaled to 8-bit, the first frame of
    several; a zip's pictures may lie in one sub-folder. Captions come from ``NAME.txt`` beside the
    picture or else from ``metadata.jsonl`` (``{"file_name": ..., "text": ...}``). Hidden and
    system files and text files are ignored. Raises :class:`DataError` for everything else that is
    not a picture, for pictures that are damaged or above :data:`MAX_PIXELS`, for zips that are
    damaged, encrypted, explode or leave their folder, and where there is no picture.
    """
    path = Path(source)
    try:
        if path.is_dir():
            files = {p.name: p.read_bytes for p in path.iterdir() if _is_wanted(p)}
            return _photos(path, files)
        if not path.exists():
            raise DataError(f"there is no folder or zip {path}; check the path.")
        with zipfile.ZipFile(path) as archive:
            return _photos(path, _zip_members(path, archive))
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, EOFError) as error:
        raise DataError(
            f"{path} is not a sound zip ({error}); give a folder or a zip of pictures."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); check its permissions.") from None


def _is_wanted(path: Path) -> bool:
    if path.name.startswith(".") or path.name.lower() in _IGNORED or path.is_dir():
        return False
    if not path.is_file():
        raise DataError(f"{path} is a broken link or no regular file; remove it.")
    return True


def _zip_members(path: Path, archive: zipfile.ZipFile) -> dict[str, Callable[[], bytes]]:
    """Checked members by their names without the sub-folder that all pictures lie in."""
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in name.split("/"):
            raise DataError(f"'{info.filename}' in {path} leads out of the zip; pack it anew.")
        if info.flag_bits & 1:
            raise DataError(f"'{name}' in {path} is encrypted; pack it without a password.")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"'{name}' in {path} is a link; pack the picture itself.")
        member = PurePosixPath(name)
        if member in members:
            raise DataError(f"'{name}' is in {path} twice; pack it anew.")
        hidden = any(part.startswith(".") or part.lower() in _IGNORED for part in member.parts)
        if not hidden and not name.endswith("/"):
            members[member] = info
    total, packed = sum(i.file_size for i in archive.infolist()), path.stat().st_size
    if total > MAX_ZIP_BYTES or total > MAX_ZIP_RATIO * max(packed, 2**20):
        raise DataError(
            f"{path} unpacks to {total / 2**20:.0f} MiB from {packed / 2**20:.1f} MiB, more than "
            "pictures need; pack JPEG or PNG pictures only."
        )
    used = (m for m in members if m.suffix.lower() not in _COMPANIONS or m.name == "metadata.jsonl")
    folders = sorted({str(m.parent) for m in used})
    if len(folders) > 1:
        raise DataError(f"{path} has files in several folders ({', '.join(folders)}); use one.")
    return {
        member.name: lambda info=info: archive.read(info)  # type: ignore[misc]
        for member, info in members.items()
        if str(member.parent) in folders
    }


def _photos(path: Path, files: dict[str, Callable[[], bytes]]) -> list[Photo]:
    photos, texts = [], {}
    for name, read in sorted(files.items()):
        suffix = Path(name).suffix.lower()
        try:
            if suffix not in _COMPANIONS:
                photos.append(Photo(name, _decode(f"'{name}' in {path}", suffix, read())))
            elif suffix == ".txt" or name == "metadata.jsonl":
                texts[name] = read()
        except DataError:
            raise
        # Decoders and unpackers raise nearly anything for a damaged file.
        except Exception as error:
            raise DataError(
                f"'{name}' in {path} cannot be read ({str(error) or type(error).__name__}); "
                "replace or remove it."
            ) from None
    if not photos:
        raise DataError(f"{path} has no pictures; put JPEG or PNG files directly into it.")
    captions = _metadata(path, {photo.name for photo in photos}, texts)
    for photo in photos:
        beside = f"{Path(photo.name).stem}.txt"
        if beside in texts:
            captions[photo.name] = _text(path, beside, texts)
    return [replace(photo, caption=captions.get(photo.name) or None) for photo in photos]


def _text(path: Path, name: str, texts: dict[str, bytes]) -> str:
    try:
        return texts[name].decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(f"'{name}' in {path} is not UTF-8; save it as UTF-8 text.") from None


def _metadata(path: Path, names: set[str], texts: dict[str, bytes]) -> dict[str, str]:
    captions: dict[str, str] = {}
    if "metadata.jsonl" not in texts:
        return captions
    for number, line in enumerate(_text(path, "metadata.jsonl", texts).split("\n"), 1):
        where = f"line {number} of 'metadata.jsonl' in {path}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not valid JSON ({error}); mend that line.") from None
        match row:
            case {"file_name": str(name), "text": str(caption)}:
                captions[name] = caption.strip()
            case _:
                raise DataError(f"{where} lacks the strings 'file_name' and 'text'; add them.")
        if name not in names:
            raise DataError(f"{where} names '{name}', which is not there; mend that line.")
    return captions


def _decode(where: str, suffix: str, data: bytes) -> Image.Image:
    Image.init()
    too_large = DataError(f"{where} has more than {MAX_PIXELS:,} pixels; make it smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            formats = [name for name in _FORMATS if name in Image.OPEN]
            image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise too_large from None
    except UnidentifiedImageError:
        if suffix in _NEEDS_DECODER or data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
            problem = "cannot be decoded here; convert it to JPEG or PNG"
        elif suffix in _PICTURES:
            problem = "is empty, damaged or no picture; replace or remove it"
        else:
            problem = "is neither a picture nor a caption; remove it"
        raise DataError(f"{where} {problem}.") from None
    if image.width * image.height > MAX_PIXELS:
        raise too_large
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its 32-bit values have no known scale")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its floating-point values have no known scale")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    # Only the pixels go on: a plain copy would carry EXIF, with its GPS position, and ICC data.
    return Image.frombytes("RGB", image.size, image.tobytes())


def check_pictures(photos: list[Photo], resolution: int = 512) -> list[Finding]:
    """What may spoil training: copies, pictures below ``resolution`` pixels, blur, narrow shapes.

    "duplicate" has the same pixels. "near-duplicate" differs from another picture or its mirror
    image in at most 12 of 64 bits of a difference hash (is each cell of a 9x8 grey thumbnail
    brighter than its left neighbour?) and in at most 20 of 255 levels, on average, of an 8x8
    colour thumbnail. "tiny" has a shorter side below ``resolution``. "blurred" has a variance of
    the Laplacian below 50 in grey levels of 0 to 255, its shorter side brought down to 256 pixels.
    "extreme-aspect" is more than twice as long as it is short.
    """
    findings: list[Finding] = []
    copies: dict[tuple[tuple[int, int], bytes], list[Photo]] = {}
    for photo in photos:
        digest = hashlib.sha256(photo.image.tobytes()).digest()
        copies.setdefault((photo.image.size, digest), []).append(photo)
    for group in copies.values():
        if len(group) > 1:
            names = tuple(photo.name for photo in group)
            text = f"{', '.join(names)} are the same picture; keep one of them."
            findings.append(Finding("duplicate", names, text))
    prints = [(g[0].name, _print(g[0].image), _print(ImageOps.mirror(g[0].image)))
              for g in copies.values()]  # fmt: skip
    for (first, plain, mirrored), (second, other, _) in combinations(prints, 2):
        same = _is_near(plain, other)
        if same or _is_near(mirrored, other):
            how = "nearly the same picture" if same else "nearly mirror images of each other"
            text = f"{first} and {second} are {how}; keep one of them."
            findings.append(Finding("near-duplicate", (first, second), text))
    for photo in photos:
        findings += _check_picture(photo, resolution)
    return findings


def _print(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
    return grey[:, 1:] > grey[:, :-1], colours


def _is_near(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    bits = int((one[0] != other[0]).sum())
    return bits <= _HASH_BITS and float(np.abs(one[1] - other[1]).mean()) <= _HASH_LEVELS


def _check_picture(photo: Photo, resolution: int) -> list[Finding]:
    short, long = sorted(photo.image.size)
    scale = min(1.0, 256 / short)
    size = [max(3, round(side * scale)) for side in photo.image.size]
    grey = photo.image.convert("L").resize((size[0], size[1]), Image.Resampling.LANCZOS)
    g = np.asarray(grey).astype(np.float32)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    problems = {
        "tiny": (short < resolution, f"has a side of {short} pixels, below {resolution}"),
        "blurred": (laplacian.var() < _BLUR_VARIANCE, "looks blurred"),
        "extreme-aspect": (long > 2 * short, "is more than twice as long as short; crop it"),
    }
    return [
        Finding(kind, (photo.name,), f"{photo.name} {text}.")
        for kind, (found, text) in problems.items()
        if found
    ]


def load_subject(
    source: str | Path, class_noun: str, identifier: str = DEFAULT_IDENTIFIER, name: str = ""
) -> Subject:
    """The subject in a folder or zip, after reading all its pictures once.

    Warns once per finding of :func:`check_pictures`, save "tiny", which depends on the resolution.
    Raises :class:`DataError` as :func:`read_pictures` does, and ``ConfigError`` for empty words.
    """
    subject = Subject(str(Path(source).resolve()), class_noun, identifier, name)
    for finding in check_pictures(read_pictures(source)):
        if finding.kind != "tiny":
            warnings.warn(finding.message, stacklevel=2)
    return subject


def load_dataset(folder: str | Path) -> list[Subject]:
    """The subjects of a folder in the DreamBooth data set's layout, in the order of its table.

    ``folder`` or its ``dataset`` holds ``prompts_and_classes.txt`` and a folder per subject. The
    table has the columns ``subject_name,class`` and may have ``type`` ("live" or "object");
    without it, dogs and cats are live. Subjects without a folder are left out. Raises
    :class:`DataError` for a missing or broken table and for folders that are not in it.
    """
    root = Path(folder)
    if (root / "dataset" / "prompts_and_classes.txt").is_file():
        root = root / "dataset"
    table = root / "prompts_and_classes.txt"
    if not table.is_file():
        raise DataError(f"{folder} has no prompts_and_classes.txt; give the data set's folder.")
    rows = _class_table(table)
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    for unknown in sorted(folders - rows.keys()):
        raise DataError(f"the folder '{unknown}' is not in the table of {table}; add its class.")
    if not folders:
        raise DataError(f"{root} has no folder of a subject in {table.name}; add one.")
    return [
        Subject(str((root / name).resolve()), class_noun, name=name, kind=kind)
        for name, (class_noun, kind) in rows.items()
        if name in folders
    ]


def _class_table(path: Path) -> dict[str, tuple[str, str]]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    header = next((line for line in lines if re.fullmatch("subject_name,class(,type)?", line)), "")
    if not header:
        raise DataError(f"{path} has no table 'subject_name,class'; add one below that line.")
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


def to_tensor(
    image: Image.Image,
    resolution: int,
    crop: str = "center",
    flip: bool = False,
    generator: "torch.Generator | None" = None,
) -> "torch.Tensor":
    """The picture as float32 of [3, resolution, resolution] in [-1, 1].

    The largest square, in the middle or, with ``crop="random"``, at a place that ``generator``
    draws, is resized by Lanczos; ``flip`` mirrors it. Raises :class:`DataError` for another crop.
    """
    import torch

    if crop not in ("center", "random"):
        raise DataError(f"crop is '{crop}'; it can be 'center' or 'random'.")
    side, spare = min(image.size), max(image.size) - min(image.size)
    offset = spare // 2
    if crop == "random":
        offset = int(torch.randint(spare + 1, (1,), generator=generator))
    left, top = (offset, 0) if image.width > image.height else (0, offset)
    # Cropping within the resize never makes the long side, which may be of millions of pixels.
    box = (left, top, left + side, top + side)
    square = image.convert("RGB").resize((resolution,) * 2, Image.Resampling.LANCZOS, box=box)
    if flip:
        square = ImageOps.mirror(square)
    pixels = torch.from_numpy(np.asarray(square).astype(np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def shuffled(count: int, seed: int, start: int, length: int) -> list[int]:
    """Items ``start`` to ``start + length - 1`` of an endless stream of 0 to ``count - 1``.

    The stream goes through all items in a new order each epoch. It depends on nothing but the
    arguments, so that resuming needs no state. Raises :class:`DataError` if ``count`` is below 1.
    """
    if count < 1:
        raise DataError(f"there are {count} items to shuffle; give 1 or more.")
    epochs = range(start // count, -(-(start + length) // count))
    stream = [int(i) for e in epochs for i in np.random.default_rng((seed, e)).permutation(count)]
    return stream[start % count :][:length]


def _merged_tokens(tokenizer: Any) -> list[str]:
    """Tokens of several letters by index, which in CLIP's vocabulary is from frequent to rare."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [t for t, _ in vocabulary if len(t.removesuffix("</w>")) > 1 and not t.startswith("<|")]


def rare_identifiers(tokenizer: Any, count: int = 20) -> list[str]:
    """Up to ``count`` words of 3 or 4 letters that are one rare token each, the rarest first.

    Taken from the last 15% of the merged tokens of a ``CLIPTokenizer``; words with a vowel
    and known bad ones are left out, since they may mean something to the base.
    """
    tokens = _merged_tokens(tokenizer)
    words: list[str] = []
    for token in reversed(tokens[int(_COMMON_SHARE * len(tokens)) :]):
        word = token.removesuffix("</w>")
        if len(words) == count:
            break
        if not re.fullmatch("[b-df-hj-np-tv-xz]{3,4}</w>", token) or word in _AVOID:
            continue
        if len(tokenizer.tokenize(word)) == 1:
            words.append(word)
    return words


def check_identifier(identifier: str, tokenizer: Any) -> list[str]:
    """Warnings, a sentence each, about an identifier; none if it is a rare single token.

    A single token counts as common within the first 85% of the merged tokens.
    """
    warned = []
    tokens = tokenizer.tokenize(identifier)
    merged = _merged_tokens(tokenizer)
    if len(tokens) != 1:
        warned.append(
            f"identifier '{identifier}' is {len(tokens)} tokens ({', '.join(tokens)}), which are "
            "harder to bind; choose a single token from rare_identifiers."
        )
    elif tokens[0] not in merged[int(_COMMON_SHARE * len(merged)) :]:
        warned.append(
            f"identifier '{identifier}' is a common token of the base, whose meaning would mix with "
            "the subject's; choose a rare one from rare_identifiers."
        )
    if identifier.lower() in _KNOWN_BAD:
        warned.append(
            f"identifier '{identifier}' is known to be {_KNOWN_BAD[identifier.lower()]}; choose "
            "another."
        )
    return warned
