"""Write a pipeline as one safetensors file with Stable Diffusion's original names."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dreambooth_lib.core.files import replacing_file
from dreambooth_lib.export.comfyui_lora import ExportError
from dreambooth_lib.export.original_names import checkpoint_keys
from dreambooth_lib.families.one_file_header import CLIP_WORDS, LAYOUT, LAYOUT_FILES
from dreambooth_lib.families.precision import NAMES, without_paths

_COMPONENTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2"),
}


def write_checkpoint(
    pipeline_folder: str | Path, path: str | Path, dtype: torch.dtype = torch.float16
) -> Path:
    """Write a diffusers pipeline folder as one safetensors file with the original keys.

    A text encoder whose ``hidden_act`` is "gelu" is 2.x's OpenCLIP. Tensors are read and cast one
    at a time, so memory holds the new file and one component, whose pages the system may drop.

    The file cannot record the prediction type of 1.x and 2.x: for a 2.x model, A1111 runs the
    model to find out and ComfyUI infers it from a weight that fine-tuning hardly changes; for a
    1.x model with v-prediction, the user has to set it in either program. For XL the keys
    ``v_pred`` and ``ztsnr`` mark v-prediction and a zero terminal SNR. For this kit the metadata
    holds the folder's configs, so that the file is a base again. Raises :class:`ExportError` for
    anything but Stable Diffusion 1.x, 2.x and XL; ``path`` is then left as it was.
    """
    folder = Path(pipeline_folder)
    kind = _read_json(folder / "model_index.json")["_class_name"]
    if kind not in _COMPONENTS:
        raise ExportError(
            f"the pipeline in '{folder}' is a {kind}, which has no single-file format here; "
            "export a Stable Diffusion 1.x, 2.x or XL pipeline."
        )
    xl = kind == "StableDiffusionXLPipeline"
    tensors: dict[str, torch.Tensor] = {}
    for component in _COMPONENTS[kind]:
        tensors.update(_read_component(folder / component, dtype, xl))
    if xl:
        scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
        if scheduler.get("prediction_type") == "v_prediction":
            tensors["v_pred"] = torch.empty(0)
        if scheduler.get("rescale_betas_zero_snr"):
            tensors["ztsnr"] = torch.empty(0)
    with replacing_file(path) as partial:
        save_file(tensors, partial, {"format": "pt", LAYOUT: json.dumps(dict(_layout(folder)))})
    return Path(path)


def _layout(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the names and texts of a pipeline's configs, and of tokenizers other than CLIP's."""
    words = _read_json(folder / "text_encoder" / "config.json").get("vocab_size")
    for file in (folder / "model_index.json", *sorted(folder.glob("[!.]*/[!.]*"))):
        name, text = file.relative_to(folder).as_posix(), ""
        if not LAYOUT_FILES.fullmatch(name):
            continue
        if words == CLIP_WORDS and name.startswith("tokenizer"):
            continue
        text = file.read_text(encoding="utf-8")
        if name.endswith("config.json") or file.name == "model_index.json":
            config = _read_json(file)
            config |= without_paths({key: config[key] for key in NAMES if key in config})
            if file.name == "model_index.json":  # some bases' settings are told by their name
                config.setdefault("_name_or_path", folder.name)
            text = json.dumps(config)
        yield name, text


def _read_component(
    folder: Path, dtype: torch.dtype, xl: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read a component's tensors one by one, each with its key in the single-file checkpoint."""
    config = _read_json(folder / "config.json")
    weights = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors"  # not a variant's
    paths = sorted(path for path in folder.iterdir() if re.fullmatch(weights, path.name))
    if not paths:
        raise ExportError(
            f"'{folder}' has no safetensors weights, or only those of a variant; load the pipeline "
            "and save it again with save_pretrained."
        )
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        try:
            keys = checkpoint_keys(folder.name, file_of, config, xl)
        except KeyError as error:
            raise ExportError(
                f"'{folder}' has the weight {error}, which has no place in the original format; "
                "export a pipeline with Stable Diffusion's own architecture and nothing added."
            ) from error
        for key in dict.fromkeys(keys.values()):
            sources = [name for name in keys if keys[name] == key]
            parts = [file_of[name].get_tensor(name).to(dtype) for name in sources]
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
            if (
                ".attn_" in key and tensor.ndim == 2
            ):  # the VAE's: a 1 x 1 convolution in the original
                tensor = tensor[:, :, None, None]
            if key.endswith("text_projection"):  # [width, projected] in the original
                tensor = tensor.T
            yield key, tensor.contiguous()


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise ExportError(
            f"'{path}' is missing; give the folder of a complete pipeline, as save_pretrained "
            "writes it."
        )
    return json.loads(path.read_text())
