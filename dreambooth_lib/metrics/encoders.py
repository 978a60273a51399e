"""Embed images and prompts with a frozen model, and cache embeddings by file content."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dreambooth_lib.core.encoder_revisions import revision_of
from dreambooth_lib.core.errors import InputError, KitError, one_line, printable
from dreambooth_lib.core.hub_refusals import hub_error, what_to_do
from dreambooth_lib.core.threads import one_at_a_time

if TYPE_CHECKING:
    import torch

#: Sets of encoders, for likeness and for adherence: those that suit photos best, and those of
#: published tables, arXiv 2208.12242's DINO and the CLIP that open code takes for its.
PHOTOS = ("facebook/dinov2-base", "google/siglip2-base-patch16-224")
PAPER = ("facebook/dino-vits16", "openai/clip-vit-base-patch32")
#: Images or prompts in a batch.
BATCH = 64


class EncoderError(KitError, ValueError):
    """An encoder that cannot be read, or of a type that is not known: what is wrong; what to do."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem, advice)
        self.problem, self.advice = problem, advice

    def __str__(self) -> str:
        return printable(f"{self.problem}; {self.advice}.")


@dataclass(frozen=True)
class Kind:
    """Say how a type of model is read; the names are classes of transformers.

    A model that reads texts embeds by its own ``get_image_features`` and ``get_text_features``. Of
    the others the embedding is the first token after the final norm: the CLS token, or a ConvNeXt's
    mean over the image.
    """

    model: str
    processor: str | None  #: None: :class:`~.dinov3_pixels.DINOv3Processor`
    reads_texts: bool = False


#: By the ``model_type`` in config.json.
KINDS: Mapping[str, Kind] = {
    "clip": Kind("CLIPModel", "CLIPImageProcessorPil", reads_texts=True),
    "siglip": Kind("SiglipModel", "SiglipImageProcessorPil", reads_texts=True),
    "siglip2": Kind("Siglip2Model", "Siglip2ImageProcessorPil", reads_texts=True),
    "vit": Kind("ViTModel", "CLIPImageProcessorPil"),
    "dinov2": Kind("Dinov2Model", "BitImageProcessorPil"),
    "dinov2_with_registers": Kind("Dinov2WithRegistersModel", "BitImageProcessorPil"),
    "dinov3_vit": Kind("DINOv3ViTModel", None),
    "dinov3_convnext": Kind("DINOv3ConvNextModel", None),
}


