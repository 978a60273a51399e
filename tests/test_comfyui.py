"""Test single-file checkpoints and kohya's LoRAs with diffusers' own readers of such files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MAX_LENGTH, save_tokenizer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dreambooth_lib.__main__ import main
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import visible_files
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.export import comfyui, comfyui_checkpoint, pipeline_folder
from dreambooth_lib.export.comfyui_checkpoint import write_checkpoint
from dreambooth_lib.export.comfyui_lora import ExportError, write_lora
from dreambooth_lib.export.original_names import checkpoint_keys
from dreambooth_lib.training import loop, runs

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD_BLOCKS = {
    "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
    "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP),
}
XL_BLOCKS = {
    "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
#: Of each kind: the U-Net's configuration, and the activation of the first text encoder.
TINY: dict[str, tuple[dict[str, Any], str]] = {
    "sd1": (
        SD_BLOCKS
        | {"block_out_channels": (8, 8, 16, 16), "attention_head_dim": 2,
           "cross_attention_dim": 16},
        "quick_gelu",
    ),
    "sd2": (
        SD_BLOCKS
        | {"block_out_channels": (8, 8, 16, 16), "attention_head_dim": [1, 2, 4, 4],
           "cross_attention_dim": 16, "use_linear_projection": True},
        "gelu",
    ),
    "sdxl": (
        XL_BLOCKS
        | {"block_out_channels": (8, 8, 16), "attention_head_dim": [1, 2, 4],
           "cross_attention_dim": 16 + 32, "transformer_layers_per_block": [1, 2, 3],
           "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20},
        "quick_gelu",
    ),
}  # fmt: skip


def randomize(*modules: torch.nn.Module) -> None:
    """Randomize norms and biases too, so that no two tensors of a shape are equal."""
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)


def save_pipeline(kind: str, folder: Path) -> Path:
    save_tokenizer(folder.with_name(f"{kind}-tokenizer"))
    tokenizer = CLIPTokenizer.from_pretrained(folder.with_name(f"{kind}-tokenizer"))
    text = {
        "vocab_size": len(tokenizer), "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": MAX_LENGTH, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    unet, activation = TINY[kind]
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(norm_num_groups=4, sample_size=8, **unet),
        "vae": AutoencoderKL(
            block_out_channels=(4, 8, 8, 8), layers_per_block=2, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(hidden_size=16, intermediate_size=32, hidden_act=activation, **text)
        ),
    }  # fmt: skip
    pipeline: type[Any] = StableDiffusionPipeline
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    if kind == "sdxl":
        pipeline, options = StableDiffusionXLPipeline, {"tokenizer_2": tokenizer}
        parts["text_encoder_2"] = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=32, intermediate_size=64, hidden_act="gelu", projection_dim=20, **text
            )
        )
    else:
        options["requires_safety_checker"] = False
    randomize(*parts.values())
    scheduler = DDIMScheduler(prediction_type="epsilon" if kind == "sd1" else "v_prediction")
    pipeline(tokenizer=tokenizer, scheduler=scheduler, **parts, **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home, made = tmp_path_factory.mktemp("pipelines"), {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_pipeline(kind, home / kind)
        return made[kind]

    return folder


def load(folder: Path) -> Any:
    cls = StableDiffusionXLPipeline if folder.name == "sdxl" else StableDiffusionPipeline
    return cls.from_pretrained(folder, torch_dtype=torch.float32)


def models(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}


# Single-file checkpoints.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", TINY)
def test_a_single_file_gives_every_weight_back(
    kind: str, dtype: torch.dtype, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load(folder_of(kind))
    path = write_checkpoint(folder_of(kind), tmp_path / "new" / "one.safetensors", dtype)
    assert [file.name for file in path.parent.iterdir()] == ["one.safetensors"]
    again = type(base).from_single_file(
        str(path), config=str(folder_of(kind)), local_files_only=True, torch_dtype=dtype
    )
    assert models(again).keys() == models(base).keys()
    for name, model in models(base).items():
        expected, actual = model.state_dict(), models(again)[name].state_dict()
        assert actual.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(actual[key], tensor.to(dtype)), f"{name}: {key}"


def test_a_base_of_another_depth_comes_back_too(tiny_sd1: str, tmp_path: Path) -> None:
    path = write_checkpoint(tiny_sd1, tmp_path / "one.safetensors", torch.float32)
    again = StableDiffusionPipeline.from_single_file(
        str(path), config=tiny_sd1, local_files_only=True, torch_dtype=torch.float32
    )
    for name, model in models(load(Path(tiny_sd1))).items():
        for key, tensor in model.state_dict().items():
            assert torch.equal(models(again)[name].state_dict()[key], tensor), f"{name}: {key}"


def test_a_single_file_holds_the_original_keys(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    files = {kind: load_file(write_checkpoint(folder_of(kind), tmp_path / kind)) for kind in TINY}
    assert "cond_stage_model.transformer.text_model.final_layer_norm.bias" in files["sd1"]
    assert files["sd1"]["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape[2:] == (1, 1)
    fused = files["sd2"]["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"]
    assert fused.shape == (48, 16) and fused.dtype == torch.float16
    assert files["sdxl"]["conditioner.embedders.1.model.text_projection"].shape == (32, 20)
    assert [kind for kind in TINY if "v_pred" in files[kind]] == ["sdxl"]
    assert not any("ztsnr" in file for file in files.values())


def test_a_sharded_folder_and_an_early_autoencoder_are_read(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load(folder_of("sd1"))
    base.unet.save_pretrained(tmp_path / "p" / "unet", max_shard_size="20KB")
    assert len(list((tmp_path / "p" / "unet").glob("*.safetensors"))) > 1
    for name in ("vae", "text_encoder"):
        getattr(base, name).save_pretrained(tmp_path / "p" / name)
    weights = tmp_path / "p" / "vae" / "diffusion_pytorch_model.safetensors"
    early = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = load_file(weights)
    for new, old in early.items():
        renamed = {key.replace(new, old): tensor for key, tensor in renamed.items()}
    save_file(renamed, weights)
    (tmp_path / "p" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    expected = load_file(write_checkpoint(folder_of("sd1"), tmp_path / "a"))
    actual = load_file(write_checkpoint(tmp_path / "p", tmp_path / "b"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_what_has_no_original_layout_is_one_sentence_and_no_file(
    tmp_path: Path,
) -> None:
    folder, path = tmp_path / "p", tmp_path / "out" / "one.safetensors"
    with pytest.raises(ExportError, match="is missing; give the folder of a complete pipeline"):
        write_checkpoint(folder, path)
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"p' is a FluxPipeline, .*; export a Stable Diffusion"):
        write_checkpoint(folder, path)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(
        json.dumps(TINY["sd1"][0] | {"layers_per_block": 2})
    )
    with pytest.raises(ExportError, match=r"has no safetensors weights.*save_pretrained"):
        write_checkpoint(folder, path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for name in ("encoder_hid_proj.weight", "mid_block.resnets.0.norm9.weight"):
        save_file({name: torch.ones(2)}, weights)
        with pytest.raises(ExportError, match=f"the weight '{name}', which has no place"):
            write_checkpoint(folder, path)
    assert not path.parent.exists()


def test_a_file_that_could_not_be_written_leaves_the_older_one(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(comfyui_checkpoint, "save_file", full)
    (tmp_path / "one.safetensors").write_text("older")
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(folder_of("sd1"), tmp_path / "one.safetensors")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


# The released models, without their weights.

SD1_UNET = SD_BLOCKS | {
    "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # fmt: skip
SD2_UNET = SD1_UNET | {
    "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}  # fmt: skip
SDXL_UNET = XL_BLOCKS | {
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
OPEN_CLIP_H = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    hidden_act="gelu",
)  # fmt: skip
OPEN_CLIP_G = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    hidden_act="gelu", projection_dim=1280,
)  # fmt: skip
UNETS = {"sd1": SD1_UNET, "sd2": SD2_UNET, "sdxl": SDXL_UNET}


def released(kind: str) -> dict[str, torch.nn.Module]:
    """Build the models of a release on the meta device."""
    with torch.device("meta"):
        actual: dict[str, torch.nn.Module] = {
            "unet": UNet2DConditionModel(**UNETS[kind]),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": CLIPTextModel(OPEN_CLIP_H if kind == "sd2" else CLIP_L),
        }  # fmt: skip
        if kind == "sdxl":
            actual["text_encoder_2"] = CLIPTextModelWithProjection(OPEN_CLIP_G)
    return actual


#: Keys of the released files, and how many tensors each model has there.
KNOWN = {
    "sd1": (
        {"unet": 686, "vae": 248, "text_encoder": 196},
        """
        model.diffusion_model.input_blocks.0.0.weight
        model.diffusion_model.time_embed.2.bias
        model.diffusion_model.input_blocks.1.0.in_layers.2.weight
        model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight
        model.diffusion_model.input_blocks.3.0.op.weight
        model.diffusion_model.input_blocks.4.0.skip_connection.weight
        model.diffusion_model.input_blocks.11.0.out_layers.3.bias
        model.diffusion_model.middle_block.1.proj_in.weight
        model.diffusion_model.middle_block.2.emb_layers.1.weight
        model.diffusion_model.output_blocks.2.1.conv.weight
        model.diffusion_model.output_blocks.5.2.conv.bias
        model.diffusion_model.output_blocks.11.0.skip_connection.weight
        model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight
        model.diffusion_model.out.2.weight
        first_stage_model.encoder.down.1.block.0.nin_shortcut.weight
        first_stage_model.encoder.down.2.downsample.conv.bias
        first_stage_model.encoder.mid.attn_1.k.weight
        first_stage_model.decoder.conv_in.weight
        first_stage_model.decoder.mid.block_2.norm1.weight
        first_stage_model.decoder.up.0.block.0.nin_shortcut.weight
        first_stage_model.decoder.up.3.upsample.conv.weight
        first_stage_model.decoder.norm_out.bias
        first_stage_model.post_quant_conv.weight
        cond_stage_model.transformer.text_model.embeddings.token_embedding.weight
        cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.out_proj.bias
        """,
    ),
    # The released file of 2.x has the last layer too, which no tool uses and diffusers leaves out.
    "sd2": (
        {"unet": 686, "vae": 248, "text_encoder": 5 - 1 + 23 * 12},
        """
        model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight
        cond_stage_model.model.token_embedding.weight
        cond_stage_model.model.positional_embedding
        cond_stage_model.model.transformer.resblocks.0.ln_1.weight
        cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias
        cond_stage_model.model.transformer.resblocks.22.attn.out_proj.weight
        cond_stage_model.model.transformer.resblocks.22.mlp.c_proj.weight
        cond_stage_model.model.ln_final.bias
        """,
    ),
    "sdxl": (
        {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 5 + 32 * 12},
        """
        model.diffusion_model.label_emb.0.0.weight
        model.diffusion_model.label_emb.0.2.bias
        model.diffusion_model.input_blocks.3.0.op.weight
        model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight
        model.diffusion_model.input_blocks.8.1.transformer_blocks.9.norm3.bias
        model.diffusion_model.output_blocks.2.2.conv.weight
        model.diffusion_model.output_blocks.5.2.conv.weight
        model.diffusion_model.output_blocks.8.0.skip_connection.weight
        first_stage_model.quant_conv.bias
        conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight
        conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc2.weight
        conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight
        conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias
        conditioner.embedders.1.model.text_projection
        """,
    ),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_keys_of_the_released_models(kind: str) -> None:
    counts, known = KNOWN[kind]
    keys: dict[str, torch.Tensor] = {}
    for component, model in released(kind).items():
        config: Any = model.config
        config = config if component in ("unet", "vae") else config.to_dict()
        tensors = model.state_dict()
        mapped = checkpoint_keys(component, tensors, config, xl=kind == "sdxl")
        assert len(set(mapped.values())) == counts[component]
        keys |= {key: tensors[name] for name, key in mapped.items()}
    assert len(keys) == sum(counts.values())
    assert not set(known.split()) - keys.keys()
    kinds = {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}
    assert infer_diffusers_model_type(keys) == kinds[kind]


# LoRAs.

#: kohya's sd-scripts adapt these: all of attention's and the feed-forward's linear layers, the
#: projections around them and, where asked, convolutions and the text encoder's linear layers.
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2",
               "proj_in", "proj_out"]  # fmt: skip
RESNET_LAYERS = ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv",
                 "upsamplers.0.conv"]  # fmt: skip
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def adapt(model: Any, layers: list[str], rank: int, alpha: float, **options: Any) -> None:
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name and not parameter.is_meta:
            torch.nn.init.normal_(parameter, std=0.3)


def save_adapters(pipeline: Any, folder: Path) -> Path:
    """Save adapters as diffusers' training scripts do; return the file's path."""
    layers = {}
    for name, model in models(pipeline).items():
        if hasattr(model, "peft_config"):
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
            config: Any = model.peft_config
            layers[f"{name}_lora_adapter_metadata"] = config["default"].to_dict()
    pipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def outputs(pipeline: Any) -> Iterator[torch.Tensor]:
    """Compute what the text encoders and the U-Net make of fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (1, MAX_LENGTH), generator=generator)
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            yield getattr(pipeline, name)(ids, output_hidden_states=True).hidden_states[-1]
    width = pipeline.unet.config.cross_attention_dim
    conditions = {
        "text_embeds": torch.randn(1, 20, generator=generator),
        "time_ids": torch.ones(1, 6),
    }
    yield pipeline.unet(
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.tensor([300]),
        torch.randn(1, MAX_LENGTH, width, generator=generator),
        added_cond_kwargs=conditions,
    ).sample


