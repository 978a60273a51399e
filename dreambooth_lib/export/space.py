"""Write a study as the folder of a Space on the Hugging Face Hub, which shows it and generates.

It generates on a CPU with a run's full model, by Python's own HTTP server (:mod:`.space_app`).
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
from dreambooth_lib.training.image_sizes import size_of_images
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import inference_settings

_OWN = ("settings.json", "app.py", "Dockerfile", "index.html")  #: by which an earlier one is known
_DOCKERFILE = """\
FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user
WORKDIR /home/user/app
COPY requirements.txt .
RUN pip install --no-cache-dir $(grep ^torch== requirements.txt) \
--index-url https://download.pytorch.org/whl/cpu
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

This page shows what a text-to-image model has learnt of one subject, by the weight of prior
preservation and by training step. A prompt field generates with the trained model. `python app.py`
shows the same page on your machine.

The licence and terms of the base model apply here too.
"""


def write_space(study: Sequence[Run], folder: str | Path, photos: bool = False) -> Path:
    """Write the Space of some runs, which generates with the highest-scoring one; return its path.

    The folder appears only when it is complete. Raises ``InputError`` if that run is a LoRA, and
    ``ExportError`` for a folder of other files.
    """
    folder = Path(folder).resolve()
    pipeline_folder.check_replaceable(folder, _OWN)
    run = gallery.best_run(study)
    if run.config.method == "lora":
        raise InputError(
            f"{run.folder} is a LoRA, and a Space generates with a full model; train it "
            "with method 'full', or write the gallery alone."
        )
    chosen, kept = best_checkpoint(run).step, run.checkpoints()
    own = inference_settings(run.config)
    settings = {"num_inference_steps": own.steps, "guidance_scale": own.guidance_scale}
    if size := size_of_images(run):
        settings["width"], settings["height"] = size
    with replacing_folder(folder) as partial:
        first_prompt = f"a {run.config.subject.token} on the beach"
        gallery.write_gallery(study, partial / "index.html", photos, first_prompt)
        step = chosen if chosen in kept else max(kept, default=chosen)
        pipeline_folder.write_pipeline(run, step, partial / "model")
        (partial / "settings.json").write_text(json.dumps(settings))
        (partial / "README.md").write_text(_CARD)
        (partial / "Dockerfile").write_text(_DOCKERFILE)
        needed = ("torch", "diffusers", "transformers", "accelerate")
        pins = "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in needed)
        (partial / "requirements.txt").write_text(pins)
        shutil.copy(space_app.__file__, partial / "app.py")
    return folder
