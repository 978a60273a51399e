"""Generate the images of the paper's evaluation (arXiv 2208.12242, section 4.1).

The subjects and their prompts are a :class:`Benchmark`. :func:`draw_all` writes

OUT/protocol.json                     what is generated; another protocol is refused
OUT/METHOD/SUBJECT/p07-s2.png         prompt 7, seed 2
OUT/METHOD/SUBJECT/class-s10003.png   the class images that PRES, DIV and class drift need
OUT/METHOD/SUBJECT/drift02-s0.png     drift prompt 2, seed 0
OUT/METHOD/SUBJECT/source.json        their source; another base or other settings are refused

An interrupted evaluation resumes with the first missing batch.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.checked_json import read_object, write_object
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.files import save_png
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation.benchmarks import Benchmark, download, load_benchmark
from dreambooth_lib.evaluation.same_run import check_photos, check_same
from dreambooth_lib.training import memory_level, runs
from dreambooth_lib.training.config_changes import absolute_base, first_difference, flat_fields
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.sampling import check_counts, load_source
from dreambooth_lib.training.validation import CLASS_SEED

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

__all__ = ["Benchmark", "DrawnImage", "Method", "Progress", "Protocol", "Tuned", "download",
           "draw_all", "images_of", "load_benchmark", "start_or_resume"]  # fmt: skip

#: Returns what generates a subject's images: a finished run, a loaded family, or a base's name. It
#: is called before the first image is made or skipped; a method that trains is a :class:`Tuned`.
Method = Callable[[Subject], "Run | Family | str"]


@dataclass(frozen=True)
class Protocol:
    """Define what is generated for each method and subject.

    Evaluations are comparable if their protocols are equal. Raises ``InputError`` for too few
    images to score.
    """

    images_per_prompt: int = 4  #: images of each prompt, seeds 0, 1, ...
    class_images: int = 24  #: images of the class prompt, seeds from CLASS_SEED on
    steps: int | None = None  #: inference steps; None: the fewest that finish the base's images
    guidance_scale: float | None = None  #: None: the base's own
    negative_prompt: str = ""
    batch_size: int = 8
    #: Prompts without the subject, whose images should stay the base's: ``images_per_prompt`` are
    #: generated; {noun} is the class noun.
    drift_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_counts(self, "images_per_prompt", "steps", "batch_size")
        if self.class_images < 2:
            raise InputError(
                f"the protocol's class_images is {self.class_images}; give 2 or more, as scores "
                "need them."
            )

    def drift_prompts_for(self, subject: Subject) -> list[str]:
        return [prompt.replace("{noun}", subject.class_noun) for prompt in self.drift_prompts]


@dataclass(frozen=True)
class DrawnImage:
    """One image of an evaluation; ``prompt`` is None for a class image.

    It is the number of one of the subject's prompts or, for ``drift``, of a drift prompt.
    """

    method: str
    subject: str
    prompt: int | None
    seed: int
    drift: bool = False

    @property
    def path(self) -> Path:
        """Return its path in the evaluation's folder."""
        kind = "drift" if self.drift else "p"
        name = "class" if self.prompt is None else f"{kind}{self.prompt:02d}"
        return Path(self.method, self.subject, f"{name}-s{self.seed}.png")


@dataclass(frozen=True)
class Progress:
    done: int  #: images of this process that are on disk
    total: int
    seconds_left: float  #: at the pace so far, if all others are missing


@dataclass(frozen=True)
class Tuned:
    """A method that trains the run in FOLDER/SUBJECT to its end and samples from it."""

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
    check_same(run, fresh, f"{place} holds a run")
    return run


def images_of(
    benchmark: Benchmark, method: str, subject: Subject, protocol: Protocol
) -> list[DrawnImage]:
    """Return every image of one method and subject: of its prompts, its class, drift prompts."""
    class_images = product([None], range(CLASS_SEED, CLASS_SEED + protocol.class_images))
    images = product(range(len(benchmark.prompts_for(subject))), range(protocol.images_per_prompt))
    drift = product(range(len(protocol.drift_prompts)), range(protocol.images_per_prompt))
    own = [DrawnImage(method, subject.name, number, seed) for number, seed in images]
    own += [DrawnImage(method, subject.name, None, seed) for _, seed in class_images]
    return own + [DrawnImage(method, subject.name, number, seed, True) for number, seed in drift]


def draw_all(
    benchmark: Benchmark,
    methods: Mapping[str, Method],
    out: str | Path,
    protocol: Protocol | None = None,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Progress]:
    """Generate the missing images of every method and subject; yield after each batch.

    With several ``processes`` each does its own (subject, method) pairs. Raises :class:`RunError`
    if ``out`` holds images of another protocol, another base or other settings.
    """
    protocol, out = protocol or Protocol(), Path(out)
    drift_prompts = list(protocol.drift_prompts)  # as JSON gives it back
    now = asdict(protocol) | {"prompts": benchmark.prompts, "drift_prompts": drift_prompts}
    file = out / "protocol.json"
    if file.exists() and read_object(file) != now:
        raise RunError(f"{out} holds images of another protocol; choose another folder.")
    write_object(file, now)
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
        prompts, drift = benchmark.prompts_for(subject), protocol.drift_prompts_for(subject)
        # Draw complete batches only: an image depends a little on the others in its batch.
        for start in range(0, len(images), protocol.batch_size):
            batch = images[start : start + protocol.batch_size]
            done += len(batch)
            if all((out / image.path).is_file() for image in batch):
                continue
            filled = [prompt.replace("{}", subject.identifier) for prompt in prompts]
            every = [*filled, *drift, subject.class_prompt, protocol.negative_prompt]
            family = family or load_source(method(subject), prompts=every)
            texts = [
                subject.class_prompt if image.prompt is None
                else drift[image.prompt] if image.drift
                else filled[image.prompt]
                for image in batch
            ]  # fmt: skip
            pairs = [(text, image.seed) for text, image in zip(texts, batch, strict=True)]
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
    """Write ``source.json``, or raise :class:`RunError` if its images have another source."""
    file, problem = out / images[0].path.with_name("source.json"), None
    # Calling a Tuned would train it: its images may exist without its run.
    source = method.config(subject) if isinstance(method, Tuned) else method(subject)
    now = _description(source)
    if file.exists():
        difference = first_difference(read_object(file) or {}, now)
        problem = difference and str(difference)
    elif any((out / image.path).exists() for image in images):
        problem = "without a source.json that says what generated them"
    if problem:
        raise RunError(f"{file.parent} holds images {problem}; choose another folder for these.")
    if isinstance(method, Tuned):
        check_photos(Path(method.folder) / subject.name, method.config(subject))
    write_object(file, now)


def _description(source: "TrainConfig | Run | Family | str") -> dict[str, Any]:
    """Describe a source in plain fields; a loaded family by its class's name alone."""
    if isinstance(source, Run):
        source = source.config
    if isinstance(source, TrainConfig):
        return flat_fields(source)
    if isinstance(source, str):
        return {"base": absolute_base(source)}
    return {"family": type(source).__name__}
