"""All that training and sampling need to know of a model family.

Each family is a subclass of :class:`Family`. Nine things differ between families: the names of the
pipeline's parts, the resolution, the noise schedule, the conditioning, the tokens that are read of
a prompt, the latents, the denoiser's call, the layers that LoRA adapts, and the inference settings.
No other code asks which family a base belongs to.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from dreambooth_lib.families.drawing import draw, fast_scheduler
from dreambooth_lib.families.inference_settings import Config, Inference, Names, distilled_by_name
from dreambooth_lib.families.long_prompts import chunks_of, how_to_read_more
from dreambooth_lib.families.noise_schedule import DiscreteNoise, FlowNoise
from dreambooth_lib.families.precision import finite_decoder, without_autocast

if TYPE_CHECKING:
    from PIL import Image

    from dreambooth_lib.families.prompt_cache import PromptCache

#: The most images in a batch while a training is in memory, and the most pixels in all of them.
MAX_BATCH_SIZE, MAX_PIXELS = 8, 2 * 512 * 512

#: Names of the parts that are tokenizers; a pipeline may lack some.
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")

#: Conditioning on prompts: named tensors whose first dimension is the batch.
Cond = dict[str, torch.Tensor]


class Posterior(NamedTuple):
    """The normal distribution of scaled latents of images; both [B, C, h, w]."""

    mean: torch.Tensor
    std: torch.Tensor


class Family:
    """A loaded base: a diffusers pipeline, and how to train and sample with it.

    A subclass names the pipeline's parts in the class variables and defines ``encode_prompts`` and
    ``predict``, and ``native_resolution`` and ``forward_process`` where its bases need other ones.
    """

    denoiser_name: ClassVar[str] = "transformer"
    #: Text encoders that may train, and those that are too large to train.
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    large_encoder_names: ClassVar[tuple[str, ...]] = ()
    #: Whether the pipeline has ``load_textual_inversion``.
    loads_textual_inversion: ClassVar[bool] = True
    #: Half precisions that the bases can compute in.
    half_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    #: Whether the denoiser can compute in float16, by autocast, with bfloat16 weights.
    bf16_weights_ok: ClassVar[bool] = True
    #: How the names of the denoiser's layers end that LoRA may adapt.
    attention_layers: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward_layers: ClassVar[tuple[str, ...]] = ("ff.net.0.proj", "ff.net.2")
    #: Inference settings of a base, where its configs and name do not tell others.
    default_inference: ClassVar[Inference] = Inference(
        steps=50, guidance_scale=5.0, fewest_steps=28, validation_steps=28
    )
    undistilled_base: ClassVar[str] = ""  #: the base to train instead of a distilled one
    #: The dtype in which its bases' model cards draw on a GPU, by torch's name.
    card_dtype: ClassVar[str] = "bfloat16"
    #: What a base's scheduler must have for :meth:`forward_process`.
    scheduler_settings: ClassVar[tuple[str, ...]] = ("shift",)
    #: More arguments for the pipeline's ``from_pretrained``.
    options: ClassVar[dict[str, Any]] = {}
    #: Tokens of a prompt that the pipeline reads by a tokenizer, if not its model_max_length.
    tokens_read: ClassVar[dict[str, int]] = {}
    most_chunks: ClassVar[int] = 1  #: the most chunks that a prompt is read in
    skips_layers: ClassVar[bool] = False  #: whether ``clip_skip`` can be set for some
    #: The pipeline call's arguments for the tensors that ``encode_prompts`` returns.
    pipeline_argument_names: ClassVar[dict[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
    }

    def __init__(self, pipeline: Any, resolution: int | None = None):
        self.pipeline = pipeline
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self.text_encoders = self._parts(self.encoder_names)  #: transformers models
        self.frozen = self._parts(("vae", *self.large_encoder_names))  #: parts that never train
        #: The known prompts, if the text encoders were freed.
        self.prompt_cache: PromptCache | None = None
        self.inference = self.default_inference  #: the base's inference settings
        self.prompt_chunks = 1  #: in how many chunks a prompt is read at most; see ``long_prompts``
        #: Pixels a side of the images; by default the base's native resolution.
        self.resolution = resolution or self.native_resolution(
            dict(self.denoiser.config), dict(pipeline.vae.config)
        )
        self.size = (self.resolution,) * 2  #: width and height of the images that it draws
        for part in self._parts(self.large_encoder_names):
            part.forward = without_autocast(part)
        if pipeline.vae is not None:
            pipeline.vae.decode = finite_decoder(pipeline.vae)
        # Decoding many large images would take more memory than denoising them.
        if self.batch_size_in_training < MAX_BATCH_SIZE:
            pipeline.vae.enable_slicing()

    @property
    def batch_size_in_training(self) -> int:
        """Return how many images to draw, encode or predict at once with a training in memory."""
        return max(1, min(MAX_BATCH_SIZE, MAX_PIXELS // self.resolution**2))

    @property
    def default_batch_size(self) -> int:
        """Return how many images to draw at once with only the model in memory: 8 of 512 x 512."""
        return min(8, 4 * self.batch_size_in_training)

    @property
    def tokenizers(self) -> list[tuple[Any, int]]:
        """Return each text encoder's tokenizer, and how many tokens the pipeline reads by it."""
        tokenizers = {name: getattr(self.pipeline, name, None) for name in TOKENIZERS}
        return self.tokenizer_limits(tokenizers, self.prompt_chunks)

    @classmethod
    def tokenizer_limits(
        cls, tokenizers: Mapping[str, Any], chunks: int = 1
    ) -> list[tuple[Any, int]]:
        """Return the tokenizers of :attr:`tokenizers`, by name, with their limits; skip None."""
        found = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}
        limits = {n: cls.tokens_read.get(n, t.model_max_length) for n, t in found.items()}
        # Each chunk has its own start and end.
        limits = {n: (limit - 2) * chunks + 2 for n, limit in limits.items()}
        return [(tokenizer, limits[name]) for name, tokenizer in found.items()]

    @property
    def how_to_read_more(self) -> str:
        """Return what to do for more of a prompt to be read, "" if nothing can be done."""
        return how_to_read_more(self.most_chunks, self.prompt_chunks)

    @property
    def name(self) -> str:
        """Return the folder or Hub id that the base was loaded from."""
        return self.pipeline.config.get("_name_or_path") or type(self.pipeline).__name__

    def _parts(self, names: Collection[str]) -> list[Any]:
        parts = [getattr(self.pipeline, name, None) for name in names]
        return [part for part in parts if part is not None]

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype | None) -> bool:
        """Return whether the bases can compute in a dtype; None is float32."""
        return dtype in (None, torch.float32, *cls.half_dtypes)

    @classmethod
    def quantized_names(cls) -> tuple[str, ...]:
        """Return the names of the parts to quantize; a base may lack some."""
        return (cls.denoiser_name, *cls.large_encoder_names)

    @classmethod
    def inference_for(
        cls, names: Names, scheduler: Config, denoiser: Config, index: Config
    ) -> Inference:
        """Return a base's inference settings, by its names, two parts' configs and its index."""
        return distilled_by_name(names) or cls.default_inference

    @staticmethod
    def native_resolution(denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
        """Return the pixels a side that a base was trained at, by its parts' configs."""
        return denoiser["sample_size"] * vae_scale(vae)

    @staticmethod
    def size_multiple(denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
        """Return what sides of buckets are a multiple of, by a base's configs: 8, 16, 32 or 64."""
        levels = len(denoiser.get("down_block_types", (None, None)))  # else patches of 2 x 2
        return max(8, vae_scale(vae) * 2 ** (levels - 1))

    @staticmethod
    def least_multiple(denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
        """Return what sides must be a multiple of at least; a U-Net pads its levels itself."""
        return vae_scale(vae) * (1 if "down_block_types" in denoiser else 2)

    def size_conditioning(self, sizes_and_crops: torch.Tensor, shape: tuple[int, int]) -> Cond:
        """Return conditioning on images' sizes and crops; of most bases there is none.

        ``sizes_and_crops`` int64 [B, 4] are height and width of each image as it was, and the top
        and left of its crop once it is scaled to ``shape``, width and height.
        """
        return {}

    def forward_process(self, min_snr_gamma: float | None) -> DiscreteNoise | FlowNoise:
        """Return the forward process that the base was trained with, at this resolution.

        By default rectified flow, on patches of 2 x 2 latents unless the pipeline has a patch size.
        """
        patch = self.pipeline.vae_scale_factor * getattr(self.pipeline, "patch_size", 2)
        patches = (self.resolution // patch) ** 2
        return FlowNoise.of_scheduler(self.pipeline.scheduler, patches, min_snr_gamma)

    def lora_layers(self, feed_forward: bool) -> list[str]:
        """Return how the names of the denoiser's layers end that LoRA adapts."""
        return [*self.attention_layers, *(self.feed_forward_layers if feed_forward else ())]

    @property
    def latent_size(self) -> tuple[int, int]:
        """Return the channels of the latents, and latents a side."""
        vae = self.pipeline.vae.config
        return vae.latent_channels, self.resolution // vae_scale(dict(vae))

    def meta_prompts(self, prompts: list[str]) -> Cond:
        """Return conditioning of the right shape for a base on the meta device."""
        return self.encode_prompts(prompts)

    def encode_images(self, pixels: torch.Tensor) -> Posterior:
        """Encode pixels [B, 3, H, W] in [-1, 1] to latents, scaled as the denoiser expects them."""
        mean, std = self.encode_unscaled(pixels)
        config = self.pipeline.vae.config
        scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        return Posterior((mean - shift) * scale, std * scale)

    @torch.no_grad()
    def encode_unscaled(self, pixels: torch.Tensor) -> Posterior:
        """Encode pixels to the autoencoder's own latents, in float32."""
        vae = self.pipeline.vae
        with torch.autocast(vae.device.type, enabled=False):
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return Posterior(posterior.mean.float(), posterior.std.float())

    def encode_prompts(self, prompts: list[str]) -> Cond:
        """Return the conditioning of prompts, with gradients to the text encoders."""
        raise NotImplementedError

    def reads_in_chunks(self, prompts: list[str]) -> bool:
        """Return whether any of these prompts takes more than one chunk, if that is set."""
        return self.prompt_chunks > 1 and max(chunks_of(self, prompts)) > 1

    def unused_parameters(self) -> Iterable[torch.nn.Parameter]:
        """Return parameters of the text encoders that no conditioning depends on.

        They get no gradient, so that training on several processes must leave them out.
        """
        return ()

    def conditioning(self, prompts: list[str]) -> Cond:
        """Encode prompts, or look them up in the cache if the text encoders were freed."""
        return (self.prompt_cache or self.encode_prompts)(prompts)

    def prompt_arguments(self, prompts: list[str], negative: str = "") -> dict[str, Any]:
        """Return the prompts as arguments of the pipeline's call."""
        if self.prompt_cache is not None or self.reads_in_chunks([*prompts, negative]):
            return self.encoded_arguments(prompts, negative)
        # None, not "": the pipeline chooses what stands for no prompt; SDXL's are zeros.
        away = [negative] * len(prompts) if negative else None
        return {"prompt": prompts, "negative_prompt": away}

    def encoded_arguments(self, prompts: list[str], negative: str) -> dict[str, Any]:
        """Return the prompts as arguments of the pipeline's call, encoded."""
        with torch.no_grad():  # as one batch, to be of one length
            cond = self.conditioning([*prompts, *[negative] * len(prompts)])
        own, away = (
            self.pipeline_arguments({name: value[half] for name, value in cond.items()})
            for half in (slice(len(prompts)), slice(len(prompts), None))
        )
        return own | {f"negative_{name}": value for name, value in away.items()}

    def reads_negative(self, guidance_scale: float) -> bool:
        """Return whether a negative prompt changes what is drawn at a guidance scale."""
        self.pipeline._guidance_scale = guidance_scale  # as its call sets it
        return getattr(self.pipeline, "do_classifier_free_guidance", guidance_scale > 1)

    def pipeline_arguments(self, cond: Cond) -> dict[str, Any]:
        """Return conditioning as arguments of the pipeline's call."""
        return {self.pipeline_argument_names[name]: value for name, value in cond.items()}

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        """Predict the target [B, C, h, w] from noisy latents, timesteps [B] and conditioning."""
        raise NotImplementedError

    def scheduler(self, fast: bool = False) -> Any:
        """Return the sampler that :meth:`generate` draws by, as a diffusers scheduler."""
        return fast_scheduler(self.pipeline.scheduler) if fast else self.pipeline.scheduler

    def generate(
        self,
        prompts_and_seeds: list[tuple[str, int]],
        steps: int,
        guidance_scale: float,
        negative_prompt: str = "",
        *,
        fast: bool = False,
    ) -> list["Image.Image"]:
        """Draw one batch of images, one for each prompt and seed; restore training mode after.

        By the base's own sampler, or if ``fast`` by DPM-Solver++, which needs only
        ``inference.fast_steps``; a base where those are None has only its own. Raises
        :class:`NonFinite` where the base computes NaN or infinity, or an image is all black.
        """
        return draw(self, prompts_and_seeds, steps, guidance_scale, negative_prompt, fast=fast)


def vae_scale(vae: dict[str, Any]) -> int:
    """Return the pixels a side of one latent, by an autoencoder's config."""
    return 2 ** (len(vae["block_out_channels"]) - 1)
