"""The whole way of a LoRA run, by whichever Python runs this: ``python lora_way.py FOLDER JSON``.

It trains the bundled base for a few steps with what JSON says besides, is cut off and goes on, and
its model is sampled, kept and exported. Prints what was so, and leaves ``unet.safetensors``: the
denoiser with the LoRA worked in.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
from PIL import ImageChops
from safetensors.torch import load_file, save_file

import dreambooth_lib as db
from dreambooth_lib.evaluation.demo import bundled_subjects
from dreambooth_lib.export import comfyui_lora, model_card, pipeline_folder
from dreambooth_lib.families import loading
from dreambooth_lib.training import loop, trainable


def way(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    subject = replace(bundled_subjects()[0], identifier="<rex>")
    config = db.TrainConfig(
        subject, method="lora", lora_rank=2, steps=3, validate_every=3, class_images=2,
        prior_inference_steps=2, validation_inference_steps=1, **changes,
    )  # fmt: skip
    run = db.start(config, folder / "runs" / "dog")
    for step in loop.train(run):
        if step.step == 2:
            break
    run = db.resume(run.folder)
    seen = [step.step for step in loop.train(run)]
    finished, third = (
        db.sample(run, ["a {} dog"], [0], steps=2, at=at)[0].image for at in (None, 3)
    )
    model = folder / "models" / "dog"
    pipeline_folder.write_model(run, 3, model)
    comfyui_lora.write_lora(model / loading.LORA_FILE, folder / "exported.safetensors")
    save_file(
        trainable.load_at_checkpoint(run, 3).denoiser.state_dict(), folder / "unet.safetensors"
    )
    *load, _ = model_card.usage(run, model, loading.locate("toybox")).splitlines()
    return {
        "resumed": seen,
        "same picture": ImageChops.difference(finished, third).getextrema(),
        "own weights": has_its_own_weights(),
        "usage": "\n".join(load),
        "numpy": numpy.__version__,
    }


def has_its_own_weights() -> bool:
    """Return whether the bundled base's text encoder has the weights that are in its file."""
    encoder = loading.load_model("toybox").pipeline.text_encoder.state_dict()
    saved = load_file(Path(loading.locate("toybox"), "text_encoder", "model.safetensors"))
    return all(
        any(name.endswith(key) and bool((encoder[name] == value.float()).all()) for name in encoder)
        for key, value in saved.items()
    )


if __name__ == "__main__":
    print(json.dumps(way(Path(sys.argv[1]), json.loads(sys.argv[2]))))
