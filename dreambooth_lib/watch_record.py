"""What a run keeps of its looks: the images of each and what was measured of them.

RUN/watch.jsonl              a row a look, step 0 being the frozen base
RUN/watch/000100/...png      its pictures: subject-0.png, class-0.png, unrelated-0.png
RUN/watch/view.json          what is drawn at each
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from dreambooth_lib import metrics
from dreambooth_lib.encoders import Encoder
from dreambooth_lib.families.base import Family
from dreambooth_lib.heldout import HeldOut
from dreambooth_lib.runs import Run, RunError
from dreambooth_lib.state import replace_file, save_png
from dreambooth_lib.watch import PROMPTS, Look, View, fill_prompt, look, score, view_for
from dreambooth_lib.weights import Trainable


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


class Watch:
    """Looks at a run in training, on disk as said above. A run keeps the view that it began with.

    ``photos`` are all of the subject's, those held out of training too.
    """

    def __init__(self, run: Run, photos: list[Image.Image], held_out: HeldOut, encoder: Encoder):
        self.run, self.photos, self.held_out, self.encoder = run, photos, held_out, encoder
        self.view = view_of(run)
        self.reference = 1.0
        if len(photos) > 1:
            self.reference = metrics.reference_fidelity(encoder.images(photos))

    def look(self, step: int, model: Trainable, family: Family) -> Watched:
        """Draw and score the model as it is now, and write both down."""
        began, subject, training = time.perf_counter(), self.run.config.subject, model.training
        model.eval()
        seen = look(family, subject, self.view)
        losses = self.held_out.losses(model)
        model.train(training)
        before = drawn(self.run, 0) if step else seen
        scores = score(self.encoder, self.photos, subject, seen, before)
        kinds = {"subject": seen.subject, "class": seen.of_class, "unrelated": seen.unrelated}
        for kind, images in kinds.items():
            for number, image in enumerate(images):
                save_png(image, folder(self.run, step) / f"{kind}-{number}.png")
        found = Watched(
            step=step,
            reference_fidelity=self.reference,
            held_out=losses,
            seconds=time.perf_counter() - began,
            **scores,
        )
        self.run.append("watch", asdict(found))
        return found


def view_of(run: Run) -> View:
    """Return the view that a run's looks have, written down when it is first asked for."""
    file = run.folder / "watch" / "view.json"
    if not file.exists():
        replace_file(file, json.dumps(asdict(view_for(run.config))).encode())
    return View(**json.loads(file.read_text()))


def folder(run: Run, step: int) -> Path:
    """Return where the pictures of one look lie."""
    return run.folder / "watch" / f"{step:06d}"


def drawn(run: Run, step: int) -> Look:
    """Read the pictures of one look. Raises ``RunError`` where there was none."""
    place = folder(run, step)
    if not place.exists():
        raise RunError(f"{run.folder} was not looked at in step {step}; see db.history(run).")

    def images(kind: str) -> list[Image.Image]:
        files = [place / f"{kind}-{n}.png" for n in range(len(list(place.glob(f"{kind}-*.png"))))]
        return [Image.open(file).convert("RGB") for file in files]

    pictures = images("subject")
    each = len(pictures) // len(PROMPTS)
    prompts = [fill_prompt(p, run.config.subject) for p in PROMPTS for _ in range(each)]
    return Look(pictures, images("class"), images("unrelated"), prompts)


def history(run: Run) -> list[Watched]:
    """Return every look so far, the frozen base's first."""
    known = Watched.__dataclass_fields__  # rows of earlier versions have more
    return [Watched(**{k: row[k] for k in row if k in known}) for row in run.rows("watch")]


def share(run: Run) -> float:
    """Return the seconds spent on looks, as a share of those spent on updates."""
    return sum(row.seconds for row in history(run)) / sum(row["seconds"] for row in run.log())
