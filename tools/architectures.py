"""Published architectures as values, and pipelines made of them with random weights.

The weights mean nothing, but their shapes, and so what they cost, are those of the real models.
Prompts are read by small tokenizers, whose words are fewer than the text encoders' embeddings.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file

from dreambooth_lib.families import one_file_header
from tools.toybox.tokenizer import save_tokenizer, world_words

SHARD = 4 * 10**9  # bytes of a file of weights, at most


@dataclass(frozen=True)
class Part:
    """A model of a pipeline: its class, its config, and what of that a tiny one has instead."""

    kind: str
    config: dict[str, Any]
    tiny: dict[str, Any] = field(default_factory=dict)  #: empty where no tiny one is wanted

    def settings(self, tiny: bool) -> dict[str, Any]:
        return self.config | (self.tiny if tiny else {})

    @property
    def of_diffusers(self) -> bool:
        return hasattr(diffusers, self.kind)

    @property
    def weights(self) -> str:
        return "diffusion_pytorch_model" if self.of_diffusers else "model"


@dataclass(frozen=True)
class Architecture:
    """A pipeline: its models, its tokenizers by kind, its scheduler, and how weights are kept."""

    kind: str
    models: dict[str, Part]
    tokenizers: dict[str, str]  #: "clip" or "t5" by the part's name
    scheduler: tuple[str, dict[str, Any]]
    dtype: torch.dtype = torch.bfloat16
    more: dict[str, Any] = field(default_factory=dict)  #: of ``model_index.json``


def _released(kind: str, part: str) -> dict[str, Any]:
    """Return the config of a part of a released Stable Diffusion, as the library has it."""
    names = (f"{part}/config.json", f"{part}/{part}_config.json")
    files = one_file_header.layouts()[kind]
    config = next(files[name] for name in names if name in files)
    return {
        k: v for k, v in config.items() if k not in ("_class_name", "architectures", "model_type")
    }


def _vae(**config: Any) -> Part:
    own = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    }
    tiny = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return Part("AutoencoderKL", own | config, tiny)


def _clip(kind: str, released: str, part: str = "text_encoder") -> Part:
    tiny = {
        "vocab_size": 2000,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    return Part(kind, _released(released, part), tiny)


def _clip_l(kind: str = "CLIPTextModel") -> Part:
    return _clip(kind, "v1")


_OPEN_CLIP_H = _clip("CLIPTextModel", "v2")
_BIG_G = _clip("CLIPTextModelWithProjection", "xl_base", "text_encoder_2")
_T5_XXL = Part(
    "T5EncoderModel",
    {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    {"vocab_size": 100, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 2},
)
SD15 = Architecture(
    "StableDiffusionPipeline",
    {
        "unet": Part(
            "UNet2DConditionModel",
            _released("v1", "unet"),
            {
                "sample_size": 8,
                "block_out_channels": [8, 16],
                "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
                "layers_per_block": 1,
                "cross_attention_dim": 16,
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            },
        ),
        "text_encoder": _clip_l(),
        "vae": _vae(**_released("v1", "vae")),
    },
    {"tokenizer": "clip"},
    (
        "PNDMScheduler",
        _released("v1", "scheduler"),
    ),
    torch.float32,
    {"safety_checker": [None, None], "feature_extractor": [None, None],
     "requires_safety_checker": False},
)  # fmt: skip

SD21 = Architecture(
    "StableDiffusionPipeline",
    {
        "unet": Part(
            "UNet2DConditionModel",
            _released("v2", "unet"),
        ),
        "text_encoder": _OPEN_CLIP_H,
        "vae": _vae(**_released("v2", "vae")),
    },
    {"tokenizer": "clip"},
    ("DDIMScheduler", _released("v2", "scheduler")),
    torch.float32,
)

SDXL = Architecture(
    "StableDiffusionXLPipeline",
    {
        "unet": Part(
            "UNet2DConditionModel",
            _released("xl_base", "unet"),
            {
                "sample_size": 8,
                "block_out_channels": [8, 16],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "layers_per_block": 1,
                "transformer_layers_per_block": [1, 2],
                "attention_head_dim": [2, 4],
                "cross_attention_dim": 32,
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 6 * 4 + 16,
                "norm_num_groups": 4,
            },
        ),
        "text_encoder": _clip_l(),
        "text_encoder_2": _BIG_G,
        "vae": _vae(**_released("xl_base", "vae")),
    },
    {"tokenizer": "clip", "tokenizer_2": "clip"},
    ("EulerDiscreteScheduler", _released("xl_base", "scheduler")),
    more={"force_zeros_for_empty_prompt": True},
)

SD35_MEDIUM = Architecture(
    "StableDiffusion3Pipeline",
    {
        "transformer": Part(
            "SD3Transformer2DModel",
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": list(range(13)),
                "qk_norm": "rms_norm",
            },
            {
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 32,
                "pos_embed_max_size": 8,
                "dual_attention_layers": [0],
            },
        ),
        "text_encoder": _clip_l("CLIPTextModelWithProjection"),
        "text_encoder_2": _BIG_G,
        "text_encoder_3": _T5_XXL,
        "vae": _vae(
            latent_channels=16, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
    },
    {"tokenizer": "clip", "tokenizer_2": "clip", "tokenizer_3": "t5"},
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
)  # fmt: skip

FLUX = Architecture(
    "FluxPipeline",
    {
        "transformer": Part(
            "FluxTransformer2DModel",
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": [16, 56, 56],
            },
            {
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 16,
                "axes_dims_rope": [4, 6, 6],
            },
        ),
        "text_encoder": _clip_l(),
        "text_encoder_2": _T5_XXL,
        "vae": _vae(
            latent_channels=16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
    },
    {"tokenizer": "clip", "tokenizer_2": "t5"},
    (
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    ),
)  # fmt: skip

_QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def _klein(text_encoder: dict[str, Any], **transformer: Any) -> Architecture:
    """Return FLUX.2 klein-base with a text encoder's and a transformer's config."""
    own = {"guidance_embeds": False, "joint_attention_dim": 3 * text_encoder["hidden_size"]}
    vae = _vae(latent_channels=32, sample_size=1024)
    return Architecture(
        "Flux2KleinPipeline",
        {
            "transformer": Part("Flux2Transformer2DModel", own | transformer),
            "text_encoder": Part("Qwen3ForCausalLM", text_encoder),
            "vae": Part("AutoencoderKLFlux2", vae.config),
        },
        {"tokenizer": "clip"},  # its words do not matter where nothing is read
        FLUX.scheduler,
        more={"is_distilled": False},
    )


KLEIN_4B = _klein(_QWEN3_4B, num_layers=5, num_single_layers=20, num_attention_heads=24)
KLEIN_9B = _klein(
    _QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    num_layers=8,
    num_single_layers=24,
    num_attention_heads=32,
)

Z_IMAGE = Architecture(
    "ZImagePipeline",
    {
        "transformer": Part("ZImageTransformer2DModel", {}),
        "text_encoder": Part("Qwen3Model", _QWEN3_4B),
        "vae": _vae(
            latent_channels=16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
    },
    {"tokenizer": "clip"},  # its words do not matter where nothing is read
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
)  # fmt: skip

ALL = {
    "sd15": SD15, "sd21": SD21, "sdxl": SDXL, "sd35": SD35_MEDIUM, "flux": FLUX,
    "klein4b": KLEIN_4B, "klein9b": KLEIN_9B, "z_image": Z_IMAGE,
}  # fmt: skip


def on_meta(part: Part, tiny: bool = False) -> torch.nn.Module:
    """Return a model without values, of the right shapes."""
    settings = part.settings(tiny)
    with torch.device("meta"):
        if part.of_diffusers:
            return getattr(diffusers, part.kind)(**settings)
        kind = getattr(transformers, part.kind)
        return kind(kind.config_class(**settings))


def parameters(part: Part) -> int:
    """Count the numbers in a model."""
    return sum(parameter.numel() for parameter in on_meta(part).parameters())


def save(
    made: Architecture, folder: Path, *, tiny: bool = False, weights: bool = True,
    zeros: bool = False,
) -> None:  # fmt: skip
    """Write a pipeline's folder in diffusers' layout, of configs alone without ``weights``.

    Weights are made and written a file at a time, on the GPU if there is one: of Flux.1 no more
    than 4 GB are ever in memory. With ``zeros`` they are that, in files with holes, which take no
    room on the disk.
    """
    index: dict[str, Any] = {"_class_name": made.kind, "_diffusers_version": diffusers.__version__}
    for name, part in made.models.items():
        index[name] = ["diffusers" if part.of_diffusers else "transformers", part.kind]
        model: Any = on_meta(part, tiny)
        if part.of_diffusers:
            model.save_config(folder / name)
        else:
            model.config.architectures = [part.kind]
            model.config.save_pretrained(folder / name)
        if weights:
            _write_weights(model, folder / name, part.weights, made.dtype, zeros)
    for name, kind in made.tokenizers.items():
        tokenizer = _TOKENIZERS[kind](folder / name)
        index[name] = ["transformers", type(tokenizer).__name__]
    kind, settings = made.scheduler
    getattr(diffusers, kind)(**settings).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", kind]
    # Last, so that a folder with it is a whole one.
    (folder / "model_index.json").write_text(json.dumps(index | made.more, indent=2))


def _clip_tokenizer(folder: Path) -> Any:
    tokenizer = save_tokenizer(folder)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    return tokenizer


def _t5_tokenizer(folder: Path) -> Any:
    words = [("▁" + word, -1.0) for word in ("a", "photo", "of", *world_words()[:50])]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    known = list(dict.fromkeys([*special, *words, ("▁", -5.0)]))
    tokenizer = transformers.T5TokenizerFast(vocab=known, extra_ids=0)
    tokenizer.save_pretrained(folder)
    return tokenizer


_TOKENIZERS = {"clip": _clip_tokenizer, "t5": _t5_tokenizer}


def _write_weights(
    model: torch.nn.Module, folder: Path, stem: str, dtype: torch.dtype, zeros: bool
) -> None:
    """Weights in one file or in shards with the index that goes with them."""
    shards = list(_shards(_shapes(model), dtype.itemsize))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    where: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else stem
        if zeros:
            _write_zeros(shapes, dtype, folder / f"{file}.safetensors")
        else:
            made = {name: _random(name, shape, device, dtype) for name, shape in shapes.items()}
            save_file(made, folder / f"{file}.safetensors", {"format": "pt"})
        where |= dict.fromkeys(shapes, f"{file}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _write_zeros(shapes: dict[str, torch.Size], dtype: torch.dtype, file: Path) -> None:
    """Return a safetensors file of zeros: the length of its header, the header, and a hole."""
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def _shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    """Return the shape of every saved tensor, shared ones once."""
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own = {name for name, _ in model.named_parameters()}
    state = model.state_dict()
    return {name: one.shape for name, one in state.items() if name in own or name not in shared}


def _shards(shapes: dict[str, torch.Size], itemsize: int) -> Iterator[dict[str, torch.Size]]:
    shard: dict[str, torch.Size] = {}
    size = 0
    for name, shape in shapes.items():
        more = shape.numel() * itemsize
        if shard and size + more > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += more
    yield shard


def _random(name: str, shape: torch.Size, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Values that leave what passes through a layer about as large as it was."""
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=dtype)
    made = torch.randn(shape, device=device, dtype=dtype)
    return (made / shape[1:].numel() ** 0.5).cpu()
