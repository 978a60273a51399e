"""What the training loop needs to know of a model family, and no more.

An adapter is a subclass of :class:`Family`; eight things differ between families and are its own:
the names of the pipeline's parts, the resolution, the noise, prompts, latents, the denoiser's call,
what LoRA attaches to, and in how many steps and with what guidance its bases draw. Nothing outside
an adapter asks which family it has.
"""

from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from packaging.version import Version

from dreambooth_lib import memory, notices
from dreambooth_lib.families.inference import Inference, few_by_name
from dreambooth_lib.families.precision import (
    NonFinite,
    autoencoder_dtype,
    outside_autocast,
)
from dreambooth_lib.noise import Noised

#: What diffusers calls the precision that a model is loaded in.
DTYPE = "dtype" if Version(version("diffusers")) >= Version("0.40") else "torch_dtype"

#: Pictures at once beside all that a training holds, and their pixels in all.
MOST, PIXELS = 8, 2 * 512 * 512

#: Prompt conditioning: named tensors whose first dimension is the batch.
Cond = dict[str, torch.Tensor]


class Posterior(NamedTuple):
    """Scaled latents of pictures as a normal distribution; both [B, C, h, w]."""

    mean: torch.Tensor
    std: torch.Tensor


class Outline(NamedTuple):
    """What of a base is known without its weights."""

    resolution: int  # pixels a side that the base was made for
    tokenizer: Any