@pytest.mark.parametrize("kind", TINY)
def test_a_lora_file_draws_as_the_lora_did(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    trained = load(folder_of(kind))
    plain = list(outputs(trained))
    torch.manual_seed(2)
    adapt(trained.unet, UNET_LAYERS + RESNET_LAYERS, 4, 6)
    for name, model in models(trained).items():
        if name.startswith("text_encoder"):
            adapt(model, TEXT_LAYERS, 2, 5)
    expected = list(outputs(trained))
    path = write_lora(save_adapters(trained, tmp_path), tmp_path / "kohya.safetensors")

    fresh = load(folder_of(kind))
    fresh.load_lora_weights(str(path), local_files_only=True)
    for before, tuned, actual in zip(plain, expected, outputs(fresh), strict=True):
        assert (tuned - before).abs().max() > 0.1, "the LoRA does something"
        torch.testing.assert_close(actual, tuned, rtol=1e-4, atol=1e-4)


KOHYA = {
    "sd1": """
        lora_unet_down_blocks_0_attentions_0_proj_in
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
        lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn2_to_out_0
        lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj
        lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_2
        lora_unet_up_blocks_3_attentions_2_proj_out
        lora_unet_down_blocks_0_resnets_0_conv1
        lora_unet_down_blocks_0_downsamplers_0_conv
        lora_te_text_model_encoder_layers_0_self_attn_q_proj
        lora_te_text_model_encoder_layers_11_self_attn_out_proj
        lora_te_text_model_encoder_layers_11_mlp_fc1
        """,
    "sdxl": """
        lora_unet_input_blocks_4_1_proj_in
        lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q
        lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0
        lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj
        lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_k
        lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2
        lora_unet_input_blocks_1_0_in_layers_2
        lora_unet_input_blocks_3_0_op
        lora_unet_output_blocks_2_2_conv
        lora_te1_text_model_encoder_layers_0_self_attn_q_proj
        lora_te1_text_model_encoder_layers_11_mlp_fc2
        lora_te2_text_model_encoder_layers_31_self_attn_out_proj
        """,
}
#: How many layers sd-scripts adapt of attention and feed-forward, and of the text encoders.
KOHYA_COUNTS = {"sd1": (192, 72, 0), "sdxl": (722, 72, 192)}


@pytest.mark.parametrize("kind", KOHYA)
def test_names_of_the_released_models_loras(kind: str, tmp_path: Path) -> None:
    lora: dict[str, torch.Tensor] = {}
    plain = set()
    for model, module in released(kind).items():
        if model == "vae":
            continue
        layers = UNET_LAYERS + RESNET_LAYERS if model == "unet" else TEXT_LAYERS
        for name, _ in module.named_modules():
            if name.endswith(tuple(f".{layer}" for layer in layers)):
                lora[f"{model}.{name}.lora_A.weight"] = torch.zeros(1, 1)
                lora[f"{model}.{name}.lora_B.weight"] = torch.zeros(1, 1)
                if not name.endswith(tuple(RESNET_LAYERS)):
                    plain.add(f"{model}.{name}")
    counts = tuple(
        sum(name.startswith(f"{model}.") for name in plain)
        for model in ("unet", "text_encoder", "text_encoder_2")
    )
    assert counts == KOHYA_COUNTS[kind]
    keys = load_file(write_lora(lora, tmp_path / "kohya.safetensors")).keys()
    for name in KOHYA[kind].split():
        assert {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"} <= keys
    assert len(keys) == len(lora) // 2 * 3
    if kind == "sdxl":
        assert not any("_blocks_" in key and "_attentions_" in key for key in keys)


def pair(module: str, rank: int = 4, old: bool = False) -> dict[str, torch.Tensor]:
    ends = ("lora.down", "lora.up") if old else ("lora_A", "lora_B")
    shapes = ((rank, 3), (5, rank))
    return {f"{module}.{e}.weight": torch.randn(s) for e, s in zip(ends, shapes, strict=True)}


def test_alpha_is_the_modules_own(tmp_path: Path) -> None:
    q, k = "unet.mid_block.attentions.0.attn1.to_q", "unet.mid_block.attentions.0.attn1.to_k"
    te = "text_encoder.encoder.layers.0.mlp.fc1"
    lora = pair(q) | pair(k, 8, old=True) | pair(te)
    metadata = {
        "unet.r": 4, "unet.lora_alpha": 6, "unet.rank_pattern": {"attn1.to_k": 8},
        "unet.alpha_pattern": {"attn1.to_k": 24}, "text_encoder.r": 4,
        "text_encoder.lora_alpha": 10, "text_encoder.use_rslora": True,
    }  # fmt: skip
    written = load_file(write_lora(lora, tmp_path / "a", metadata))
    names = {key: key.replace(".", "_").replace("unet", "lora_unet", 1) for key in (q, k)}
    assert written[f"{names[q]}.alpha"] / 4 == 6 / 4
    assert written[f"{names[k]}.alpha"] / 8 == 24 / 8
    fc1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert written[f"{fc1}.alpha"] / 4 == 10 / 4**0.5
    assert torch.equal(written[f"{names[k]}.lora_down.weight"], lora[f"{k}.lora.down.weight"])
    without = load_file(write_lora(lora, tmp_path / "b"))
    assert without[f"{names[k]}.alpha"] == 8, "a scale of 1"


def test_magnitudes_are_one_for_each_output(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    trained = load(folder_of("sd1"))
    adapt(trained.unet, ["to_q", "proj_in"], 2, 2, use_dora=True)
    written = load_file(write_lora(save_adapters(trained, tmp_path), tmp_path / "kohya"))
    block = "lora_unet_down_blocks_0_attentions_0"
    assert written[f"{block}_proj_in.dora_scale"].shape == (8, 1, 1, 1)
    assert written[f"{block}_transformer_blocks_0_attn1_to_q.dora_scale"].shape == (8, 1)


def test_a_transformers_lora_keeps_its_names_and_its_scale(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=4, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=4,
            num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8,
            pooled_projection_dim=8, out_channels=4,
        ).eval()  # fmt: skip

    inputs = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 8), torch.randn(1, 8), torch.tensor([5])
    trained, fresh = model(), model()
    adapt(trained, ["to_q", "to_out.0"], 4, 10)
    lora = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(trained).items()}
    path = write_lora(lora, tmp_path / "lora", {"transformer.r": 4, "transformer.lora_alpha": 10})
    written = load_file(path)
    assert written.keys() == lora.keys()
    with torch.no_grad():
        before = fresh(*inputs).sample
        fresh.load_lora_adapter(written, prefix="transformer")
        tuned, actual = trained(*inputs).sample, fresh(*inputs).sample
    assert (tuned - before).abs().max() > 0.01
    torch.testing.assert_close(actual, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({}, "a LoRA of nothing has no format"),
        (pair("prior.layers.0"), "a LoRA of prior has no format .*; give a LoRA of unet"),
        (
            {"unet.conv_in.lora_B.bias": torch.ones(1)},
            "'unet.conv_in.lora_B.bias' is not a down or up",
        ),
        ({"unet.conv_in.lora_A.weight": torch.ones(1, 1)}, "'unet.conv_in' lacks"),
        (
            pair("unet.down_blocks.0.transformer_blocks.1.attn1.to_q"),
            "'unet.down_blocks.0.transformer_blocks.1.attn1.to_q' has no original name",
        ),
    ],
)
def test_what_is_no_such_lora_is_one_sentence_and_no_file(
    lora: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        write_lora(lora, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


# A run's file, from Python and from a shell.


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def run(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["dreambooth_lib", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def trained(
    tiny_bases: Callable[[str], str], photos: str, make_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> Callable[..., runs.Run]:  # fmt: skip
    def train(family: str, **changes: Any) -> runs.Run:
        fields = {"steps": 2, "resolution": 16, "prior": "none", "learning_rate": 0.05} | changes
        config = make_config(tiny_bases(family), photos).replace(**fields)
        run = runs.start(config, tmp_path / "runs" / "my-dog")
        list(loop.train(run))
        return run

    return train


def test_an_export_that_is_killed_leaves_nothing_that_a_backup_copies(
    trained: Callable[..., runs.Run], shell: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = trained("sd1"), []

    def killed(_run: runs.Run, _step: int, place: Path) -> None:
        (place / "model_index.json").write_text("{}")
        seen.extend(visible_files(run.folder))
        raise SystemExit

    before = visible_files(run.folder)
    monkeypatch.setattr(pipeline_folder, "write_pipeline", killed)
    with pytest.raises(SystemExit):
        shell("export", run.folder)
    assert seen == before


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_shell_writes_a_checkpoint_as_one_file(
    family: str, trained: Callable[..., runs.Run], shell: Callable[..., str], tmp_path: Path
) -> None:
    run = trained(family, checkpoint_every=1)
    message = shell("export", run.folder, "--step", 1, "--out", tmp_path / "dog.safetensors")
    assert (
        message.startswith(f"Wrote {tmp_path / 'dog.safetensors'} (")
        and "models/checkpoints" in message
    )
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["dog.safetensors"]
    last = run.folder / "exports" / "my-dog.safetensors"
    assert str(last) in shell("export", run.folder)
    assert sorted(path.name for path in run.folder.glob("tmp*")) == []
    for step, file in ((1, tmp_path / "dog.safetensors"), (2, last)):
        pipeline_folder.write_pipeline(run, step, tmp_path / f"kept{step}")
        expected = load_file(
            write_checkpoint(tmp_path / f"kept{step}", tmp_path / "one.safetensors")
        )
        actual = load_file(file)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert any((load_file(last)[key] != value).any() for key, value in load_file(
        tmp_path / "dog.safetensors").items()), "another step is another model"  # fmt: skip


@pytest.mark.parametrize(
    ("family", "key"), [("sd1", "lora_unet_"), ("sdxl", "lora_unet_"), ("flux", "transformer.")]
)
def test_a_shell_writes_a_loras_file(
    family: str, key: str, trained: Callable[..., runs.Run], shell: Callable[..., str],
    photos: str, tmp_path: Path,
) -> None:  # fmt: skip
    run = trained(family, method="lora", lora_rank=2, lora_alpha=6, train_token=True,
                  subject=Subject(photos, "dog", "<rex>"))  # fmt: skip
    message = shell("export", run.folder, "--out", tmp_path / "LoRAs")
    assert (
        "models/loras (ComfyUI)" in message and "no place for the trained token '<rex>'" in message
    )
    (file,) = (tmp_path / "LoRAs").iterdir()
    assert file.name == "my-dog.safetensors"
    actual = load_file(file)
    assert actual and all(name.startswith(key) for name in actual)
    expected = write_lora(run.pipeline / "pytorch_lora_weights.safetensors", tmp_path / "lora")
    assert actual.keys() == load_file(expected).keys()
    assert all(torch.equal(actual[name], value) for name, value in load_file(expected).items())


def test_a_shell_says_of_another_familys_whole_model_that_it_has_no_file(
    tiny_bases: Callable[[str], str], photos: str, make_config: Callable[..., TrainConfig],
    shell: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    run = runs.start(make_config(tiny_bases("sd3"), photos), tmp_path / "run")
    with pytest.raises(
        SystemExit, match=r"error: .*sd3' is not a Stable Diffusion 1\.x, 2\.x or XL"
    ):
        shell("export", run.folder, "--out", tmp_path / "out")
    other = runs.start(make_config(tiny_bases("sd1"), photos), tmp_path / "other")
    with pytest.raises(SystemExit, match=r"error: .* has no checkpoint of step 0; it has none"):
        shell("export", other.folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(other.folder.glob("tmp*"))


def test_of_a_dora_and_of_the_embedded_base_it_is_said_what_the_tools_do_not_know(
    make_config: Callable[..., TrainConfig], photos: str, tmp_path: Path
) -> None:
    config = make_config("toybox", photos, method="lora", dora=True)
    run = runs.start(config, tmp_path / "run")
    lora = pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    save_file(lora, tmp_path / "pytorch_lora_weights.safetensors")
    message = comfyui.export(run, tmp_path, tmp_path / "dog.safetensors")
    assert "Neither program can run it" in message and "Copy it" not in message
    assert message.endswith("Both programs reproduce a DoRA only approximately.")
    assert "Neither program can run it" in message and "token" not in message
