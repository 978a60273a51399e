"""Train the U-Net and its text encoder on a bank of encoded composites."""

from collections.abc import Callable, Iterable
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth_lib.families.device_copies import to_device
from dreambooth_lib.families.noise_schedule import DiscreteNoise
from dreambooth_lib.training.checkpoints import load_state, save_state
from dreambooth_lib.training.losses import dreambooth_loss, per_sample_errors
from tools.toybox.autoencoder import to_tensor
from tools.toybox.recipes import BUNDLED, Recipe
from tools.toybox.sources import Pixels
from tools.toybox.tokenizer import MAX_LENGTH
from tools.toybox.training import Way, fit
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


def new_unet(latent_channels: int, recipe: Recipe = BUNDLED) -> UNet2DConditionModel:
    plain, levels = recipe.plain_levels, len(recipe.unet)
    down = ("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * (levels - plain)
    up = ("CrossAttnUpBlock2D",) * (levels - plain) + ("UpBlock2D",) * plain
    return UNet2DConditionModel(
        sample_size=recipe.latent_side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=recipe.unet,
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


class Bank(NamedTuple):
    """float16 latent means [count, C, H, W] of composites, and what each shows."""

    latents: torch.Tensor
    pictures: list[Picture]


@torch.no_grad()
def encode(vae: AutoencoderKL, batches: Iterable[tuple[Pixels, list[Picture]]]) -> Bank:
    latents, pictures = [], []
    for pixels, shown in batches:
        x = to_tensor(pixels).to(vae.device)
        latents.append(vae.encode(x).latent_dist.mean.half())
        pictures += shown
    return Bank(torch.cat(latents), pictures)


def saved_bank(vae: AutoencoderKL, world: World, count: int, folder: Path) -> Bank:
    """Load the bank of an earlier, stopped training in ``folder``, or make a new one there."""
    if not (folder / "state.json").exists():
        rngs = (np.random.default_rng((5, 0, start)) for start in range(0, count, 64))
        latents, pictures = encode(vae, (world.batch(64, rng) for rng in rngs))
        save_state(folder, {"latents": latents, "pictures": [astuple(p) for p in pictures]})
    saved = load_state(folder)
    return Bank(saved["latents"], [Picture(*fields) for fields in saved["pictures"]])


def captions_anew(
    pictures: list[Picture], tokenizer: CLIPTokenizer
) -> Callable[[np.ndarray, np.random.Generator], torch.Tensor]:
    """Return a function that writes a caption of each picture of some rows: token ids [B, length].

    One caption in ten is empty, so that guidance has something to lead away from.
    """

    def token_ids(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        captions = ["" if rng.random() < 0.1 else random_caption(pictures[r], rng) for r in rows]
        return tokenizer(captions, padding="max_length", max_length=MAX_LENGTH,
                         truncation=True, return_tensors="pt").input_ids  # fmt: skip

    return token_ids


def captions_once(
    pictures: list[Picture], tokenizer: CLIPTokenizer, device: str
) -> Callable[[np.ndarray, np.random.Generator], torch.Tensor]:
    """Return the like of :func:`captions_anew` that picks from four captions a picture.

    They are tokenized before the training, which on a GPU would wait for it at every step.
    """
    write = captions_anew(pictures, tokenizer)
    every = np.arange(len(pictures))
    rngs = [np.random.default_rng((14, turn)) for turn in range(4)]
    stored = torch.stack([write(every, rng) for rng in rngs]).to(device)

    def token_ids(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return stored[
            to_device(rng.integers(len(stored), size=len(rows)), stored.device),
            to_device(rows, stored.device),
        ]

    return token_ids


def train(
    bank: Bank,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    folder: Path,
    way: Way,
    recipe: Recipe = BUNDLED,
) -> StableDiffusionPipeline:
    latents, pictures = bank.latents.to(way.device), bank.pictures
    print(f"bank: {len(latents)} latents", flush=True)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"text": new_text_encoder(tokenizer), "unet": new_unet(latents.shape[1], recipe)}
    )
    add_noise = DiscreteNoise.of_scheduler(new_scheduler())
    batch, on_cpu = recipe.batches["diffusion"], way.device == "cpu"
    if on_cpu:
        token_ids = captions_anew(pictures, tokenizer)
    else:
        token_ids = captions_once(pictures, tokenizer, way.device)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((6, step))
        generator = torch.Generator(way.device).manual_seed(step)
        rows = rng.integers(len(latents), size=batch)
        ids = token_ids(rows, rng)
        x_0 = latents[to_device(rows, latents.device)].float()
        noise = torch.randn(x_0.shape, generator=generator, device=way.device)
        # Timesteps are drawn on the CPU.
        t = add_noise.sample_timesteps(
            batch, generator if on_cpu else torch.Generator().manual_seed(step)
        )
        noised = add_noise(x_0, noise, to_device(t, latents.device))
        context = model["text"](ids)[0]
        prediction = model["unet"](noised.x_t, noised.t, context).sample
        errors = per_sample_errors(prediction, noised.target)
        return dreambooth_loss(errors, torch.zeros(batch, dtype=bool), 0.0, noised.weight).total

    fit(model, loss_at, way, peak_lr=1e-3, cooldown=0.7, folder=folder)
    return StableDiffusionPipeline(
        vae=vae.cpu(),
        text_encoder=model["text"].cpu(),
        tokenizer=tokenizer,
        unet=model["unet"].cpu(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