class ForwardProcess(Protocol):
    """See :class:`dreambooth_lib.noise.DiscreteNoise`."""

    def sample_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor: ...

    def timesteps_at(self, quantiles: torch.Tensor) -> torch.Tensor: ...

    def __call__(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Noised: ...


class Family:
    """One loaded base: a diffusers pipeline, and how its parts are called in training.

    An adapter names the pipeline's parts in the class variables, and has ``native_resolution``,
    ``forward_process``, ``encode_prompts`` and ``predict``.
    """

    denoiser_name: ClassVar[str] = "transformer"
    #: Text encoders that may train, and those that are too large for it.
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    large_encoder_names: ClassVar[tuple[str, ...]] = ()
    #: Whether the pipeline has ``load_textual_inversion``.
    loads_words: ClassVar[bool] = True
    #: Half precisions that the base can compute in.
    halves: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    #: Whether the denoiser computes in float16 with bfloat16 weights, by autocast.
    mixes: ClassVar[bool] = True
    #: Ends of the names of the denoiser's layers that LoRA may adapt.
    attention_layers: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward_layers: ClassVar[tuple[str, ...]] = ("ff.net.0.proj", "ff.net.2")
    #: Steps and guidance of a base of which nothing more is known.
    usual: ClassVar[Inference] = Inference(steps=50, guidance_scale=5.0, enough=28, validation=28)
    #: The base to train in place of a distilled one.
    undistilled: ClassVar[str] = ""
    #: The precision that its bases' cards draw in on a GPU, by torch's name.
    card_dtype: ClassVar[str] = "bfloat16"
    #: What the pipeline's ``from_pretrained`` is given besides.
    options: ClassVar[dict[str, Any]] = {}
    #: What the pipeline's call names the tensors that ``encode_prompts`` gives.
    call_names: ClassVar[dict[str, str]] = {
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
        self.known: Known | None = None
        self.inference = self.usual  #: what its base is drawn with
        #: Pixels a side that it is worked with at; the base's own if none is asked for.
        self.resolution = resolution or self.native_resolution(
            dict(self.denoiser.config), dict(pipeline.vae.config)
        )
        if pipeline.vae is not None:
            pipeline.vae.decode = outside_autocast(pipeline.vae)
        if self.at_a_time < MOST:  # decoding many large pictures takes more than drawing them
            pipeline.vae.enable_slicing()

    @property
    def at_a_time(self) -> int:
        """Pictures to draw, encode or predict at once beside all that a training holds."""
        return max(1, min(MOST, PIXELS // self.resolution**2))

    @property
    def name(self) -> str:
        """Where the base was loaded from: a folder or a hub id."""
        return self.pipeline.config.get("_name_or_path") or type(self.pipeline).__name__

    def _parts(self, names: Collection[str]) -> list[Any]:
        parts = [getattr(self.pipeline, name, None) for name in names]
        return [part for part in parts if part is not None]

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        resolution: int | None = None,
        half: torch.dtype = torch.float32,
        whole: Collection[str] = ("denoiser", "text_encoders"),
        master: torch.dtype = torch.float32,
        quantize: str | None = None,
        prompts: Collection[str] | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> "Family":
        """Load on the CPU in ``half``, but the parts that ``whole`` names in ``master``.

        The autoencoder is in float32 where ``half`` is float16, which many overflow.
        ``quantize`` is as in ``TrainConfig``; what it concerns is put on the GPU at once. With
        ``prompts`` the text encoders are loaded first and alone, encode these on ``device`` and
        make room for the rest: no other prompt is known then.
        """
        from diffusers import DiffusionPipeline

        index = DiffusionPipeline.load_config(path, **options)
        dtypes = cls._dtypes(half, whole, master)
        given: dict[str, Any] = {"use_safetensors": True, DTYPE: {"default": half} | dtypes}
        given |= cls.options | options
        known = None
        if prompts is not None:
            rest = dict.fromkeys((cls.denoiser_name, "vae"))
            rest |= cls._quantization(index.keys() - rest, index, quantize, half)
            text = DiffusionPipeline.from_pretrained(path, **(given | rest)).to(device)
            known = Known(cls(text, resolution=1), {*prompts, ""})
            del text
            memory.free()
            encoders = (*cls.encoder_names, *cls.large_encoder_names)
            given |= {name: None for name in encoders if name in index}
        present = index.keys() - {name for name in given if given[name] is None}
        given |= cls._quantization(present, index, quantize, half)
        family = cls(DiffusionPipeline.from_pretrained(path, **given), resolution)
        family.known = known
        return family

    @classmethod
    def _dtypes(
        cls, half: torch.dtype, whole: Collection[str], master: torch.dtype
    ) -> dict[str, torch.dtype]:
        """Map parts that are not in ``half`` to their precision, as :meth:`from_pretrained` has."""
        names = {"denoiser": (cls.denoiser_name,), "text_encoders": cls.encoder_names}
        moved = {name: master for part in whole for name in names[part]}
        return moved | {"vae": autoencoder_dtype(half)}

    @classmethod
    def computes_in(cls, half: torch.dtype | None) -> bool:
        """Return whether the base can compute in a precision; None is float32."""
        return half in (None, torch.float32, *cls.halves)

    @classmethod
    def quantized_names(cls) -> tuple[str, ...]:
        """The parts that quantizing concerns, where a base has them."""
        return (cls.denoiser_name, *cls.large_encoder_names)

    @classmethod
    def _quantization(
        cls, names: Collection[str], index: dict[str, Any], quantize: str | None, half: torch.dtype
    ) -> dict[str, Any]:
        """Describe to the pipeline's ``from_pretrained`` how parts of these names are quantized.

        It is told of none that it does not load, which it would tell the user.
        """
        names = {*names} & {*cls.quantized_names()}
        if quantize is None or not names:
            return {}
        import diffusers
        import transformers

        notices.hide_casts()

        given: dict[str, Any] = {"load_in_8bit": True}
        if quantize == "nf4":
            given = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": half,
                "bnb_4bit_use_double_quant": True,
            }
        kinds = {
            "diffusers": diffusers.BitsAndBytesConfig,
            "transformers": transformers.BitsAndBytesConfig,
        }
        mapping = {
            name: kinds[library](**given)
            for name, (library, kind) in _named_parts(index)
            if name in names and kind is not None
        }
        if not mapping:
            return {}
        return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}

    @classmethod
    def from_configs(
        cls,
        path: str,
        *,
        resolution: int | None = None,
        half: torch.dtype = torch.float32,
        whole: Collection[str] = ("denoiser", "text_encoders"),
        master: torch.dtype = torch.float32,
        quantize: str | None = None,
        **options: Any,
    ) -> "Family":
        """As :meth:`from_pretrained`, without the weights: all are on the meta device.

        What ``quantize`` concerns is in ``half`` here.
        """
        import diffusers
        import transformers

        index = diffusers.DiffusionPipeline.load_config(path, **options)
        dtypes = cls._dtypes(half, whole, master)
        parts: dict[str, Any] = dict(cls.options)
        for name, (library, class_name) in _named_parts(index):
            if name in parts or class_name is None:
                parts[name] = None
                continue
            kind = getattr(diffusers if library == "diffusers" else transformers, class_name)
            if name.startswith(("scheduler", "tokenizer")):
                parts[name] = kind.from_pretrained(path, subfolder=name, **options)
                continue
            given: Any
            if library == "diffusers":
                given, make = kind.load_config(path, subfolder=name, **options), kind.from_config
            else:
                given = kind.config_class.from_pretrained(path, subfolder=name, **options)
                make = kind
            with torch.device("meta"):
                parts[name] = make(given).to(dtypes.get(name, half))
            # Some layers overflow in float16: transformers keeps them whole.
            for module_name, module in parts[name].named_modules():
                if module_name.rpartition(".")[2] in _kept_whole(kind, half):
                    module.to(torch.float32)
        return cls(getattr(diffusers, index["_class_name"])(**parts), resolution)

    @classmethod
    def outline(cls, path: str, **options: Any) -> Outline:
        """What is known without the weights; from the hub, a small download."""
        import transformers
        from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

        # A config is read the same by every class of models.
        index = DiffusionPipeline.load_config(path, **options)
        denoiser = UNet2DConditionModel.load_config(path, subfolder=cls.denoiser_name, **options)
        vae = AutoencoderKL.load_config(path, subfolder="vae", **options)
        tokenizer = getattr(transformers, index["tokenizer"][1]).from_pretrained(
            path, subfolder="tokenizer", **options
        )
        return Outline(cls.native_resolution(denoiser, vae), tokenizer)

    @classmethod
    def inference_for(
        cls, names: Collection[str], scheduler: Mapping[str, Any], denoiser: Mapping[str, Any]
    ) -> Inference:
        """Steps and guidance of a base, by its names and the configs of these two parts."""
        return few_by_name(names) or cls.usual

    @staticmethod
    def native_resolution(denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
        """Pixels a side that a base was made for, by its parts' configs."""
        return denoiser["sample_size"] * vae_scale(vae)

    def forward_process(self, min_snr_gamma: float | None) -> ForwardProcess:
        """The noise that the base was trained with, at the resolution in hand."""
        raise NotImplementedError

    @property
    def latent_size(self) -> tuple[int, int]:
        """Channels, and latents a side."""
        vae = self.pipeline.vae.config
        return vae.latent_channels, self.resolution // vae_scale(dict(vae))

    def blank_prompts(self, prompts: list[str]) -> Cond:
        """Conditioning of the right shape where weights have no values."""
        return self.encode_prompts(prompts)

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> Posterior:
        """Pixels [B, 3, H, W] in [-1, 1] to latents, scaled as the denoiser expects them."""
        vae = self.pipeline.vae
        with torch.autocast(vae.device.type, enabled=False):
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        return Posterior((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    def encode_prompts(self, prompts: list[str]) -> Cond:
        """What the denoiser is told of each prompt, with gradients to the text encoders."""
        raise NotImplementedError

    def without_effect(self) -> Iterable[torch.nn.Parameter]:
        """Parameters of the text encoders that no prompt's conditioning depends on.

        They would get no gradient, for which several processes would wait in vain.
        """
        return ()

    def cond_of(self, prompts: list[str]) -> Cond:
        """As :meth:`encode_prompts`, of known prompts where the text encoders were let go of."""
        return self.encode_prompts(prompts) if self.known is None else self.known(prompts)

    def prompt_arguments(self, prompts: list[str], negative: str = "") -> dict[str, Any]:
        """What the pipeline's call is told of prompts."""
        if self.known is None:
            # None, and not "", for the base's own idea of no prompt: SDXL's is all zeros.
            return {
                "prompt": prompts,
                "negative_prompt": [negative] * len(prompts) if negative else None,
            }
        told = self.call_arguments(self.known(prompts))
        without = self.call_arguments(self.known([negative] * len(prompts)))
        return told | {f"negative_{name}": value for name, value in without.items()}

    def call_arguments(self, cond: Cond) -> dict[str, Any]:
        """Prompt conditioning as arguments of the pipeline's call."""
        return {self.call_names[name]: value for name, value in cond.items()}

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        """The prediction [B, C, h, w] for noisy latents, timesteps [B] and prompts."""
        raise NotImplementedError


def _kept_whole(kind: Any, half: torch.dtype) -> list[str]:
    """Ends of the names of the layers that a class of models keeps in float32."""
    return (getattr(kind, "_keep_in_fp32_modules", None) or []) if half is torch.float16 else []


def _named_parts(index: dict[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    """The parts that a ``model_index.json`` names: library and class of each."""
    return [(name, tuple(value)) for name, value in index.items() if isinstance(value, list)]


def vae_scale(vae: dict[str, Any]) -> int:
    """Pixels a side for each latent, by an autoencoder's config."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def rows(cond: Cond, index: list[int]) -> Cond:
    """Some rows of prompt conditioning, in the order of ``index``."""
    return {name: value[index] for name, value in cond.items()}


class Known:
    """Prompts that were encoded once, looked up from then on.

    Raises :class:`NonFinite` where the text encoders give NaN or infinity.
    """

    def __init__(self, family: Family, prompts: Collection[str]):
        distinct = sorted(set(prompts))
        self.row = {prompt: row for row, prompt in enumerate(distinct)}
        with torch.no_grad():
            self.cond = family.cond_of(distinct)
        for value in self.cond.values():
            if not value.isfinite().all():
                gave = "conditioning that is not finite"
                raise NonFinite.of("a text encoder", family.name, gave, value.dtype)

    def __call__(self, prompts: list[str]) -> Cond:
        """What the denoiser is told of each prompt. Raises KeyError for one that is not known."""
        return rows(self.cond, [self.row[prompt] for prompt in prompts])
