"""A model watched while it is tuned: the same pictures every few steps, and how they score.

RUN/watch.jsonl              a row a look, step 0 being the frozen base
RUN/watch/000100/...png      its pictures: subject-0.png, class-0.png, unrelated-0.png
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dreambooth_lib import families, metrics
from dreambooth_lib.config import ConfigError, Subject, TrainConfig
from dreambooth_lib.encoders import Encoder
from dreambooth_lib.families.base import Family
from dreambooth_lib.heldout import HeldOut
from dreambooth_lib.runs import Run, RunError
from dreambooth_lib.sampling import inference_of
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
    #: of a run with several subjects, by identifier and class noun, where the above are means
    fidelity: dict[str, float] = field(default_factory=dict)
    bleeding: dict[str, float] = field(default_factory=dict)  #: from the other subjects into it


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
        images += family.generate(part, steps, scale)
    ends = (count * view.seeds, count * view.seeds + view.class_pictures)
    asked = [prompt for prompt, _ in wanted[: ends[0]]]
    return Look(images[: ends[0]], images[ends[0] : ends[1]], images[ends[1] :], asked)


def look_at_all(family: Family, subjects: Sequence[Subject], view: View) -> Look:
    """The pictures of several subjects as one look, subject by subject; unrelated ones once."""
    first, *others = subjects
    looks = [look(family, first, view)]
    looks += [look(family, other, replace(view, unrelated=0)) for other in others]
    return Look(
        [image for seen in looks for image in seen.subject],
        [image for seen in looks for image in seen.of_class],
        looks[0].unrelated,
        [prompt for seen in looks for prompt in seen.prompts],
    )


def apart(seen: Look, count: int) -> list[Look]:
    """The reverse of :func:`look_at_all`: a look at each of ``count`` subjects."""
    size, classes = len(seen.subject) // count, len(seen.of_class) // count
    return [
        Look(
            seen.subject[i * size : (i + 1) * size],
            seen.of_class[i * classes : (i + 1) * classes],
            seen.unrelated,
            seen.prompts[i * size : (i + 1) * size],
        )
        for i in range(count)
    ]


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


def score_all(
    encoder: Encoder,
    photos: "Sequence[list[Image.Image]]",
    subjects: Sequence[Subject],
    seen: Look,
    before: Look,
) -> dict[str, Any]:
    """The means of :func:`score` over the subjects, and of several each one's own fidelity.

    With how much of the others bled into it, the mean of :func:`metrics.bleeding`.
    """
    looks, befores = apart(seen, len(subjects)), apart(before, len(subjects))
    each = [score(encoder, *of) for of in zip(photos, subjects, looks, befores, strict=True)]
    means: dict[str, Any] = {name: fmean(found[name] for found in each) for name in each[0]}
    if len(subjects) == 1:
        return means
    own = [encoder.images(group) for group in photos]
    drawn_ = [encoder.images(one.subject) for one in looks]
    tokens = [subject.token for subject in subjects]
    bled = [
        fmean(metrics.bleeding(drawn_[i], own[i], own[j]) for j in range(len(own)) if j != i)
        for i in range(len(own))
    ]
    fidelity = [found["subject_fidelity"] for found in each]
    return means | {
        "fidelity": dict(zip(tokens, fidelity, strict=True)),
        "bleeding": dict(zip(tokens, bled, strict=True)),
    }


class Watch:
    """Looks at a run in training, on disk as said above. A run keeps the view that it began with.

    ``photos`` are all of each subject's, those held out of training too.
    """

    def __init__(
        self,
        run: Run,
        photos: "Sequence[list[Image.Image]]",
        held_out: HeldOut,
        encoder: Encoder,
    ):
        self.run, self.photos, self.held_out, self.encoder = run, photos, held_out, encoder
        self.view = view_of(run)
        self.reference = fmean(
            metrics.reference_fidelity(encoder.images(group)) if len(group) > 1 else 1.0
            for group in photos
        )

    def look(self, step: int, model: Trainable, family: Family) -> Watched:
        """Draw and score the model as it is now, and write both down."""
        began = time.perf_counter()
        subjects = self.run.config.subjects
        training = model.training
        model.eval()
        seen = look_at_all(family, subjects, self.view)
        losses = self.held_out.losses(model)
        model.train(training)
        before = drawn(self.run, 0) if step else seen
        scores = score_all(self.encoder, self.photos, subjects, seen, before)
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

    subjects, pictures = run.config.subjects, images("subject")
    each = len(pictures) // len(PROMPTS) // len(subjects)
    prompts = [fill_prompt(p, s) for s in subjects for p in PROMPTS for _ in range(each)]
    return Look(pictures, images("class"), images("unrelated"), prompts)


def history(run: Run) -> list[Watched]:
    """Every look so far, the frozen base's first."""
    return [Watched(**row) for row in run.rows("watch")]


def share(run: Run) -> float:
    """Seconds spent on looks, as a share of those spent on updates."""
    return sum(row.seconds for row in history(run)) / sum(row["seconds"] for row in run.log())
