"""Train the AutoencoderKL: pictures to latents of zero mean and unit variance, a side an eighth."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D

from tools.toybox.recipes import BUNDLED, Recipe
from tools.toybox.sources import Source
from tools.toybox.training import Way, fit

COUNT = 512  # composites that the latents and activations are measured on
#: What activations stay below on composites: a 32nd of where float16 ends.
LIMIT = 2.0**11


def to_tensor(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def new_autoencoder(recipe: Recipe = BUNDLED) -> AutoencoderKL:
    levels = len(recipe.autoencoder)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.autoencoder,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=recipe.size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def loss_of(model: AutoencoderKL, pictures: torch.Tensor, generator: torch.Generator):
    """Absolute and squared error, the same of the edges, and a small KL term."""
    posterior = model.encode(pictures).latent_dist
    error = model.decode(posterior.sample(generator)).sample.float() - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    reconstruction = error.abs().mean() + 4 * error.square().mean() + edges
    return reconstruction + 2e-7 * posterior.kl().mean()


def train(source: Source, folder: Path, way: Way, recipe: Recipe = BUNDLED) -> AutoencoderKL:
    torch.manual_seed(0)
    model = new_autoencoder(recipe).to(memory_format=torch.channels_last)
    if way.dtype is torch.float16:  # its streams overflow until within_half scales them
        way = replace(way, dtype=torch.float32)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((1, step))
        pictures, _ = source.batch(recipe.batches["autoencoder"], rng)
        return loss_of(model, to_tensor(pictures), torch.Generator(way.device).manual_seed(step))

    fit(model, loss_at, way, peak_lr=1.5e-3, folder=folder, ema_decay=0.997)
    count = min(COUNT, recipe.bank)
    standardize(model, source, count)
    return within_half(without_collapsed(model, source, count), source, count)


def _measured_on(source: Source, count: int) -> tuple[torch.Tensor, ...]:
    """Return batches [64, 3, H, W] of composites; a world's are always the same."""
    pictures, _ = source.batch(count, np.random.default_rng(2))
    return to_tensor(pictures).split(64)


@torch.no_grad()
def standardize(model: AutoencoderKL, source: Source, count: int = COUNT) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions beside it."""
    latents = torch.cat([model.encode(p).latent_dist.mean for p in _measured_on(source, count)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out = model.quant_conv, model.post_quant_conv
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    channels = len(mean)  # the first half gives means, the second log-variances
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def without_collapsed(model: AutoencoderKL, source: Source, count: int = COUNT) -> AutoencoderKL:
    """Return the same autoencoder without the latent channels that the KL term turned into noise.

    Their means say nothing, yet :func:`standardize` blew them up to the size of the others: a
    diffusion model would spend itself on them, and a sampled posterior would drown in them. Each
    1x1 convolution is folded into the convolution beside it, and takes the new width.
    """
    posteriors = [model.encode(p).latent_dist for p in _measured_on(source, count)]
    means = torch.cat([p.mean for p in posteriors])
    noise = torch.cat([p.std for p in posteriors]).mean((0, 2, 3)) / means.std((0, 2, 3))
    live = noise <= noise.min().clamp(min=1.0)  # at least one, however early the training ended
    smaller = AutoencoderKL.from_config({**model.config, "latent_channels": int(live.sum())})
    weights = model.state_dict()
    rows = torch.cat([live, live])  # means, then log-variances
    into, into_bias = weights["quant_conv.weight"][rows, :, 0, 0], weights["quant_conv.bias"][rows]
    out = weights["post_quant_conv.weight"][:, :, 0, 0]
    constant = weights["post_quant_conv.bias"] + out[:, ~live] @ means.mean((0, 2, 3))[~live]
    first, last = weights["decoder.conv_in.weight"], weights["encoder.conv_out.weight"]
    folded = {
        "encoder.conv_out.weight": torch.einsum("oc,cikl->oikl", into, last),
        "encoder.conv_out.bias": into @ weights["encoder.conv_out.bias"] + into_bias,
        "decoder.conv_in.weight": torch.einsum("ockl,ci->oikl", first, out[:, live]),
        "decoder.conv_in.bias": weights["decoder.conv_in.bias"] + first.sum((2, 3)) @ constant,
    }
    for name in ("quant_conv", "post_quant_conv"):
        channels = len(smaller.get_submodule(name).bias)
        folded[f"{name}.weight"] = torch.eye(channels)[:, :, None, None]
        folded[f"{name}.bias"] = torch.zeros(channels)
    smaller.load_state_dict(weights | folded)
    return smaller.to(model.device).eval()


@torch.no_grad()
def within_half(model: AutoencoderKL, source: Source, count: int = COUNT) -> AutoencoderKL:
    """Scale what passes from layer to layer to what float16 holds, in place.

    A residual stream meets no norm on its way, and grows at each convolution that it passes
    through, to hundreds of thousands where float16 ends at 65,504. All that reads it is
    a GroupNorm, to which a power of two means nothing: its eps of 1e-6 stays far below the
    variance. A stream that is within :data:`LIMIT` already stays as it is.
    """
    parts = _measured_on(source, count)
    means = [model.encode(part).latent_dist.mean for part in parts]
    _scale(model.encoder, parts)
    _scale(model.decoder, [model.post_quant_conv(mean) for mean in means])
    model.register_to_config(force_upcast=False)
    return model


class Stretch(NamedTuple):
    """A part of a residual stream that has one scale throughout."""

    first: torch.nn.Conv2d  # all of the stream passes through it
    resnets: list[ResnetBlock2D]  # they add to what it gives


def _scale(half: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    scale = 1.0
    for first, resnets in _stretches(half):
        added = [first.bias, *(one for r in resnets for one in r.conv2.parameters())]
        for weights in added:
            weights /= scale  # as what comes in has been by now
        over = 2.0 ** max(0, math.ceil(math.log2(_peak(half, [first, *resnets], inputs) / LIMIT)))
        for weights in (first.weight, *added):
            weights /= over
        scale *= over


def _peak(
    half: torch.nn.Module, modules: Sequence[torch.nn.Module], inputs: Sequence[torch.Tensor]
) -> float:
    """Most of what ``modules`` give while ``half`` computes ``inputs``."""
    peaks: list[torch.Tensor] = []
    hooks = [m.register_forward_hook(lambda *of: peaks.append(of[2].abs().max())) for m in modules]
    for one in inputs:
        half(one)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(peaks).max())


def _stretches(half: torch.nn.Module) -> list[Stretch]:
    """List those of an encoder or decoder, in order."""
    found = [Stretch(half.conv_in, [])]
    down, up = getattr(half, "down_blocks", ()), getattr(half, "up_blocks", ())
    for block in (*down, half.mid_block, *up):
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                found.append(Stretch(resnet.conv_shortcut, []))
            found[-1].resnets.append(resnet)
        for name in ("downsamplers", "upsamplers"):
            found += [Stretch(sampler.conv, []) for sampler in getattr(block, name, None) or ()]
    return found


@torch.no_grad()
def psnr(model: AutoencoderKL, source: Source, seed: int = 3) -> float:
    """Mean PSNR in dB of reconstructed composites that the training did not draw."""
    pictures, _ = source.batch(COUNT, np.random.default_rng((4, seed)))
    values = []
    for part in to_tensor(pictures).split(64):
        x = part.to(model.device)
        y = model.decode(model.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (x - y).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()