class Encoder:
    """A frozen model that embeds images and, if it reads texts, prompts.

    ``model_id`` is a folder or a Hub id in transformers' layout, of one of the types in
    :data:`KINDS`: CLIP (arXiv 2103.00020), SigLIP (2303.15343), SigLIP 2 (2502.14786; of a fixed
    size its type is ``siglip``, else ``siglip2``), DINO (``vit``, 2104.14294), DINOv2 (2304.07193)
    and DINOv3 (2508.10104).

    Images are preprocessed as in the model's ``preprocessor_config.json``, by PIL, so that they are
    the same with and without torchvision; of a DINO as in its own evaluation, since its file says
    otherwise: shorter side to 256/224 of the model's resolution by bicubic, center crop, ImageNet's
    mean and standard deviation. Prompts are padded to all of a text encoder's positions, which a
    SigLIP needs.

    Computes in float32 on ``device`` and returns embeddings of unit length on the CPU. Only
    safetensors are read, and no code of the model's. Raises :class:`EncoderError` for a model of
    another type, and for one that cannot be read.
    """

    model_id: str  #: to report with every score
    reads_texts: bool  #: whether :meth:`embed_texts` works: False for all DINOs

    @one_at_a_time
    def __init__(self, model_id: str | Path, device: "str | torch.device" = "cpu") -> None:
        import torch
        from transformers import AutoConfig

        self.model_id, self.device = str(model_id), device
        self._texts: dict[str, torch.Tensor] = {}  # embedded so far
        self._revision = revision_of(self.model_id)
        try:
            config = AutoConfig.from_pretrained(
                self.model_id, revision=self._revision, trust_remote_code=False
            )
            if kind := KINDS.get(config.model_type):
                self.reads_texts = kind.reads_texts
                self._load(config, kind)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except ImportError as error:
            raise EncoderError(
                f"the encoder '{self.model_id}' needs a package that is not installed "
                f"({one_line(error)[:80]}...)",
                "install it, or give another encoder such as google/siglip2-base-patch16-224",
            ) from error
        except Exception as error:  # of any kind: configs are used without a check of their shape
            advice = (
                "give a Hub id, or a folder with a model in safetensors, its "
                "preprocessor_config.json and its tokenizer"
            )
            if hub_error(error):
                advice = what_to_do(error, self.model_id, "give a model's folder")
            raise EncoderError(
                f"the encoder '{self.model_id}' cannot be read ({one_line(error)[:200]})", advice
            ) from error
        if kind is None:
            raise EncoderError(
                f"the encoder '{self.model_id}' is of type '{config.model_type}'",
                "give a CLIP such as openai/clip-vit-base-patch32, a SigLIP such as "
                "google/siglip2-base-patch16-224 or a DINO such as facebook/dinov2-base",
            )

    def _load(self, config: Any, kind: Kind) -> None:
        import transformers
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        from dreambooth_lib.metrics.dinov3_pixels import DINOv3Processor

        model_class = getattr(transformers, kind.model)
        processor: Any = kind.processor and getattr(transformers, kind.processor)
        without = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        model = self._load_model(model_class, **without)
        if self.reads_texts:
            self._tokenizer = self._load_tokenizer(config.model_type)
        if config.model_type == "vit":
            self._processor = processor(
                size={"shortest_edge": round(config.image_size * 256 / 224)},
                crop_size={"height": config.image_size, "width": config.image_size},
                resample=Image.Resampling.BICUBIC,
                image_mean=IMAGENET_DEFAULT_MEAN,
                image_std=IMAGENET_DEFAULT_STD,
            )
        else:
            processor = processor or DINOv3Processor
            self._processor = processor.from_pretrained(self.model_id, revision=self._revision)
        self._processor(images=[Image.new("RGB", (8, 8))])  # raises for settings of no use
        self._model = model.float().eval().requires_grad_(False).to(self.device)

    def _load_tokenizer(self, model_type: str) -> Any:
        import transformers

        # A SigLIP's may be its own, which needs sentencepiece, or Gemma's.
        name = "CLIPTokenizer" if model_type == "clip" else "AutoTokenizer"
        tokenizer = getattr(transformers, name).from_pretrained(
            self.model_id, revision=self._revision, trust_remote_code=False
        )
        if len(tokenizer) < 10:  # transformers 5 makes one without words if a file is missing
            raise ValueError("the model has no tokenizer; add its files to the folder.")
        return tokenizer

    def _load_model(self, model_class: Any, **options: Any) -> Any:
        """Load from safetensors; raise ``ValueError`` where weights are missing, as for random."""
        model, found = model_class.from_pretrained(
            self.model_id,
            use_safetensors=True,
            revision=self._revision,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if missing := sorted(map(str, found["missing_keys"])):
            raise ValueError(f"the model lacks the weight {missing[0]}.")
        return model

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return all that embeddings depend on: id, the weights' sha256 and the preprocessing."""
        digest = hashlib.sha256()
        for weights in self._model.state_dict().values():
            digest.update(weights.cpu().contiguous().numpy())
        settings = self._processor.to_dict()
        return {"model_id": self.model_id, "weights": digest.hexdigest(), "preparation": settings}

    def embed_images(self, images: Sequence[Image.Image]) -> "torch.Tensor":
        """Embed images of any size as float32 ``[N, D]``; raise ``ValueError`` for none."""
        return self._embed(images, self._image_features, "images")

    def embed_texts(self, prompts: list[str]) -> "torch.Tensor":
        """Embed prompts, each once, as float32 ``[N, D]``.

        Raises ``InputError`` for none and for a DINO.
        """
        if not self.reads_texts:
            raise InputError(
                f"the encoder '{self.model_id}' is a DINO, which embeds images only; use a CLIP "
                "such as openai/clip-vit-base-patch32 for prompts."
            )
        import torch

        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new or not prompts:
            self._texts |= zip(new, self._embed(new, self._text_features, "prompts"), strict=True)
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def _embed(
        self, items: Sequence[Any], features: Callable[..., Any], name: str
    ) -> "torch.Tensor":
        import torch

        if not items:
            raise InputError(f"there are no {name} to embed; give one or more.")
        exact = torch.autocast(torch.device(self.device).type, enabled=False)  # under a training's
        with torch.inference_mode(), exact:
            # One at a time: items may be images that are decoded when they are asked for.
            batches = (items[start : start + BATCH] for start in range(0, len(items), BATCH))
            rows = torch.cat([features(batch).cpu() for batch in batches])
        return torch.nn.functional.normalize(rows, dim=-1)  # [N, D]

    def _image_features(self, images: list[Image.Image]) -> "torch.Tensor":
        rgb = [image.convert("RGB") for image in images]
        inputs = self._processor(images=rgb, return_tensors="pt").to(self.device)
        if self.reads_texts:
            return self._model.get_image_features(**inputs).pooler_output
        return self._model(**inputs).last_hidden_state[:, 0]

    def _text_features(self, prompts: list[str]) -> "torch.Tensor":
        length = self._model.config.text_config.max_position_embeddings
        is_clip = self._model.config.model_type == "clip"
        # SigLIPs were trained on lower case, padded on the right, without a mask of the padding.
        prompts = prompts if is_clip else [prompt.lower() for prompt in prompts]
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt",
            padding_side="right", return_attention_mask=is_clip,
        ).to(self.device)  # fmt: skip
        return self._model.get_text_features(**tokens).pooler_output


def embed_files(encoder: Encoder, paths: Sequence[Path], cache: Path) -> "torch.Tensor":
    """Embed image files as float32 ``[N, D]``, one row for each path.

    ``cache`` has a folder for each encoder, with a file for each content; a damaged one is made
    anew. At most ``BATCH`` images are in memory. Raises ``FileNotFoundError`` for a missing file,
    ``InputError`` for no paths.
    """
    import torch

    from dreambooth_lib.core.files import open_image, replace_file
    from dreambooth_lib.core.tensor_cache import read_tensors, write_tensors

    if not paths:
        raise InputError("there are no image files to embed; give one or more.")
    folder = cache / hashlib.sha256(json.dumps(encoder.identity).encode()).hexdigest()[:16]
    if not (folder / "encoder.json").exists():
        replace_file(folder / "encoder.json", json.dumps(encoder.identity, indent=2).encode())
    cached = []
    for path in paths:
        with path.open("rb") as image:
            digest = hashlib.file_digest(image, "sha256").hexdigest()
        cached.append(folder / f"{digest}.safetensors")
    path_of = dict(zip(cached, paths, strict=True))
    rows = {file: read_tensors(file, ("embedding",)) for file in path_of}
    # Complete batches only: an embedding depends a little on the others in its batch.
    files = list(rows)
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        if all(rows[file] for file in batch):
            continue
        embedded = encoder.embed_images([open_image(path_of[file]) for file in batch])
        for file, row in zip(batch, embedded, strict=True):
            if rows[file] is None:
                rows[file] = {"embedding": row}
                write_tensors(file, {"embedding": row})
    return torch.stack([read["embedding"] for file in cached if (read := rows[file])])
