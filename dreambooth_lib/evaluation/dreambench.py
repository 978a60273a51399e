"""Draw the images of the paper's evaluation (arXiv 2208.12242, section 4.1).

A data set's folder holds ``prompts_and_classes.txt``: its classes, and the prompts for objects and
for live subjects. :func:`draw_all` writes

OUT/protocol.json                     what is drawn; another protocol is refused
OUT/METHOD/SUBJECT/p07-s2.png         prompt 7, seed 2
OUT/METHOD/SUBJECT/class-s10003.png   the class images that PRES, DIV and class drift need
OUT/METHOD/SUBJECT/source.json        what drew them; another base or other settings are refused

An interrupted evaluation resumes with the first missing batch.
"""

import io
import json
import re
import time
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from http.client import HTTPException
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.checked_json import read_object
from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.core.files import replace_file, replacing_folder, save_png
from dreambooth_lib.core.old_names import current_fields
from dreambooth_lib.data.images import DataError
from dreambooth_lib.data.subjects import load_dataset, read_table
from dreambooth_lib.training import memory_level, runs
from dreambooth_lib.training.config_changes import (
    absolute_base,
    describe,
    first_difference,
    flat_fields,
)
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.sampling import load_source
from dreambooth_lib.training.validation import CLASS_SEED

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

#: The DreamBooth data set's public repository.
DATASET = "https://github.com/google/dreambooth/archive/refs/heads/main.zip"

#: Returns what draws a subject's images: a finished run, a loaded family, or a base's name. It is
#: called before the first image is drawn or skipped; a method that trains is a :class:`Tuned`.
Method = Callable[[Subject], "Run | Family | str"]


@dataclass(frozen=True)
class Protocol:
    """Define what is drawn for each method and subject.

    Evaluations are comparable if their protocols are equal.
    """

    pictures: int = 4  #: images of each prompt, seeds 0, 1, ...
    class_images: int = 24  #: images of the class prompt, seeds from CLASS_SEED on
    steps: int | None = None  #: inference steps; None: the fewest that finish the base's images
    guidance_scale: float | None = None  #: None: the base's own
    negative_prompt: str = ""
    batch_size: int = 8


@dataclass(frozen=True)
class Benchmark:
    """A data set's subjects, and the prompts of each kind: ``a {} {noun} in the jungle``."""

    subjects: list[Subject]
    prompts: dict[str, list[str]]  #: by ``Subject.kind``: "object", "live"

    def prompts_for(self, subject: Subject) -> list[str]:
        """Return a subject's prompts, with ``{}`` in place of the identifier."""
        return [p.replace("{noun}", subject.class_noun) for p in self.prompts[subject.kind]]

    def only(self, names: Collection[str]) -> "Benchmark":
        """Return a benchmark of the named subjects. Raises :class:`DataError` for unknown names."""
        known = [subject.name for subject in self.subjects]
        for name in names:
            if name not in known:
                raise DataError(f"there is no subject '{name}'; there are {', '.join(known)}.")
        return Benchmark([s for s in self.subjects if s.name in names], self.prompts)


@dataclass(frozen=True)
class DrawnImage:
    """One image of an evaluation; ``prompt`` is None for a class image."""

    method: str
    subject: str
    prompt: int | None
    seed: int

    @property
    def path(self) -> Path:
        """Return its path in the evaluation's folder."""
        name = "class" if self.prompt is None else f"p{self.prompt:02d}"
        return Path(self.method, self.subject, f"{name}-s{self.seed}.png")


@dataclass(frozen=True)
class Progress:
    done: int  #: images of this process that are on disk
    total: int
    seconds_left: float  #: at the pace so far, if all others are missing


@dataclass(frozen=True)
class Tuned:
    """A method that trains the run in FOLDER/SUBJECT to its end and draws from it."""

    folder: str | Path
    config: Callable[[Subject], TrainConfig]

    def __call__(self, subject: Subject) -> Run:
        run = start_or_resume(self.folder, self.config, subject)
        if not run.finished:
            memory_level.share_level(self.folder, [run.config])  # one level for all subjects
            for _ in train(run):
                pass
        return run


