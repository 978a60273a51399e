"""Train the U-Net and its text encoder on a bank of encoded composites."""

from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth_lib.families.noise_schedule import DiscreteNoise
from dreambooth_lib.training.checkpoints import load_state, save_state
from dreambooth_lib.training.losses import dreambooth_loss, per_sample_errors
from tools.toybox.autoencoder import to_tensor
from tools.toybox.tokenizer import MAX_LENGTH
from tools.toybox.training import fit
from tools.toybox.world import Picture, World, random_caption

TEXT_WIDTH = 192


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet(latent_channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 192),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def encode_bank(
    vae: AutoencoderKL, world: World, count: int, seed: int, batch: int = 64
) -> tuple[torch.Tensor, list[Picture]]:
    """float16 latent means [count, C, 8, 8] of fresh composites, and what each shows."""
    latents, pictures = [], []
    for start in range(0, count, batch):
        pixels, shown = world.batch(batch, np.random.default_rng((5, seed, start)))
        latents.append(vae.encode(to_tensor(pixels)).latent_dist.mean.half())
        pictures += shown
    return torch.cat(latents), pictures


def saved_bank(
    vae: AutoencoderKL, world: World, count: int, folder: Path
) -> tuple[torch.Tensor, list[Picture]]:
    """Load the bank of an earlier, stopped training in ``folder``, or make a new one there."""
    if not (folder / "state.json").exists():
        latents, pictures = encode_bank(vae, world, count, seed=0)
        save_state(folder, {"latents": latents, "pictures": [astuple(p) for p in pictures]})
    saved = load_state(folder)
    return saved["latents"], [Picture(*fields) for fields in saved["pictures"]]


def train(
    world: World,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    work: Path,
    steps: int,
    bank: int,
    batch: int = 48,
) -> StableDiffusionPipeline:
    latents, pictures = saved_bank(vae, world, bank, work / "bank")
    print(f"bank: {len(latents)} latents", flush=True)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"text": new_text_encoder(tokenizer), "unet": new_unet(latents.shape[1])}
    )
    add_noise = DiscreteNoise.of_scheduler(new_scheduler())

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((6, step))
        generator = torch.Generator().manual_seed(step)
        rows = rng.integers(len(latents), size=batch)
        # One caption in ten is empty, so that guidance has something to lead away from.
        captions = ["" if rng.random() < 0.1 else random_caption(pictures[r], rng) for r in rows]
        tokens = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH,
                           truncation=True, return_tensors="pt")  # fmt: skip
        x_0 = latents[rows].float()
        noise = torch.randn(x_0.shape, generator=generator)
        t = add_noise.sample_timesteps(batch, generator)
        noised = add_noise(x_0, noise, t)
        context = model["text"](tokens.input_ids)[0]
        prediction = model["unet"](noised.x_t, noised.t, context).sample
        errors = per_sample_errors(prediction, noised.target)
        return dreambooth_loss(errors, torch.zeros(batch, dtype=bool), 0.0, noised.weight).total

    fit(model, loss_at, steps=steps, peak_lr=1e-3, cooldown=0.7, folder=work / "diffusion")
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model["text"],
        tokenizer=tokenizer,
        unet=model["unet"],
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
