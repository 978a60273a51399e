"""A model watched while it is tuned: the same pictures every few steps, and how they score.

RUN/watch.jsonl              a row a look, step 0 being the frozen base
RUN/watch/000100/...png      its pictures: subject-0.png, class-0.png, unrelated-0.png
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib import families, metrics
from dreambooth_lib.config import ConfigError, Subject, TrainConfig
from dreambooth_lib.encoders import Encoder
from dreambooth_lib.families.base import Family
from dreambooth_lib.heldout import HeldOut
from dreambooth_lib.runs import Run, RunError
from dreambooth_lib.sampling import draw, inference_of
from dreambooth_lib.weights import Trainable

if TYPE_CHECKING:
    import torch
    from PIL import Image

#: Prompts of the pictures that are scored; {} is the identifier, {noun} the class noun.
PROMPTS = ("a {} {noun} on the beach", "a {} {noun} in the snow", "a {} {noun} in the forest",
           "a {} {noun} in space")  # fmt: skip
UNRELATED = ("a car in the city", "a clock on a wooden table")  # the second for cars
CLASS_SEED = 10_000  #: of the first class picture: no training draws its own from there
JUDGE = families.BUNDLED / "toybox" / "judge"


@dataclass(frozen=True)
class View:
    """What is drawn at each look; looks compare if their views are equal.

    The eight pictures of the default are one batch.
    """

    seeds: int = 1  #: pictures of each of :data:`PROMPTS`
    class_pictures: int = 3  #: of the class prompt
    unrelated: int = 1
    inference_steps: int | None = None  #: None: as many as finish the base's pictures
    guidance_scale: float | None = None  #: None: the base's own
    first_seed: int = 0  #: of the prompts' pictures; class pictures begin CLASS_SEED after it

    def prompts(self, subject: Subject) -> list[str]:
        """What its pictures are of: one prompt a picture, the subject's first."""
        unrelated = UNRELATED[subject.class_noun == "car"]
        return [
            *(fill_prompt(p, subject) for p in PROMPTS for _ in range(self.seeds)),
            *[subject.class_prompt] * self.class_pictures,
            *[unrelated] * self.unrelated,
        ]


@dataclass(frozen=True)
class Look:
    """One model's pictures; those in the same place of two looks have the same seed."""

    subject: "list[Image.Image]"
    of_class: "list[Image.Image]"
    unrelated: "list[Image.Image]"
    prompts: list[str]  #: of the subject's pictures, one each


@dataclass(frozen=True)
class Watched:
    """What one look found; measures as in :mod:`dreambooth_lib.metrics`."""

    step: int
    subject_fidelity: float
    reference_fidelity: float  #: of the photos among themselves: the ceiling; 1 for one photo
    prompt_adherence: float
    class_diversity: float
    prior_drift: float
    pres: float  #: of class pictures with the photos: how much of the subject leaked (PRES)
    unrelated_drift: float  #: of pictures that have nothing to do with the subject
    held_out: dict[str, list[float]]  #: loss by timestep bin, see :mod:`dreambooth_lib.heldout`
    seconds: float  #: what the look cost


def judge(config: TrainConfig, device: "str | torch.device" = "cpu") -> Encoder:
    """The encoder that scores a run's pictures.

    Raises ``ConfigError`` for one that cannot be read or does not read prompts.
    """
    try:
        encoder = Encoder(JUDGE if config.judge == "toybox" else config.judge, device)
    except OSError as error:
        raise ConfigError(
            f"the judge '{config.judge}' cannot be read; give a CLIP by hub id or folder, or set "
            "watch_every to 0 to train without looks."
        ) from error
    if not encoder.reads_texts:
        raise ConfigError(
            f"judge '{config.judge}' does not read prompts; give a CLIP such as "
            "openai/clip-vit-base-patch32."
        )
    return encoder


def fill_prompt(prompt: str, subject: Subject) -> str:
    return prompt.replace("{noun}", subject.class_noun).replace("{}", subject.identifier)


def look(family: Family, subject: Subject, view: View) -> Look:
    """Draw a view's pictures."""
    count, first, of_class = len(PROMPTS), view.first_seed, view.first_seed + CLASS_SEED
    seeds = [first + i for _ in range(count) for i in range(view.seeds)]
    seeds += [of_class + i for i in range(view.class_pictures)]
    seeds += [of_class + i for i in range(view.unrelated)]
    wanted = list(zip(view.prompts(subject), seeds, strict=True))
    steps, scale = view.inference_steps or family.inference.enough, view.guidance_scale
    scale = family.inference.guidance_scale if scale is None else scale
    images, batch = [], family.at_a_time
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        images += draw(family, part, steps, scale)
    ends = (count * view.seeds, count * view.seeds + view.class_pictures)
    asked = [prompt for prompt, _ in wanted[: ends[0]]]
    return Look(images[: ends[0]], images[ends[0] : ends[1]], images[ends[1] :], asked)


