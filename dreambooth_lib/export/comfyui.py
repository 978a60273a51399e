"""Export a run as the file that A1111 and ComfyUI load."""

from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_lib.core.config import origin
from dreambooth_lib.export.comfyui_checkpoint import single_file
from dreambooth_lib.export.comfyui_lora import ExportError, lora_file
from dreambooth_lib.families import loading
from dreambooth_lib.figures.labels import format_bytes

if TYPE_CHECKING:
    from dreambooth_lib.training.runs import Run


def refuse(run: "Run") -> None:
    """Raise :class:`ExportError` where :func:`export` has no file for a run's family."""
    config = run.config
    family = loading.resolve(config.base, config.revision).family
    if config.method == "full" and family.denoiser_name != "unet":
        raise ExportError(
            f"'{config.base}' is no Stable Diffusion 1.x, 2.x or XL, and has no one-file layout "
            "here; train it with method 'lora', whose file ComfyUI loads, or keep it for diffusers."
        )


def export(run: "Run", model: str | Path, path: str | Path) -> str:
    """Write a run's kept model as the file that A1111 and ComfyUI load; say where it belongs.

    ``model`` is its folder (:func:`write`), ``path`` a file that ends in
    ``.safetensors`` or a folder for one of the run's name. Raises as :func:`single_file` and
    :func:`lora_file` do.
    """
    path, config = Path(path), run.config
    if path.suffix != ".safetensors":
        path = path / f"{run.folder.name}.safetensors"
    refuse(run)
    if config.method == "lora":
        lora_file(Path(model) / loading.LORA_FILE, path)
        place = "models/Lora of A1111 or models/loras of ComfyUI"
    else:
        single_file(model, path)
        place = "models/Stable-diffusion of A1111 or models/checkpoints of ComfyUI"
    said = [f"{path} ({format_bytes(path.stat().st_size)}) is for {place}."]
    if origin(config.base) == "toybox":
        said += ["Neither can draw with it: they know the sizes of the released Stable Diffusion "
                 "models alone, and the embedded base is smaller."]  # fmt: skip
    if config.train_token:
        said += [f"It has no place for the new word '{config.subject.identifier}'."]
    if config.dora:
        said += ["Neither draws a DoRA quite as it was trained."]
    return " ".join(said)
