"""Export a run as the file that A1111 and ComfyUI load."""

from pathlib import Path
from tempfile import TemporaryDirectory

from dreambooth_lib.core.config import origin
from dreambooth_lib.core.disk import explain_disk_errors, format_bytes
from dreambooth_lib.export import pipeline_folder
from dreambooth_lib.export.comfyui_checkpoint import write_checkpoint
from dreambooth_lib.export.comfyui_lora import ExportError, write_lora
from dreambooth_lib.families import loading
from dreambooth_lib.families.clip_skip import clip_skip_of
from dreambooth_lib.training.runs import Run


def check_exportable(run: Run) -> None:
    """Raise :class:`ExportError` if :func:`export` has no file format for a run's model."""
    config = run.config
    family = loading.resolve(config.base, config.revision).family
    if config.method == "full" and family.denoiser_name != "unet":
        raise ExportError(
            f"'{config.base}' is not a Stable Diffusion 1.x, 2.x or XL model, so it has no "
            "single-file format here; train it with method 'lora', whose file ComfyUI loads, or "
            "use the model with diffusers."
        )
    if config.adapter is not None:
        raise ExportError(
            f"the run's adapter is '{config.adapter}', for which the kit writes no file for A1111 "
            "or ComfyUI; train a LoRA, or use the model with diffusers and peft."
        )


def step_to_export(run: Run) -> int | None:
    """Return the step of a finished run's pipeline; None where it has no checkpoint of that step.

    Of a run that has not finished, the newest checkpoint's; 0 if there is none.
    """
    checkpoints = run.checkpoints()
    if not run.finished:
        return max(checkpoints, default=0)
    step = run.trained().get("step")
    return step if step in checkpoints else None


def export_run(run: Run, path: str | Path, step: int | None = None) -> str:
    """Write a run's pipeline, or its checkpoint of ``step``, as :func:`export` does."""
    check_exportable(run)
    of_checkpoint = step_to_export(run) if step is None else step
    if of_checkpoint is None:
        return export(run, run.pipeline, path)
    with (
        explain_disk_errors(run.folder / "exports"),
        TemporaryDirectory(dir=run.folder, prefix=".export-") as model,  # as large as its pipeline
    ):
        pipeline_folder.write_pipeline(run, of_checkpoint, Path(model))
        return export(run, model, path, step)


def export(run: Run, model: str | Path, path: str | Path, step: int | None = None) -> str:
    """Write a run's exported model as the file that A1111 and ComfyUI load.

    ``model`` is its folder, as :func:`.pipeline_folder.write_pipeline` writes it; ``path`` is a
    file that ends in ``.safetensors``, or a folder for a file of the run's name. ``step`` adds a
    checkpoint's step to that name and to the sentence. Return a sentence on which folder the file
    belongs in. Raises :class:`ExportError` as :func:`write_checkpoint` and :func:`write_lora` do.
    """
    path, config = Path(path), run.config
    if path.suffix != ".safetensors":
        number = "" if step is None else f"-{step:06d}"
        path = path / f"{run.folder.name}{number}.safetensors"
    check_exportable(run)
    if config.method == "lora":
        write_lora(Path(model) / loading.LORA_FILE, path)
        folders = "models/Lora (A1111) or models/loras (ComfyUI)"
    else:
        write_checkpoint(model, path)
        folders = "models/Stable-diffusion (A1111) or models/checkpoints (ComfyUI)"
    of_step = "" if step is None else f"step {step}, "
    message = f"Wrote {path} ({of_step}{format_bytes(path.stat().st_size)})."
    if origin(config.base) == "toybox":
        message += (
            " Neither program can run it: they only know the sizes of the released Stable "
            "Diffusion models, and the bundled base is smaller. For other bases, the file goes to "
            f"{folders}."
        )
    else:
        message += f" Copy it to {folders}."
    base = loading.resolve(config.base, config.revision)
    below, clip_skip = base.loras, clip_skip_of(base, config.clip_skip)
    if clip_skip > 1:
        message += (
            f" Set 'Clip skip' to {clip_skip} in A1111, or 'CLIP Set Last Layer' to -{clip_skip} "
            "in ComfyUI, as in training."
        )
    if config.method == "lora" and below:
        names = ", ".join(f"'{lora.path}'" for lora in below)
        message += f" It was trained on {names}, which it does not hold: load these LoRAs with it."
    if config.train_token:
        message += f" The file has no place for the trained token '{config.subject.identifier}'."
    if config.dora:
        message += " Both programs reproduce a DoRA only approximately."
    return message
