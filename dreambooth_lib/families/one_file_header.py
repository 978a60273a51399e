"""Read what a Stable Diffusion model in one file is, from its header, keys and metadata alone."""

import json
import re
import warnings
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from dreambooth_lib.families.base_files import BaseError, check_weights
from dreambooth_lib.families.prediction_type import (
    EPSILON,
    V_PREDICTION,
    V_PREDICTION_ZTSNR,
    with_prediction_type,
)

#: The key of a file's metadata under which this kit writes the small files of diffusers' layout, as
#: JSON: their text by their path.
LAYOUT = "dreambooth_lib.layout"
#: Words in the tokenizer of CLIP, which is left out there.
CLIP_WORDS = 49408
_MOST_LAYOUT = 2**24  # bytes
#: Those files.
LAYOUT_FILES = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json|(unet|vae|text_encoder(_2)?)/config\.json|"
    r"tokenizer(_2)?/((vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|"
    r"merges\.txt)"
)
#: Kinds of files, by diffusers' names.
KINDS = {
    "v1": "Stable Diffusion 1.x",
    "v2": "Stable Diffusion 2.x",
    "xl_base": "Stable Diffusion XL",
}
#: How the keys of each part begin.
_PREFIXES = {
    "unet": ("model.diffusion_model.",), "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}  # fmt: skip
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
#: Keys of SDXL models with the noise process of EDM (arXiv 2206.00364).
_EDM = ("edm_mean", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
#: In this norm's bias, 2.x models that predict v have a standard deviation above 0.09.
_V2_TELLING, _V2_LIMIT = (
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09,
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a file is."""

    kind: str  #: one of :data:`KINDS`
    prediction_type: str
    dtypes: dict[str, str]  #: of each part's weights: "float32", "float16" or "bfloat16"
    layout: dict[str, str]  #: the small files of diffusers' layout, without tokenizers of CLIP's
    numbers: dict[str, int]  #: in each part's tensors

    def __str__(self) -> str:
        """Return it in words: "Stable Diffusion XL, v_prediction with a zero terminal SNR"."""
        predicts = self.prediction_type.replace("_ztsnr", " with a zero terminal SNR")
        return f"{KINDS[self.kind]}, {predicts}"


def check_not_pickled(name: str) -> None:
    """Raise :class:`BaseError` for a file whose name says that it is pickled or quantized."""
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLED:
        raise BaseError(
            f"'{name}' is a pickled checkpoint, which can hold code; choose its .safetensors "
            "version, or convert it by StableDiffusionPipeline.from_single_file(...)"
            ".save_pretrained('my-base') from diffusers (StableDiffusionXLPipeline for an XL "
            "model), and give that folder."
        )
    if suffix == ".gguf":
        raise BaseError(
            f"'{name}' holds quantized weights, which cannot be trained; choose its .safetensors "
            "version in float16."
        )


def read_header(file: Path, name: str = "") -> Header:
    """Read what a safetensors file is; ``name`` is how to call it.

    Only the header and, for 2.x, one small tensor are read. Raises :class:`BaseError` for a file
    that is pickled, damaged, quantized, or no whole Stable Diffusion 1.x, 2.x or XL model.
    """
    return _read_header(file, name or file.name, *(file.stat()[i] for i in (6, 8)))


@cache
def _read_header(file: Path, name: str, size: int, modified: int) -> Header:
    from safetensors import safe_open

    check_not_pickled(name)
    try:
        keys = check_weights(file)
    except BaseError:
        with file.open("rb") as opened:
            if opened.read(2) in (b"PK", *(bytes((128, n)) for n in range(6))):
                check_not_pickled(f"{name}.ckpt")  # a zip of torch's, or a pickle, renamed
        raise
    with safe_open(file, "pt") as weights:
        slices = {key: weights.get_slice(key) for key in keys}
        shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
        types = {key: str(s.get_dtype()) for key, s in slices.items()}
        metadata = weights.metadata() or {}
        layout = _own_layout(metadata, name)
        kind = _kind_of_layout(layout) if layout else _kind(shapes, name)
        of_part = {
            part: [k for k in keys if k.startswith(prefixes)]
            for part, prefixes in _PREFIXES.items()
            if kind == "xl_base" or part != "text_encoder_2"
        }
        _check_parts(of_part, name)
        dtypes = {
            part: _dtype(part, {types[k] for k in own}, name) for part, own in of_part.items()
        }
        prediction = layout and EPSILON
        if not layout:
            telling = (
                weights.get_tensor(_V2_TELLING) if kind == "v2" and _V2_TELLING in keys else None
            )
            prediction = _prediction_type({*keys}, metadata, telling, name)
            layout = _layout(kind, prediction)
    prediction = _prediction_of(json.loads(layout["scheduler/scheduler_config.json"]))
    numbers = {part: sum(prod(shapes[key]) for key in own) for part, own in of_part.items()}
    return Header(kind, prediction, dtypes, layout, numbers)


def _own_layout(metadata: dict[str, str], name: str) -> dict[str, str]:
    """Return the layout that this kit wrote into a file's metadata; {} where there is none."""
    text = metadata.get(LAYOUT)
    if text is None:
        return {}
    try:
        layout: dict[str, str] = json.loads(text) if len(text) <= _MOST_LAYOUT else {}
        configs = [
            json.loads(layout[n]) for n in layout if n.endswith(("config.json", "index.json"))
        ]
        sound = all(LAYOUT_FILES.fullmatch(n) and isinstance(t, str) for n, t in layout.items())
        sound = sound and all(isinstance(config, dict) for config in configs)
    except (ValueError, TypeError, AttributeError, RecursionError):
        sound = False
    needed = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")
    if not sound or any(name not in layout for name in needed):
        raise BaseError(
            f"the metadata '{LAYOUT}' of '{name}' is damaged; export the model again, or choose "
            "another file."
        )
    return layout


def _kind_of_layout(layout: dict[str, str]) -> str:
    xl = json.loads(layout["model_index.json"]).get("_class_name") == "StableDiffusionXLPipeline"
    act = json.loads(layout.get("text_encoder/config.json", "{}")).get("hidden_act", "quick_gelu")
    return "xl_base" if xl else "v1" if act == "quick_gelu" else "v2"


def _kind(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    """Return a file's kind by its keys and shapes. Raises :class:`BaseError` for any other."""
    import torch
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    if any(key.startswith(("lora_", "lycoris_")) or ".lora_" in key for key in shapes):
        raise BaseError(
            f"'{name}' is a LoRA, not a base model; give the base model that it was trained on."
        )
    if found := next((key for key in _EDM if key in shapes), None):
        raise BaseError(
            f"'{name}' has EDM's noise process (its key '{found}'), which the kit cannot train; "
            "choose another base."
        )
    try:
        kind = infer_diffusers_model_type(
            {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        )
    except Exception:  # of any type: it indexes shapes that a file of another kind need not have
        kind = ""
    if kind not in KINDS:
        what = f"'{name}' is of type '{kind}'" if kind else f"the kit does not recognise '{name}'"
        raise BaseError(
            f"{what}; as a single file the kit reads only Stable Diffusion 1.x, 2.x and XL, but no "
            "inpainting models or refiners; for another family, give a folder in diffusers' layout "
            "or a Hub id."
        )
    return kind


def _check_parts(of_part: dict[str, list[str]], name: str) -> None:
    missing = [part for part, keys in of_part.items() if not keys]
    if len(missing) == len(of_part):
        raise BaseError(
            f"the keys of '{name}' are not those of a Stable Diffusion model; give a complete "
            "model of Stable Diffusion 1.x, 2.x or XL."
        )
    if missing:
        raise BaseError(
            f"'{name}' holds no {' and no '.join(missing)}; choose the file of the whole model, "
            "with its text encoder and its VAE."
        )


def _dtype(part: str, types: set[str], name: str) -> str:
    """Return the widest dtype of a part's weights; positions are counted in integers."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    if odd := {t for t in types if t not in names and t not in ("I64", "I32", "F64")}:
        raise BaseError(
            f"'{name}' holds its {part} in {sorted(odd)[0]}, which is too coarse to train; choose "
            "its version in float16 or float32."
        )
    if types & {"F32", "F64"} or {"F16", "BF16"} <= types:
        return "float32"
    return next((names[t] for t in ("F16", "BF16") if t in types), "float32")


def _prediction_type(keys: set[str], metadata: dict[str, str], telling: Any, name: str) -> str:
    """Return what a model predicts, by its keys (as NoobAI's) or metadata (kohya's, modelspec's).

    ``telling`` is a 2.x model's tensor that tells, by which ComfyUI goes, too.
    """
    told = metadata.get("modelspec.prediction_type", "").lower()
    v = "v_pred" in keys or told in ("v", "v_prediction")
    if not told and not v:
        v = metadata.get("ss_v_parameterization", "").lower() == "true"
        if telling is not None:
            v = v or bool(telling.float().std(unbiased=False) > _V2_LIMIT)
    ztsnr = "ztsnr" in keys or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    if not v and re.search(r"v-?pred", name.lower().replace("_", "-")):
        warnings.warn(
            f"The name of '{name}' suggests v-prediction, but its metadata does not say so, and "
            "the kit assumes epsilon; if it is a v-prediction model, set prediction_type to "
            "'v_prediction' or 'v_prediction_ztsnr'.", stacklevel=6,
        )  # fmt: skip
    return (V_PREDICTION_ZTSNR if ztsnr else V_PREDICTION) if v else EPSILON


def _prediction_of(scheduler: dict[str, Any]) -> str:
    v = scheduler.get("prediction_type", EPSILON) == V_PREDICTION
    ztsnr = v and scheduler.get("rescale_betas_zero_snr")
    return V_PREDICTION_ZTSNR if ztsnr else str(scheduler.get("prediction_type", EPSILON))


def layouts() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the configs of the released models, by kind and by their file in diffusers' layout."""
    return json.loads(Path(__file__).with_name("one_file_configs.json").read_text("utf-8"))


def _layout(kind: str, prediction_type: str) -> dict[str, str]:
    files = layouts()[kind]
    name = "scheduler/scheduler_config.json"
    files[name] = with_prediction_type(files[name], prediction_type)
    index = files["model_index.json"]
    index["scheduler"] = ["diffusers", files[name]["_class_name"]]
    if kind == "v2" and prediction_type == EPSILON:  # 2-base, of 512 x 512 pixels
        files["unet/config.json"]["sample_size"] = 64
        files["vae/config.json"]["sample_size"] = 512
    return {name: json.dumps(content, indent=2) for name, content in files.items()}
