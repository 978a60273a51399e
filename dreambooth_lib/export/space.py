"""Write a study as the folder of a Space on the Hugging Face Hub, which shows it and draws.

It draws on a CPU with the whole model of one run, by a server of Python's own (:mod:`.space_app`).
"""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.files import replacing_folder
from dreambooth_lib.export import gallery, pipeline_folder, space_app
from dreambooth_lib.training.best_checkpoint import best_checkpoint
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import inference_settings

_DOCKERFILE = """\
FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user
WORKDIR /home/user/app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY --chown=user . .
USER user
CMD ["python", "app.py", "--host", "0.0.0.0"]
"""
_CARD = """\
---
title: DreamBooth gallery
sdk: docker
app_port: 7860
---

What a text-to-image model learnt of one subject, by the weight of prior preservation and by
training step, and a field that draws with the trained model. `python app.py` shows the same on your
machine.

The licence and terms of the base model apply here too.
"""


def write_space(study: Sequence[Run], folder: str | Path, photos: bool = False) -> Path:
    """Write the Space of some runs, of which the one with the highest score draws; return its path.

    The folder appears when it is complete. Raises ``InputError`` if that run is a LoRA.
    """
    run = gallery.best_run(study)
    if run.config.method == "lora":
        raise InputError(
            f"{run.folder} is a LoRA, and a Space draws with a whole model; train it with "
            "method 'full', or write the gallery alone."
        )
    chosen, kept = best_checkpoint(run).step, run.checkpoints()
    own = inference_settings(run.config)
    settings = {"num_inference_steps": own.steps, "guidance_scale": own.guidance_scale}
    with replacing_folder(folder) as partial:
        gallery.write_gallery(study, partial / "index.html", photos, _first_prompt(run))
        step = chosen if chosen in kept else max(kept, default=chosen)
        pipeline_folder.write_pipeline(run, step, partial / "model")
        (partial / "settings.json").write_text(json.dumps(settings))
        (partial / "README.md").write_text(_CARD)
        (partial / "Dockerfile").write_text(_DOCKERFILE)
        needed = ("torch", "diffusers", "transformers", "accelerate")
        pins = "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in needed)
        (partial / "requirements.txt").write_text(pins)
        shutil.copy(space_app.__file__, partial / "app.py")
    return Path(folder)


def _first_prompt(run: Run) -> str:
    return f"a {run.config.subject.token} on the beach"
