"""Write a pipeline as one safetensors file with Stable Diffusion's original names."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dreambooth_lib.core.files import replacing_file
from dreambooth_lib.export.comfyui_lora import ExportError
from dreambooth_lib.export.original_names import checkpoint_keys

if TYPE_CHECKING:
    pass

_COMPONENTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2"),
}


def single_file(
    pipeline_folder: str | Path, path: str | Path, dtype: torch.dtype = torch.float16
) -> Path:
    """Write a pipeline's folder in diffusers' layout as one safetensors file with original keys.

    A text encoder with "gelu" for ``hidden_act`` is 2.x's OpenCLIP. One tensor at a time is read
    and cast, so that memory holds the new file and, as pages that the system may drop, a component.

    The file has no place for what 1.x and 2.x predict: with a 2.x A1111 tries the model out and
    ComfyUI guesses from a weight that tuning hardly changes; a 1.x that predicts v has to be set so
    in either. XL's ``v_pred`` and ``ztsnr`` mark v and a terminal SNR of zero. Raises
    :class:`ExportError` for all but Stable Diffusion 1.x, 2.x and XL; ``path`` is then as before.
    """
    folder = Path(pipeline_folder)
    kind = _read_json(folder / "model_index.json")["_class_name"]
    if kind not in _COMPONENTS:
        raise ExportError(
            f"the pipeline in '{folder}' is a {kind}, which has no original one-file layout here; "
            "export a Stable Diffusion 1.x, 2.x or XL pipeline."
        )
    xl = kind == "StableDiffusionXLPipeline"
    tensors: dict[str, torch.Tensor] = {}
    for component in _COMPONENTS[kind]:
        tensors.update(_original(folder / component, dtype, xl))
    if xl:
        scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
        if scheduler.get("prediction_type") == "v_prediction":
            tensors["v_pred"] = torch.empty(0)
        if scheduler.get("rescale_betas_zero_snr"):
            tensors["ztsnr"] = torch.empty(0)
    with replacing_file(path) as partial:
        save_file(tensors, partial, {"format": "pt"})
    return Path(path)


def _original(folder: Path, dtype: torch.dtype, xl: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Read a component's tensors, with their keys in the one-file checkpoint."""
    config = _read_json(folder / "config.json")
    weights = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors"  # no variant's
    found = sorted(file for file in folder.iterdir() if re.fullmatch(weights, file.name))
    if not found:
        raise ExportError(
            f"'{folder}' holds no weights as safetensors, or only a variant's; load the pipeline "
            "and write it anew with save_pretrained."
        )
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in found]
        homes = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        try:
            keys = checkpoint_keys(folder.name, homes, config, xl)
        except KeyError as error:
            raise ExportError(
                f"'{folder}' holds the weight {error}, which has no place in the original layout; "
                "export a pipeline of Stable Diffusion's own architecture, with nothing added."
            ) from error
        for key in dict.fromkeys(keys.values()):
            sources = [name for name in keys if keys[name] == key]
            parts = [homes[name].get_tensor(name).to(dtype) for name in sources]
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
            if ".attn_" in key and tensor.ndim == 2:  # the autoencoder's, a 1 x 1 convolution there
                tensor = tensor[:, :, None, None]
            if key.endswith("text_projection"):  # [width, projected] there
                tensor = tensor.T
            yield key, tensor.contiguous()


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise ExportError(
            f"'{path}' is not there; give a whole pipeline's folder, as save_pretrained writes it."
        )
    return json.loads(path.read_text())
