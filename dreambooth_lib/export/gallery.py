"""Write a study as one HTML page: a slider over its runs, one over their steps, and the images.

The page needs no server and no other file. You can open it from disk, or embed it with an iframe.
"""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.figures.labels import RATIOS
from dreambooth_lib.training import best_checkpoint, runs, validation_record
from dreambooth_lib.training.config_changes import first_difference, flat_fields
from dreambooth_lib.training.runs import Run

_TEMPLATE = Path(__file__).with_name("gallery.html")
_LONGEST = 256  # pixels of an image's longer side; a study of large images stays a few megabytes


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Return the validated runs of some folders; each folder is a run or holds several.

    Raises ``InputError`` for a folder without a validated run.
    """
    found = []
    for folder in map(Path, folders):
        places = [folder, *sorted(folder.glob("*/"))]
        here = [runs.resume(place) for place in places if (place / "config.toml").exists()]
        validated = [run for run in here if len(validation_record.history(run)) > 1]
        if not validated:
            raise InputError(
                f"{folder} holds no run that was validated; give the folder of a run or a study."
            )
        found += validated
    return found


def write_gallery(
    study: Sequence[Run], file: str | Path, photos: bool = False, draw: str = ""
) -> Path:
    """Write the page of some runs and return its path.

    ``photos`` also shows the subjects' photos. ``draw`` is the first prompt of a field that asks
    the page's server for images (:mod:`.space`). Raises a ``KitError`` if an image is damaged.
    """
    by_name: dict[str, list[Run]] = {}
    for run in study:
        by_name.setdefault(run.config.subject.name, []).append(run)
    subjects = [_subject(name, of_one, photos) for name, of_one in by_name.items()]
    data = json.dumps({"subjects": subjects, "draw": draw}, ensure_ascii=False)
    page = _TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data.replace("<", "\\u003c"))
    replace_file(file, page.encode())
    return Path(file)


def best_run(study: Sequence[Run]) -> Run:
    """Return the run whose chosen checkpoint has the highest score."""
    return max(study, key=lambda run: best_checkpoint.best_checkpoint(run).score)


def _subject(name: str, study: Sequence[Run], photos: bool) -> dict[str, Any]:
    ordered = sorted(study, key=lambda run: (run.config.prior_weight, run.folder.name))
    shown = read_photos(ordered[0].config.subject) if photos else []
    return {
        "name": name,
        "photos": [("", _address(photo.image)) for photo in shown],
        "best": ordered.index(best_run(ordered)),
        "runs": [
            {"label": label, "steps": _steps(run)}
            for label, run in zip(_labels(ordered), ordered, strict=True)
        ],
    }


def _labels(study: Sequence[Run]) -> list[str]:
    """Name runs by λ if they differ in nothing else, or by their folders."""
    weights = [run.config.prior_weight for run in study]
    fields = [flat_fields(run.config) for run in study]
    others = [first_difference(fields[0], own, ("prior_weight", "prior")) for own in fields]
    if len({*weights}) == len(weights) and not any(others):
        return [f"λ {weight:g}" for weight in weights]
    return [run.folder.name for run in study]


def _steps(run: Run) -> list[dict[str, Any]]:
    results, plan = validation_record.history(run), validation_record.plan_of(run)
    prompts = [
        [prompt for prompt, _ in kind] for kind in plan.prompts_and_seeds(run.config.subject)
    ]
    steps = []
    for result in results:
        images = validation_record.load_images(run, result.step)
        kinds = (images.subject, images.class_images, images.unrelated)
        shown = [
            [(prompt, _address(image)) for prompt, image in zip(texts, kind, strict=False)]
            for texts, kind in zip(prompts, kinds, strict=True)
        ]
        ratios = astuple(best_checkpoint.ratios_of(result, results[0]))
        scores = list(zip(RATIOS.values(), ratios, strict=True))
        named = dict(zip(("subject", "class", "others"), shown, strict=True))
        steps.append({"step": result.step, "scores": scores, "images": named})
    return steps


def _address(image: Image.Image) -> str:
    """Return an image as a data URL."""
    shown, buffer = image.convert("RGB"), io.BytesIO()
    shown.thumbnail((_LONGEST, _LONGEST))
    shown.save(buffer, "webp", quality=85, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
