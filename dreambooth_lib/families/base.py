"""What the training loop needs to know of a model family, and no more.

An adapter is a subclass of :class:`Family`; eight things differ between families and are its own:
the names of the pipeline's parts, the resolution, the noise, prompts, latents, the denoiser's call,
what LoRA attaches to, and in how many steps and with what guidance its bases draw. Nothing outside
an adapter asks which family it has.
"""

import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from dreambooth_lib.families.inference_settings import Config, Inference, Names, few_by_name
from dreambooth_lib.families.noise_schedule import DiscreteNoise, FlowNoise
from dreambooth_lib.families.precision import NonFinite, outside_autocast

if TYPE_CHECKING:
    from PIL import Image

    from dreambooth_lib.families.prompt_cache import PromptCache

#: Pictures at once beside all that a training holds, and their pixels in all.
MOST, PIXELS = 8, 2 * 512 * 512

#: Prompt conditioning: named tensors whose first dimension is the batch.
Cond = dict[str, torch.Tensor]


class Posterior(NamedTuple):
    """Scaled latents of pictures as a normal distribution; both [B, C, h, w]."""

    mean: torch.Tensor
    std: torch.Tensor


class Family:
    """One loaded base: a diffusers pipeline, and how its parts are called in training.

    An adapter names the pipeline's parts in the class variables, has ``encode_prompts`` and
    ``predict``, and where its bases differ ``native_resolution`` and ``forward_process``.
    """

    denoiser_name: ClassVar[str] = "transformer"
    #: Text encoders that may train, and those that are too large for it.
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    large_encoder_names: ClassVar[tuple[str, ...]] = ()
    #: Whether the pipeline has ``load_textual_inversion``.
    loads_textual_inversion: ClassVar[bool] = True
    #: Half precisions that the base can compute in.
    half_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    #: Whether the denoiser computes in float16 with bfloat16 weights, by autocast.
    bf16_weights_ok: ClassVar[bool] = True
    #: Ends of the names of the denoiser's layers that LoRA may adapt.
    attention_layers: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward_layers: ClassVar[tuple[str, ...]] = ("ff.net.0.proj", "ff.net.2")
    #: Steps and guidance of a base of which nothing more is known.
    default_inference: ClassVar[Inference] = Inference(
        steps=50, guidance_scale=5.0, fewest_steps=28, validation_steps=28
    )
    #: The base to train in place of a distilled one.
    undistilled_base: ClassVar[str] = ""
    #: The precision that its bases' cards draw in on a GPU, by torch's name.
    card_dtype: ClassVar[str] = "bfloat16"
    #: What the pipeline's ``from_pretrained`` is given besides.
    options: ClassVar[dict[str, Any]] = {}
    #: What the pipeline's call names the tensors that ``encode_prompts`` gives.
    pipeline_argument_names: ClassVar[dict[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
    }

    def __init__(self, pipeline: Any, resolution: int | None = None):
        self.pipeline = pipeline
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self.text_encoders = self._parts(self.encoder_names)  #: transformers models
        #: What never trains.
        self.frozen = self._parts(("vae", *self.large_encoder_names))
        #: The prompts that are known, if the text encoders were let go of.
        self.prompt_cache: PromptCache | None = None
        self.inference = self.default_inference  #: what its base is drawn with
        #: Pixels a side that it is worked with at; the base's own if none is asked for.
        self.resolution = resolution or self.native_resolution(
            dict(self.denoiser.config), dict(pipeline.vae.config)
        )
        if pipeline.vae is not None:
            pipeline.vae.decode = outside_autocast(pipeline.vae)
        if (
            self.batch_size_in_training < MOST
        ):  # decoding many large pictures takes more than drawing them
            pipeline.vae.enable_slicing()

    @property
    def batch_size_in_training(self) -> int:
        """Pictures to draw, encode or predict at once beside all that a training holds."""
        return max(1, min(MOST, PIXELS // self.resolution**2))

    @property
    def default_batch_size(self) -> int:
        """Pictures to draw at once where nothing but the model is in memory: 8 of 512 pixels."""
        return min(8, 4 * self.batch_size_in_training)

    @property
    def name(self) -> str:
        """Where the base was loaded from: a folder or a hub id."""
        return self.pipeline.config.get("_name_or_path") or type(self.pipeline).__name__

    def _parts(self, names: Collection[str]) -> list[Any]:
        parts = [getattr(self.pipeline, name, None) for name in names]
        return [part for part in parts if part is not None]

    @classmethod
    def supports_dtype(cls, half: torch.dtype | None) -> bool:
        """Return whether the base can compute in a precision; None is float32."""
        return half in (None, torch.float32, *cls.half_dtypes)

    @classmethod
    def quantized_names(cls) -> tuple[str, ...]:
        """Return the parts that quantizing concerns, where a base has them."""
        return (cls.denoiser_name, *cls.large_encoder_names)

    @classmethod
    def inference_for(cls, names: Names, scheduler: Config, denoiser: Config) -> Inference:
        """Choose steps and guidance by a base's names and the configs of these two parts."""
        return few_by_name(names) or cls.default_inference

    @staticmethod
    def native_resolution(denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
        """Return the pixels a side that a base was made for, by its parts' configs."""
        return denoiser["sample_size"] * vae_scale(vae)

    def forward_process(self, min_snr_gamma: float | None) -> DiscreteNoise | FlowNoise:
        """Make the noise that the base was trained with, at the resolution in hand.

        That is rectified flow on patches of latents, of two by two if the pipeline says no more.
        """
        patch = self.pipeline.vae_scale_factor * getattr(self.pipeline, "patch_size", 2)
        patches = (self.resolution // patch) ** 2
        return FlowNoise.of_scheduler(self.pipeline.scheduler, patches, min_snr_gamma)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Channels, and latents a side."""
        vae = self.pipeline.vae.config
        return vae.latent_channels, self.resolution // vae_scale(dict(vae))

    def meta_prompts(self, prompts: list[str]) -> Cond:
        """Return conditioning of the right shape where weights have no values."""
        return self.encode_prompts(prompts)

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> Posterior:
        """Encode pixels [B, 3, H, W] in [-1, 1] to latents, scaled as the denoiser expects them."""
        vae = self.pipeline.vae
        with torch.autocast(vae.device.type, enabled=False):
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        return Posterior((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    def encode_prompts(self, prompts: list[str]) -> Cond:
        """Return what the denoiser is told of each prompt, with gradients to the text encoders."""
        raise NotImplementedError

    def unused_parameters(self) -> Iterable[torch.nn.Parameter]:
        """Return parameters of the text encoders that no prompt's conditioning depends on.

        They would get no gradient, for which several processes would wait in vain.
        """
        return ()

    def conditioning(self, prompts: list[str]) -> Cond:
        """Encode prompts, or look known ones up where the text encoders were let go of."""
        return (
            self.encode_prompts(prompts)
            if self.prompt_cache is None
            else self.prompt_cache(prompts)
        )

    def prompt_arguments(self, prompts: list[str], negative: str = "") -> dict[str, Any]:
        """Return what the pipeline's call is told of prompts."""
        if self.prompt_cache is None:
            # None, and not "", for the base's own idea of no prompt: SDXL's is all zeros.
            return {
                "prompt": prompts,
                "negative_prompt": [negative] * len(prompts) if negative else None,
            }
        told = self.pipeline_arguments(self.prompt_cache(prompts))
        without = self.pipeline_arguments(self.prompt_cache([negative] * len(prompts)))
        return told | {f"negative_{name}": value for name, value in without.items()}

    def pipeline_arguments(self, cond: Cond) -> dict[str, Any]:
        """Return prompt conditioning as arguments of the pipeline's call."""
        return {self.pipeline_argument_names[name]: value for name, value in cond.items()}

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        """Predict [B, C, h, w] from noisy latents, timesteps [B] and prompts."""
        raise NotImplementedError

    def generate(
        self,
        wanted: list[tuple[str, int]],
        steps: int,
        guidance_scale: float,
        negative_prompt: str = "",
    ) -> list["Image.Image"]:
        """Draw one batch of (prompt, seed) pairs; training mode is put back as it was.

        Raises :class:`NonFinite` where the base computed NaN or infinity, or a picture is all
        black.
        """
        latents = torch.zeros(())

        def keep_latents(pipeline: Any, step: int, t: Any, tensors: dict[str, Any]) -> Any:
            nonlocal latents
            latents = tensors["latents"]
            return tensors

        modules = [self.denoiser, *self.text_encoders]
        was_training = [module.training for module in modules]
        for module in modules:
            module.eval()
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            with torch.inference_mode():
                images = self.pipeline(
                    **self.prompt_arguments([prompt for prompt, _ in wanted], negative_prompt),
                    generator=[torch.Generator().manual_seed(seed) for _, seed in wanted],
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    height=self.resolution,
                    width=self.resolution,
                    callback_on_step_end=keep_latents,
                    output_type="np",
                ).images
                finite = bool(latents.isfinite().all())
        finally:
            for module, training in zip(modules, was_training, strict=True):
                module.train(training)
        dtype = self.pipeline.vae.dtype
        if not finite:
            part, kind = f"the {self.denoiser_name} or a text encoder", self.denoiser.device.type
            autocast = torch.is_autocast_enabled(kind)  # decides the products' precision
            dtype = torch.get_autocast_dtype(kind) if autocast else self.denoiser.dtype
            raise NonFinite.of(part, self.name, "latents that are not finite", dtype)
        if not math.isfinite(images.sum()):
            raise NonFinite.of("the autoencoder", self.name, "pictures that are not finite", dtype)
        if not images.max((1, 2, 3)).all():
            raise NonFinite.of("the autoencoder", self.name, "a picture that is all black", dtype)
        return self.pipeline.image_processor.numpy_to_pil(images)


def vae_scale(vae: dict[str, Any]) -> int:
    """Return pixels a side for each latent, by an autoencoder's config."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def rows(cond: Cond, index: list[int]) -> Cond:
    """Pick rows of prompt conditioning, in the order of ``index``."""
    return {name: value[index] for name, value in cond.items()}
