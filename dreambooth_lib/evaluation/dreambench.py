"""The paper's evaluation (arXiv 2208.12242, section 4.1): subjects x prompts x pictures x methods.

A data set's folder holds ``prompts_and_classes.txt``: its classes, and the prompts for objects and
for live subjects. ``draw_all`` makes OUT/protocol.json and OUT/METHOD/SUBJECT/p07-s2.png, picture
by picture, so that a stopped evaluation goes on where it was; ``OUT/METHOD/SUBJECT/class-s3.png``
are the class images that PRES, DIV and prior drift need, and ``source.json`` beside them says
what drew them, so that those of another base or other settings are not taken for this one's.
"""

import json
import re
import time
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.old_names import current_fields
from dreambooth_lib.data.images import DataError
from dreambooth_lib.data.subjects import load_dataset
from dreambooth_lib.training import memory_level, runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError, describe, first_difference, flat_fields
from dreambooth_lib.training.sampling import load_source
from dreambooth_lib.training.validation import CLASS_SEED

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

#: The DreamBooth data set's public repository.
DATASET = "https://github.com/google/dreambooth/archive/refs/heads/main.zip"

#: What draws a subject's pictures: a finished run, a loaded family, or a base's name. It is asked
#: for before any picture is drawn or passed over; one that trains is :class:`Tuned`.
Method = Callable[[Subject], "Run | Family | str"]


@dataclass(frozen=True)
class Protocol:
    """What is drawn, for each method and subject; two evaluations compare if these are equal."""

    pictures: int = 4  #: of each prompt, seeds 0, 1, ...
    class_images: int = 24  #: of the class prompt, seeds from CLASS_SEED on
    steps: int | None = None  #: None: as many as finish the base's pictures
    guidance_scale: float | None = None  #: None: the base's own
    negative_prompt: str = ""
    batch_size: int = 8


@dataclass(frozen=True)
class Benchmark:
    """A data set's subjects, and the prompts of each kind: ``a {} {noun} in the jungle``."""

    subjects: list[Subject]
    prompts: dict[str, list[str]]  #: by ``Subject.kind``: "object", "live"

    def of(self, subject: Subject) -> list[str]:
        """The prompts of one subject, ``{}`` still score for the identifier."""
        return [p.replace("{noun}", subject.class_noun) for p in self.prompts[subject.kind]]

    def only(self, names: Collection[str]) -> "Benchmark":
        """The subjects of these names alone. Raises :class:`DataError` for a name without one."""
        have = [subject.name for subject in self.subjects]
        for name in names:
            if name not in have:
                raise DataError(f"there is no subject '{name}'; there are {', '.join(have)}.")
        return Benchmark([s for s in self.subjects if s.name in names], self.prompts)


@dataclass(frozen=True)
class Picture:
    """One picture of an evaluation; ``prompt`` is None for a class image."""

    method: str
    subject: str
    prompt: int | None
    seed: int

    @property
    def path(self) -> Path:
        """Where it lies in the evaluation's folder."""
        name = "class" if self.prompt is None else f"p{self.prompt:02d}"
        return Path(self.method, self.subject, f"{name}-s{self.seed}.png")


@dataclass(frozen=True)
class Progress:
    done: int  #: pictures of this process's share that lie there
    total: int
    seconds_left: float  #: at the pace so far, if nothing more lies there


@dataclass(frozen=True)
class Tuned:
    """A method that draws from the run in FOLDER/SUBJECT, first trained to its end."""

    folder: Path
    config: Callable[[Subject], TrainConfig]

    def __call__(self, subject: Subject) -> Run:
        run = started(self.folder, self.config, subject)
        if not run.finished:
            memory_level.share_level(self.folder, [run.config])  # with the first subject, for all
            for _ in train(run):
                pass
        return run


def tuned(folder: str | Path, config: Callable[[Subject], TrainConfig]) -> Tuned:
    """A :class:`Tuned` of a subject's config."""
    return Tuned(Path(folder), config)


def started(folder: str | Path, config: Callable[[Subject], TrainConfig], subject: Subject) -> Run:
    """The run in FOLDER/SUBJECT, made if it is not there yet.

    Raises :class:`RunError` where it is of another config.
    """
    place, wanted = Path(folder) / subject.name, config(subject)
    if not (place / "config.toml").exists():
        return runs.start(wanted, place)
    run = runs.resume(place)
    if other := first_difference(flat_fields(run.config), flat_fields(wanted)):
        raise RunError(
            f"{place} holds a run of {describe(run.config)} whose {other}; choose another folder "
            "for this one."
        )
    return run


def download(folder: str | Path, url: str = DATASET) -> Path:
    """Fetch the DreamBooth data set into ``folder``, once and whole; return that folder.

    About 130 MB, CC BY 4.0 with some photos under the Unsplash License. Raises :class:`DataError`
    where it cannot be had.
    """
    from dreambooth_lib.core.files import replacing_folder

    folder = Path(folder)
    if not (folder / "prompts_and_classes.txt").exists():
        try:
            with TemporaryDirectory() as place, replacing_folder(folder) as partial:
                file, _ = urllib.request.urlretrieve(url, Path(place) / "main.zip")
                with zipfile.ZipFile(file) as archive:
                    _unpack_subjects(archive, partial)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(
                f"the data set cannot be had from {url} ({error}); check the network, or fetch "
                f"github.com/google/dreambooth yourself and give its folder."
            ) from error
    return folder


