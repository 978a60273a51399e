"""Save tiny random pipelines of each family in diffusers' layout; they draw 16 x 16 pixels."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

WIDTH = 16  # of every text encoder


def _autoencoder(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **({"scaling_factor": 0.7} | config),
    )


def _clip(tokenizer: CLIPTokenizer, kind: type = CLIPTextModelWithProjection) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_act="gelu",
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _words(kind: str, words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, with a chat template if ``kind`` is "chat"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "t5":
        made.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    if kind == "chat":
        tokenizer.chat_template = "{% for m in messages %}a {{ m.content }} photo{% endfor %}"
    return tokenizer


def save_sdxl(folder: Path, clip: CLIPTokenizer, words: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=_autoencoder(force_upcast=False),
        text_encoder=_clip(clip, CLIPTextModel),
        text_encoder_2=_clip(clip),
        tokenizer=clip,
        tokenizer_2=clip,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + WIDTH,
            cross_attention_dim=2 * WIDTH,
            norm_num_groups=4,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    ).save_pretrained(folder)


def save_sd3(folder: Path, clip: CLIPTokenizer, words: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    t5 = _words("t5", words)
    StableDiffusion3Pipeline(
        vae=_autoencoder(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(clip),
        text_encoder_2=_clip(clip),
        text_encoder_3=T5EncoderModel(_t5(len(t5))),
        tokenizer=clip,
        tokenizer_2=clip,
        tokenizer_3=t5,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)


def _t5(vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=vocabulary,
        d_model=2 * WIDTH,
        d_ff=4 * WIDTH,
        d_kv=8,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )


def save_flux(folder: Path, clip: CLIPTokenizer, words: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    t5 = _words("t5", words)
    FluxPipeline(
        vae=_autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(clip, CLIPTextModel),
        text_encoder_2=T5EncoderModel(_t5(len(t5))),
        tokenizer=clip,
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15
        ),
    ).save_pretrained(folder)


def save_flux_2_klein(folder: Path, clip: CLIPTokenizer, words: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    chat = _words("chat", words)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    Flux2KleinPipeline(
        vae=vae,
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(chat),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=28,  # the pipeline reads the outputs of 9, 18 and 27
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                tie_word_embeddings=True,
            )
        ),
        tokenizer=chat,
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15
        ),
    ).save_pretrained(folder)


def save_z_image(folder: Path, clip: CLIPTokenizer, words: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    chat = _words("chat", words)
    ZImagePipeline(
        vae=_autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(chat),
                hidden_size=2 * WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
            )
        ),
        tokenizer=chat,
        transformer=ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=2 * WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    ).save_pretrained(folder)
