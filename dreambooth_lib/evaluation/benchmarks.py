"""Read a benchmark: the subjects of a data set, and the prompts to draw each of them by.

Two layouts are known. The DreamBooth data set (arXiv 2208.12242) has a folder of photos for each
subject, and ``prompts_and_classes.txt`` with its classes and the prompts for each kind of subject.
DreamBench++ (arXiv 2406.16855) has one photo and a file of captions for each subject:

images/live_subject/animal/00.jpg     the photo; also live_subject/human, object and style
captions/live_subject/animal/00.txt   what it shows ("kitten"), then nine prompts, one on a line
"""

import io
import re
import urllib.request
import warnings
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.core.files import replacing_folder
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.user_text import folder_name
from dreambooth_lib.data.captions import with_identifier
from dreambooth_lib.data.images import DataError
from dreambooth_lib.data.sources import PHOTO_SUFFIXES
from dreambooth_lib.data.subjects import load_dataset, read_table

#: The DreamBooth data set's public repository.
DATASET = "https://github.com/google/dreambooth/archive/refs/heads/main.zip"


@dataclass(frozen=True)
class Benchmark:
    """A data set's subjects, and their prompts, such as ``a {} {noun} in the jungle``."""

    subjects: list[Subject]
    prompts: dict[str, list[str]]  #: by ``Subject.kind``, or by ``Subject.name`` for its own

    def prompts_for(self, subject: Subject) -> list[str]:
        """Return a subject's prompts, with ``{}`` in place of the identifier."""
        prompts = self.prompts.get(subject.kind) or self.prompts[subject.name]
        return [prompt.replace("{noun}", subject.class_noun) for prompt in prompts]

    def only(self, names: Collection[str]) -> "Benchmark":
        """Return a benchmark of the named subjects. Raises :class:`DataError` for unknown names."""
        known = [subject.name for subject in self.subjects]
        for name in names:
            if name not in known:
                raise DataError(f"there is no subject '{name}'; there are {', '.join(known)}.")
        return Benchmark([s for s in self.subjects if s.name in names], self.prompts)


def download(folder: str | Path, url: str = DATASET) -> Path:
    """Download the DreamBooth data set into ``folder`` if it is missing; return that folder.

    About 130 MB, CC BY 4.0 with some photos under the Unsplash License. Raises :class:`DataError`
    if the download fails, and ``DiskError`` if it cannot be unpacked; nothing is left then.
    """
    folder = Path(folder)
    if not (folder / "prompts_and_classes.txt").exists():
        try:
            with urllib.request.urlopen(url) as answer:
                archive = zipfile.ZipFile(io.BytesIO(answer.read()))
            with replacing_folder(folder) as partial:
                _unpack_subjects(archive, partial)
        except DiskError:
            raise
        except (OSError, HTTPException, zipfile.BadZipFile) as error:
            raise DataError(
                f"cannot download the data set from {url} ({error}); check the network, or "
                "download github.com/google/dreambooth yourself and give its folder."
            ) from error
    return folder


def _unpack_subjects(archive: zipfile.ZipFile, folder: Path) -> None:
    """Extract the entries under ``*/dataset/`` without those two folders.

    Raises :class:`BadZipFile` for an entry that would land outside ``folder``.
    """
    for entry in archive.infolist():
        root, _, name = entry.filename.partition("/dataset/")
        if name and "/" not in root and not entry.is_dir():
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise zipfile.BadZipFile(f"'{entry.filename}' would land outside the folder")
            entry.filename = name
            archive.extract(entry, folder)


def load_benchmark(folder: str | Path) -> Benchmark:
    """Read a folder in the layout of DreamBooth's data set or of DreamBench++, prompts included.

    Raises :class:`DataError` as :func:`load_dataset` does, for a kind of subject that has no
    prompts, and for a photo of DreamBench++ without captions.
    """
    places = (Path(folder), Path(folder) / "data")
    for place in places:
        if (place / "images").is_dir() and (place / "captions").is_dir():
            return _load_dreambench_plus(place)
    return _load_dreambooth(folder)


def _load_dreambooth(folder: str | Path) -> Benchmark:
    subjects = load_dataset(folder)
    file = Path(subjects[0].photos).parent / "prompts_and_classes.txt"
    prompts: dict[str, list[str]] = {}
    kind = ""
    for line in read_table(file).splitlines():
        if heading := re.fullmatch(r"(Object|Live Subject) Prompts", line.strip()):
            kind = heading[1].split()[0].lower()
        elif prompt := re.fullmatch(r"""(['"])(.*\{0\} \{1\}.*)\1\.format\(.*\),?""", line.strip()):
            prompts.setdefault(kind, []).append(prompt[2].replace("{0} {1}", "{} {noun}"))
    for subject in subjects:
        if subject.kind not in prompts:
            raise DataError(
                f"{file} has no prompts for the {subject.kind} subject '{subject.name}'; add them "
                "under 'Object Prompts' or 'Live Subject Prompts'."
            )
    return Benchmark(subjects, prompts)


def _load_dreambench_plus(folder: Path) -> Benchmark:
    """Read DreamBench++'s folder; a subject's kind is its category: "animal", "human", "object".

    A style is no subject that DreamBooth can learn, and is left out with a warning. Of each prompt
    the subject's noun becomes identifier and noun; a prompt without the noun gets both before it.
    """
    subjects, prompts, styles = [], {}, 0
    for photo in sorted((folder / "images").rglob("*")):
        place = photo.relative_to(folder / "images")
        hidden = any(part.startswith((".", "__")) for part in place.parts)
        if hidden or photo.suffix.lower() not in PHOTO_SUFFIXES:
            continue
        if len(place.parts) < 2:
            raise DataError(f"{photo} is in no category; put it into a folder such as 'object'.")
        if place.parts[-2] == "style":
            styles += 1
            continue
        file = folder / "captions" / place.with_suffix(".txt")
        noun, captions = _read_captions(file)
        # The name that the benchmark's own results have.
        words = [*place.parts[:-1], place.stem, *noun.lower().split()]
        try:
            subject = Subject(
                str(photo.resolve()), noun, name=folder_name("_".join(words)), kind=place.parts[-2]
            )
        except ConfigError as error:
            raise DataError(f"{file}: {error}") from error
        if subject.name in prompts:
            raise DataError(f"{photo} is another photo of {subject.name}; keep one of the two.")
        subjects.append(subject)
        prompts[subject.name] = [with_identifier(caption, noun, "{noun}") for caption in captions]
    if not subjects:
        raise DataError(
            f"{folder / 'images'} has no photo of a subject; give the data set's folder."
        )
    if styles:
        warnings.warn(f"the {styles} styles in {folder} are left out: DreamBooth learns a subject.",
                      stacklevel=3)  # fmt: skip
    return Benchmark(subjects, prompts)


def _read_captions(file: Path) -> tuple[str, list[str]]:
    """Return a subject's noun and its captions. Raises :class:`DataError` where there are none."""
    lines = [line.strip() for line in read_table(file).splitlines()]
    noun, *captions = [line for line in lines if line] or [""]
    if not captions:
        raise DataError(f"{file} has no captions; write the subject's noun, then one on each line.")
    if odd := next((line for line in (noun, *captions) if re.search("[{}]", line)), None):
        raise DataError(f"{file} has a brace in {odd[:80]!r}; write the line without it.")
    return noun, captions
