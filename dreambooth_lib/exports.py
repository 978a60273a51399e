"""A tuned model in the files that A1111 and ComfyUI load: a one-file checkpoint, and a LoRA."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dreambooth_lib import families
from dreambooth_lib.config import origin
from dreambooth_lib.originals import checkpoint_keys, clip_name, unet_name
from dreambooth_lib.state import replacing_file
from dreambooth_lib.words import size_in_words

if TYPE_CHECKING:
    from dreambooth_lib.runs import Run

_COMPONENTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
#: What kohya calls the models, and the layout of SDXL's U-Net, by whose original names it goes.
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_XL = {
    "layers_per_block": 2,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
#: A LoRA's tensor in diffusers' files, past and present: its model, module and part.
_TENSOR = re.compile(
    r"(\w+)\.(.+?)\.(?:lora_|lora\.|lora_linear_layer\.)"
    r"(?:(?P<down>A|down)\.weight|(?P<up>B|up)\.weight|(?P<dora_scale>magnitude_vector)(\.weight)?)"
)


class ExportError(ValueError):
    """What has no place in another tool's file."""


def refuse(run: "Run") -> None:
    """Raise :class:`ExportError` where :func:`export` has no file for a run's family."""
    config = run.config
    family = families.resolve(config.base, config.revision).family
    if config.method == "full" and family.denoiser_name != "unet":
        raise ExportError(
            f"'{config.base}' is no Stable Diffusion 1.x, 2.x or XL, and has no one-file layout "
            "here; train it with method 'lora', whose file ComfyUI loads, or keep it for diffusers."
        )


def export(run: "Run", model: str | Path, path: str | Path) -> str:
    """Write a run's kept model as the file that A1111 and ComfyUI load; say where it belongs.

    ``model`` is its folder (:func:`dreambooth_lib.kept.write`), ``path`` a file that ends in
    ``.safetensors`` or a folder for one of the run's name. Raises as :func:`single_file` and
    :func:`lora_file` do.
    """
    path, config = Path(path), run.config
    if path.suffix != ".safetensors":
        path = path / f"{run.folder.name}.safetensors"
    refuse(run)
    if config.method == "lora":
        lora_file(Path(model) / families.LORA_FILE, path)
        place = "models/Lora of A1111 or models/loras of ComfyUI"
    else:
        single_file(model, path)
        place = "models/Stable-diffusion of A1111 or models/checkpoints of ComfyUI"
    said = [f"{path} ({size_in_words(path.stat().st_size)}) is for {place}."]
    if origin(config.base) == "toybox":
        said += ["Neither can draw with it: they know the sizes of the released Stable Diffusion "
                 "models alone, and the embedded base is smaller."]  # fmt: skip
    if config.train_token:
        said += [f"It has no place for the new word '{config.subject.identifier}'."]
    if config.dora:
        said += ["Neither draws a DoRA quite as it was trained."]
    return " ".join(said)


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


def lora_file(
    lora: str | Path | Mapping[str, torch.Tensor],
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a LoRA in diffusers' format, a file or its tensors, as A1111 and ComfyUI load it.

    ``metadata`` is the adapter's, which a file brings along: ``{"unet.lora_alpha": 8, ...}``;
    without it the scale is 1. A U-Net's LoRA becomes kohya's: diffusers' names with underscores for
    1.x and 2.x and the original ones for SDXL, known by its second text encoder or by attention of
    more than one layer, with an ``alpha`` that gives each module its scale. A transformer's keeps
    the names ``transformer...lora_A.weight``, which ComfyUI reads; its scale goes into ``lora_B``,
    as not every reader takes an ``alpha`` there. (diffusers' ``convert_state_dict_to_kohya`` writes
    the rank for each ``alpha``, ``lora_te1`` for 1.x's encoder too, and no original names.)

    Of a DoRA the magnitudes go along as ``dora_scale``, one for each output. ComfyUI divides by the
    base weight's norm, where training did by the sum's, and A1111 takes them for the inputs', so
    that for the same pictures it is better fused and exported by :func:`single_file`. Raises
    :class:`ExportError` for what is no such LoRA; ``path`` is then as before.
    """
    if isinstance(lora, (str, Path)):
        with safe_open(lora, "pt") as file:
            own = json.loads((file.metadata() or {}).get("lora_adapter_metadata") or "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    else:
        own, tensors = {}, dict(lora)
    modules = _modules(tensors)
    models = {model for model, _ in modules}
    if not models or not models <= {*_KOHYA, "transformer"}:
        raise ExportError(
            f"a LoRA of {', '.join(sorted(models)) or 'nothing'} has no layout that A1111 or "
            f"ComfyUI documents; give one of {', '.join(_KOHYA)} or transformer."
        )
    xl = "text_encoder_2" in models or any(".transformer_blocks.1." in name for _, name in modules)
    written: dict[str, torch.Tensor] = {}
    for (model, module), parts in modules.items():
        down, up = parts["down"], parts["up"]
        alpha = _alpha(model, module, len(down), own if metadata is None else metadata)
        name = clip_name(module) if model.startswith("text_encoder") else module
        if "transformer" in models:
            name = f"{model}.{name}"
            up = (up.float() * (alpha / len(down))).to(up.dtype)
            written |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        else:
            name = _kohya_name(model, name, xl)
            written |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            written[f"{name}.alpha"] = torch.tensor(alpha)
        if "dora_scale" in parts:
            magnitudes = parts["dora_scale"].reshape(-1, *[1] * (down.ndim - 1))
            written[f"{name}.dora_scale"] = magnitudes
    with replacing_file(path) as partial:  # without metadata, by which A1111 would call it 1.x's
        save_file({key: t.detach().contiguous() for key, t in written.items()}, partial)
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


def _modules(
    tensors: Mapping[str, torch.Tensor],
) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Group a LoRA's tensors by model and module, under kohya's endings."""
    modules: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key)
        if not found:
            raise ExportError(
                f"the LoRA's tensor '{key}' is not one of a pair of down and up weights in "
                "diffusers' format; give what save_lora_weights writes."
            )
        part = next(name for name, text in found.groupdict().items() if text)
        modules.setdefault((found[1], found[2]), {})[part] = tensor
    for (model, module), parts in modules.items():
        if not {"down", "up"} <= parts.keys():
            raise ExportError(
                f"the LoRA's module '{model}.{module}' lacks its down or its up weight; "
                "write the LoRA anew with save_lora_weights."
            )
    return modules


def _alpha(model: str, module: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """Return the number whose share of the rank is the module's scale."""
    from peft.utils.other import get_pattern_key

    own = metadata.get(f"{model}.alpha_pattern") or {}
    alpha = metadata.get(f"{model}.lora_alpha", rank)
    alpha = own.get(get_pattern_key(list(own), module), alpha)
    return float(alpha * rank**0.5 if metadata.get(f"{model}.use_rslora") else alpha)


def _kohya_name(model: str, module: str, xl: bool) -> str:
    if xl and model == "unet":
        try:
            module = unet_name(f"{module}.weight", _XL).removesuffix(".weight")
        except (KeyError, IndexError) as error:
            raise ExportError(
                f"the LoRA's module 'unet.{module}' has no original name in SDXL's U-Net; "
                "give a LoRA of SDXL."
            ) from error
    prefix = "lora_te1" if xl and model == "text_encoder" else _KOHYA[model]
    return f"{prefix}_{module}".replace(".", "_")