def _unpack_subjects(archive: zipfile.ZipFile, folder: Path) -> None:
    """Unpack what lies under ``*/dataset/``, without the repository's own folder names."""
    for entry in archive.infolist():
        root, _, name = entry.filename.partition("/dataset/")
        if name and "/" not in root and not entry.is_dir():
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise zipfile.BadZipFile(f"'{entry.filename}' would lie outside the folder")
            entry.filename = name
            archive.extract(entry, folder)


def load_benchmark(folder: str | Path) -> Benchmark:
    """Read a folder in the DreamBooth data set's layout, prompts included.

    Raises :class:`DataError` as :func:`load_dataset` does, and where a kind of subject that the
    folder has finds no prompts in the file.
    """
    subjects = load_dataset(folder)
    file = Path(subjects[0].pictures).parent / "prompts_and_classes.txt"
    prompts: dict[str, list[str]] = {}
    kind = ""
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        if heading := re.fullmatch(r"(Object|Live Subject) Prompts", line.strip()):
            kind = heading[1].split()[0].lower()
        elif found := re.fullmatch(r"""(['"])(.*\{0\} \{1\}.*)\1\.format\(.*\),?""", line.strip()):
            prompts.setdefault(kind, []).append(found[2].replace("{0} {1}", "{} {noun}"))
    for subject in subjects:
        if subject.kind not in prompts:
            raise DataError(
                f"{file} has no prompts for the {subject.kind} subject '{subject.name}'; add them "
                "under 'Object Prompts' or 'Live Subject Prompts'."
            )
    return Benchmark(subjects, prompts)


def pictures(
    benchmark: Benchmark, method: str, subject: Subject, wanted: Protocol
) -> list[Picture]:
    """Every picture of one method and subject, prompts in their order, class images last."""
    class_images = product([None], range(CLASS_SEED, CLASS_SEED + wanted.class_images))
    of_prompts = product(range(len(benchmark.of(subject))), range(wanted.pictures))
    return [Picture(method, subject.name, *each) for each in (*of_prompts, *class_images)]


def draw_all(
    benchmark: Benchmark,
    methods: Mapping[str, Method],
    out: str | Path,
    protocol: Protocol | None = None,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Progress]:
    """Draw what is missing of every method and subject; yields after each batch.

    Of several processes each takes its own subjects. Raises ``ValueError`` where ``out`` holds
    pictures of another protocol, which would not compare, or of another base or other settings.
    """
    from dreambooth_lib.core.files import replace_file, save_png

    wanted, out = protocol or Protocol(), Path(out)
    now = asdict(wanted) | {"prompts": benchmark.prompts}
    file = out / "protocol.json"
    if file.exists() and current_fields(json.loads(file.read_text())) != now:
        raise ValueError(f"{out} holds pictures of another protocol; choose another folder.")
    replace_file(file, json.dumps(now, indent=2).encode())
    shares = [
        (methods[name], subject, pictures(benchmark, name, subject, wanted))
        for subject in benchmark.subjects
        for name in methods
    ][rank::processes]
    for unit in shares:
        _keep_source(out, *unit)
    total, done, drawn = sum(len(share) for *_, share in shares), 0, 0
    began = time.monotonic()
    for method, subject, share in shares:
        family: Family | None = None
        prompts: dict[int | None, str] = dict(enumerate(benchmark.of(subject)))
        prompts[None] = subject.class_prompt
        # A batch is drawn whole or not at all: pictures depend a little on what is drawn with them.
        for start in range(0, len(share), wanted.batch_size):
            part = share[start : start + wanted.batch_size]
            done += len(part)
            if all((out / picture.path).exists() for picture in part):
                continue
            family = family or load_source(method(subject))
            asked = [(prompts[p.prompt].replace("{}", subject.identifier), p.seed) for p in part]
            own, scale = family.inference, wanted.guidance_scale
            scale = own.guidance_scale if scale is None else scale
            images = family.generate(
                asked, wanted.steps or own.fewest_steps, scale, wanted.negative_prompt
            )
            for picture, image in zip(part, images, strict=True):
                save_png(image, out / picture.path)
            drawn += len(part)
            pace = (time.monotonic() - began) / drawn
            yield Progress(done, total, (total - done) * pace)


def _keep_source(out: Path, method: Method, subject: Subject, share: list[Picture]) -> None:
    """Write down what draws a share, or raise where its pictures were drawn by something else."""
    from dreambooth_lib.core.files import replace_file

    file, problem = out / share[0].path.with_name("source.json"), None
    # A Tuned is not called, which would train: its pictures may be there without its run.
    source = method.config(subject) if isinstance(method, Tuned) else method(subject)
    now = _description(source)
    if file.exists():
        difference = first_difference(current_fields(json.loads(file.read_text())), now)
        problem = difference and f"whose {difference}"
    elif any((out / picture.path).exists() for picture in share):
        problem = "of which no source.json says what drew them"
    if problem:
        raise ValueError(
            f"{file.parent} holds pictures {problem}; choose another folder for these."
        )
    replace_file(file, json.dumps(now, indent=2).encode())


def _description(source: "TrainConfig | Run | Family | str") -> dict[str, Any]:
    """What draws, in plain fields; a family that is given as it is, is told by its class alone."""
    if isinstance(source, Run):
        source = source.config
    if isinstance(source, TrainConfig):
        return flat_fields(source)
    if isinstance(source, str):
        return {"base": runs.absolute_base(source)}
    return {"family": type(source).__name__}