def start_or_resume(
    folder: str | Path, config: Callable[[Subject], TrainConfig], subject: Subject
) -> Run:
    """Resume the run in FOLDER/SUBJECT, or start it if it is missing.

    Raises :class:`RunError` if the folder holds a run of another config.
    """
    place, fresh = Path(folder) / subject.name, config(subject)
    if not (place / "config.toml").exists():
        return runs.start(fresh, place)
    run = runs.resume(place)
    fresh = runs.with_settings_of(run, fresh)
    if difference := first_difference(flat_fields(run.config), flat_fields(fresh)):
        raise RunError(
            f"{place} holds a run of {describe(run.config)} whose {difference}; choose another "
            "folder for this one."
        )
    return run


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
    """Read a folder in the DreamBooth data set's layout, prompts included.

    Raises :class:`DataError` as :func:`load_dataset` does, and for a kind of subject that has no
    prompts in the file.
    """
    subjects = load_dataset(folder)
    file = Path(subjects[0].pictures).parent / "prompts_and_classes.txt"
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


def images_of(
    benchmark: Benchmark, method: str, subject: Subject, protocol: Protocol
) -> list[DrawnImage]:
    """Return every image of one method and subject, prompts in their order, class images last."""
    class_images = product([None], range(CLASS_SEED, CLASS_SEED + protocol.class_images))
    images = product(range(len(benchmark.prompts_for(subject))), range(protocol.pictures))
    return [
        DrawnImage(method, subject.name, prompt, seed) for prompt, seed in (*images, *class_images)
    ]


def draw_all(
    benchmark: Benchmark,
    methods: Mapping[str, Method],
    out: str | Path,
    protocol: Protocol | None = None,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Progress]:
    """Draw the missing images of every method and subject; yield after each batch.

    With several ``processes`` each draws its own (subject, method) pairs. Raises :class:`RunError`
    if ``out`` holds images of another protocol, another base or other settings.
    """
    protocol, out = protocol or Protocol(), Path(out)
    now = asdict(protocol) | {"prompts": benchmark.prompts}
    file = out / "protocol.json"
    if file.exists() and current_fields(read_object(file) or {}) != now:
        raise RunError(f"{out} holds images of another protocol; choose another folder.")
    replace_file(file, json.dumps(now, indent=2).encode())
    units = [
        (methods[name], subject, images_of(benchmark, name, subject, protocol))
        for subject in benchmark.subjects
        for name in methods
    ][rank::processes]
    for unit in units:
        _record_source(out, *unit)
    total, done, drawn = sum(len(images) for *_, images in units), 0, 0
    began = time.monotonic()
    for method, subject, images in units:
        family: Family | None = None
        prompts: dict[int | None, str] = dict(enumerate(benchmark.prompts_for(subject)))
        prompts[None] = subject.class_prompt
        # Draw complete batches only: an image depends a little on the others in its batch.
        for start in range(0, len(images), protocol.batch_size):
            batch = images[start : start + protocol.batch_size]
            done += len(batch)
            if all((out / image.path).is_file() for image in batch):
                continue
            family = family or load_source(method(subject))
            pairs = [(prompts[i.prompt].replace("{}", subject.identifier), i.seed) for i in batch]
            own, scale = family.inference, protocol.guidance_scale
            scale = own.guidance_scale if scale is None else scale
            made = family.generate(
                pairs, protocol.steps or own.fewest_steps, scale, protocol.negative_prompt
            )
            for image, pixels in zip(batch, made, strict=True):
                save_png(pixels, out / image.path)
            drawn += len(batch)
            pace = (time.monotonic() - began) / drawn
            yield Progress(done, total, (total - done) * pace)


def _record_source(out: Path, method: Method, subject: Subject, images: list[DrawnImage]) -> None:
    """Write ``source.json``, or raise :class:`RunError` if another source drew its images."""
    file, problem = out / images[0].path.with_name("source.json"), None
    # Calling a Tuned would train it: its images may exist without its run.
    source = method.config(subject) if isinstance(method, Tuned) else method(subject)
    now = _description(source)
    if file.exists():
        difference = first_difference(current_fields(read_object(file) or {}), now)
        problem = difference and f"whose {difference}"
    elif any((out / image.path).exists() for image in images):
        problem = "without a source.json that says what drew them"
    if problem:
        raise RunError(f"{file.parent} holds images {problem}; choose another folder for these.")
    replace_file(file, json.dumps(now, indent=2).encode())


def _description(source: "TrainConfig | Run | Family | str") -> dict[str, Any]:
    """Describe a source in plain fields; a loaded family by its class's name alone."""
    if isinstance(source, Run):
        source = source.config
    if isinstance(source, TrainConfig):
        return flat_fields(source)
    if isinstance(source, str):
        return {"base": absolute_base(source)}
    return {"family": type(source).__name__}