def score(
    encoder: Encoder,
    photos: "list[Image.Image]",
    subject: Subject,
    seen: Look,
    before: Look,
) -> dict[str, float]:
    """The measures of :func:`metrics.evaluate`, PRES and what an unrelated prompt lost.

    ``before`` is the frozen base's look.
    """
    scores = metrics.evaluate(
        encoder, photos, seen.subject, seen.prompts, seen.of_class, subject.identifier,
        before.of_class,
    )  # fmt: skip
    of_class = encoder.images(seen.of_class)
    scores["pres"] = metrics.subject_fidelity(of_class, encoder.images(photos))
    if seen.unrelated:
        one, other = encoder.images(before.unrelated), encoder.images(seen.unrelated)
        scores["unrelated_drift"] = metrics.prior_drift(one, other)
    return scores


class Watch:
    """Looks at a run in training, on disk as said above. A run keeps the view that it began with.

    ``photos`` are all of the subject's, those held out of training too.
    """

    def __init__(
        self,
        run: Run,
        photos: "list[Image.Image]",
        held_out: HeldOut,
        encoder: Encoder,
    ):
        self.run, self.photos, self.held_out, self.encoder = run, photos, held_out, encoder
        self.view = view_of(run)
        self.reference = 1.0
        if len(photos) > 1:
            self.reference = metrics.reference_fidelity(encoder.images(photos))

    def look(self, step: int, model: Trainable, family: Family) -> Watched:
        """Draw and score the model as it is now, and write both down."""
        began = time.perf_counter()
        subject = self.run.config.subject
        training = model.training
        model.eval()
        seen = look(family, subject, self.view)
        losses = self.held_out.losses(model)
        model.train(training)
        before = drawn(self.run, 0) if step else seen
        scores = score(self.encoder, self.photos, subject, seen, before)
        self._save(step, seen)
        found = Watched(
            step=step,
            reference_fidelity=self.reference,
            held_out=losses,
            seconds=time.perf_counter() - began,
            **scores,
        )
        self.run.append("watch", asdict(found))
        return found

    def _save(self, step: int, seen: Look) -> None:
        from dreambooth_lib.state import save_png

        kinds = {"subject": seen.subject, "class": seen.of_class, "unrelated": seen.unrelated}
        for kind, images in kinds.items():
            for number, image in enumerate(images):
                save_png(image, folder(self.run, step) / f"{kind}-{number}.png")


def view_for(config: TrainConfig, **changes: Any) -> View:
    """Make the view of a config's looks, drawn in the steps and with the guidance of its base."""
    own = inference_of(config)
    given = {"inference_steps": own.validation, "guidance_scale": own.guidance_scale}
    return View(**(given | changes))


def view_of(run: Run) -> View:
    """The view that a run's looks have, written down when it is first asked for."""
    from dreambooth_lib.state import replace_file

    file = run.folder / "watch" / "view.json"
    if not file.exists():
        replace_file(file, json.dumps(asdict(view_for(run.config))).encode())
    return View(**json.loads(file.read_text()))


def folder(run: Run, step: int) -> Path:
    """Where the pictures of one look lie."""
    return run.folder / "watch" / f"{step:06d}"


def drawn(run: Run, step: int) -> Look:
    """The pictures of one look, from disk. Raises ``RunError`` where there was none."""
    from PIL import Image

    place = folder(run, step)
    if not place.exists():
        raise RunError(f"{run.folder} was not looked at in step {step}; see watch.history(run).")

    def images(kind: str) -> "list[Image.Image]":
        count = len(list(place.glob(f"{kind}-*.png")))
        found = []
        for number in range(count):
            with Image.open(place / f"{kind}-{number}.png") as image:
                found.append(image.convert("RGB"))
        return found

    pictures = images("subject")
    each = len(pictures) // len(PROMPTS)
    prompts = [fill_prompt(p, run.config.subject) for p in PROMPTS for _ in range(each)]
    return Look(pictures, images("class"), images("unrelated"), prompts)


def history(run: Run) -> list[Watched]:
    """Every look so far, the frozen base's first."""
    known = Watched.__dataclass_fields__  # rows of earlier versions have more
    return [Watched(**{k: row[k] for k in row if k in known}) for row in run.rows("watch")]


def share(run: Run) -> float:
    """Seconds spent on looks, as a share of those spent on updates."""
    return sum(row.seconds for row in history(run)) / sum(row["seconds"] for row in run.log())
