"""The loss: one error per sample, then the means of the paper's two terms."""

from typing import NamedTuple

import torch

from dreambooth_lib.core.errors import InputError


class Loss(NamedTuple):
    """Scalars of one batch; ``prior`` is None where the batch has no class images."""

    total: torch.Tensor
    instance: torch.Tensor
    prior: torch.Tensor | None


def per_sample_errors(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return each sample's mean squared error, float32 [B], whatever dtype the denoiser used.

    ``weights`` [B, 1, h, w] are of latents and have a mean of 1; see :func:`latent_weights`.
    """
    squares = (prediction.float() - target.float()).square()
    return (squares if weights is None else weights * squares).flatten(1).mean(1)


def latent_weights(
    coverage: torch.Tensor | None, background_weight: float | None
) -> torch.Tensor | None:
    """Return the weights of latents [B, 1, h, w], whose mean over each sample is 1.

    Of a latent that a mask covers in part, m in ``coverage``, the weight is m + (1 - m) b, divided
    by its mean over the sample. So a masked sample's error is a mean over its subject as a whole
    sample's is over all of it: learning rate, lambda and gradient clipping mean the same, for a
    small subject as for a large one, and micro-batches add up. None without masks. Where b is 0 and
    a random crop has missed the subject all weights are 0.
    """
    if coverage is None or background_weight is None:
        return None
    weights = coverage + (1 - coverage) * background_weight
    return weights / weights.mean((1, 2, 3), keepdim=True).clamp(min=1e-6)


def dreambooth_loss(
    errors: torch.Tensor,
    is_prior: torch.Tensor,
    prior_weight: float,
    weights: torch.Tensor | None = None,
) -> Loss:
    """Return L = mean over instance of w e + lambda * mean over class of w e.

    It is arXiv 2208.12242, eq. 2. ``errors`` float [B]; ``is_prior`` bool [B], true for class
    images, best on the CPU; ``weights`` float [B], or None for ones. Raises ValueError where the
    shapes differ or the batch has no instance image.
    """
    if not errors.shape == is_prior.shape == (weights if weights is not None else errors).shape:
        raise InputError(
            f"errors {list(errors.shape)}, is_prior {list(is_prior.shape)} and weights must all "
            "be [B]; give one value per sample."
        )
    weighted = errors if weights is None else weights * errors
    if is_prior.all():
        raise InputError("the batch has no instance image; it needs at least one.")
    instance = _mean_where(weighted, ~is_prior)
    if not is_prior.any():
        return Loss(instance, instance, None)
    prior = _mean_where(weighted, is_prior)
    return Loss(instance + prior_weight * prior, instance, prior)


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of values [B] where a mask is true; a mask on the CPU is not waited for."""
    chosen = mask.to(values.device, non_blocking=True)
    return torch.where(chosen, values, 0).sum() / chosen.sum()
