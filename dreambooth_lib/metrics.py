"""How well a run learned its subject and kept its class, by cosines of picture and text embeddings.

The measures follow DreamBooth's evaluation (arXiv 2208.12242, sections 4.1-4.3): subject fidelity
is CLIP-I or DINO by the encoder that is used, prompt adherence is CLIP-T. Diversity and prior
drift use ``1 - cosine`` of the same encoder in place of the paper's LPIPS and PRES, so they compare
with each other but not with the paper's DIV and PRES. A number means something only beside its
encoder (:attr:`Encoder.model_id`) and the same pictures' count and size.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import torch

#: Pictures or prompts that go through an encoder at once.
BATCH = 64

_IMAGENET_MEAN = [0.485, 0.456, 0.406]
_IMAGENET_STD = [0.229, 0.224, 0.225]


class Encoder:
    """Unit-length embeddings of pictures and prompts by a frozen CLIP, or of pictures by a DINO.

    ``model_id`` is a folder or a hub id in transformers' layout, told apart by its config:

    - ``clip``, such as ``openai/clip-vit-base-patch32``: the projected embeddings (arXiv
      2103.00020), pictures prepared as the model's ``preprocessor_config.json`` says.
    - ``vit``, such as ``facebook/dino-vits16``: the last layer's CLS token after the final norm
      (arXiv 2104.14294), pictures prepared as DINO's own evaluation does: shorter side to 256/224
      of the model's side by bicubic, centre crop, ImageNet's mean and deviation.

    Runs in float32 on ``device``; results are on the CPU. PIL prepares the pictures, torchvision or
    not. Raises ``ValueError`` for a model of another kind, ``OSError`` for one it cannot read.
    """

    model_id: str  #: to name beside every number
    reads_texts: bool  #: whether :meth:`texts` works: True for CLIP, False for DINO

    def __init__(self, model_id: str | Path, device: "str | torch.device" = "cpu") -> None:
        from transformers import AutoConfig

        self.model_id, self.device = str(model_id), device
        try:
            config = AutoConfig.from_pretrained(self.model_id)
            self.reads_texts = config.model_type == "clip"
            if config.model_type in ("clip", "vit"):
                self._load(config)
        except (OSError, ValueError) as error:
            raise OSError(
                f"the encoder '{self.model_id}' cannot be read; give a hub id, or a folder with a "
                "model, its preprocessor_config.json and its tokenizer."
            ) from error
        if config.model_type not in ("clip", "vit"):
            raise ValueError(
                f"the encoder '{self.model_id}' is of type '{config.model_type}'; give a CLIP such "
                "as openai/clip-vit-base-patch32 or a DINO such as facebook/dino-vits16."
            )

    def _load(self, config: Any) -> None:
        import transformers

        # The PIL one has a name of its own in transformers 5; in 4 it is the plain one.
        own = hasattr(transformers, "CLIPImageProcessorPil")
        processor = getattr(transformers, "CLIPImageProcessor" + ("Pil" if own else ""))
        model: Any
        if self.reads_texts:
            model = transformers.CLIPModel.from_pretrained(self.model_id)
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(self.model_id)
            if len(self._tokenizer) < 5:  # transformers 5 makes an empty one up for a lost file
                raise ValueError("there is no tokenizer beside the model; put its files there.")
            self._processor = processor.from_pretrained(self.model_id)
        else:
            model = transformers.ViTModel.from_pretrained(self.model_id, add_pooling_layer=False)
            self._processor = processor(
                size={"shortest_edge": round(config.image_size * 256 / 224)},
                crop_size={"height": config.image_size, "width": config.image_size},
                resample=Image.Resampling.BICUBIC,
                image_mean=_IMAGENET_MEAN,
                image_std=_IMAGENET_STD,
            )
        self._model = model.float().eval().requires_grad_(False).to(self.device)

    def images(self, pictures: list[Image.Image]) -> "torch.Tensor":
        """Embed pictures of any size: float32 ``[N, D]``, unit rows; ``ValueError`` for none."""
        return self._embed(pictures, self._picture_features, "pictures")

    def texts(self, prompts: list[str]) -> "torch.Tensor":
        """Embed prompts: float32 ``[N, D]``, unit rows; ``ValueError`` for none or by a DINO."""
        if not self.reads_texts:
            raise ValueError(
                f"the encoder '{self.model_id}' is a DINO and embeds pictures only; use a CLIP "
                "such as openai/clip-vit-base-patch32 for prompts."
            )
        return self._embed(prompts, self._text_features, "prompts")

    def _embed(self, items: list[Any], features: Callable[..., Any], name: str) -> "torch.Tensor":
        import torch

        if not items:
            raise ValueError(f"there are no {name} to embed; give one or more.")
        with torch.inference_mode():
            batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
            rows = torch.cat([features(batch).cpu() for batch in batches])
        return torch.nn.functional.normalize(rows, dim=-1)  # [N, D]

    # Not CLIPModel.get_..._features: they give a tensor in transformers 4 and an object in 5.

    def _picture_features(self, pictures: list[Image.Image]) -> "torch.Tensor":
        rgb = [picture.convert("RGB") for picture in pictures]
        pixels = self._processor(images=rgb, return_tensors="pt")["pixel_values"].to(self.device)
        if not self.reads_texts:
            return self._model(pixel_values=pixels).last_hidden_state[:, 0]
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return self._model.visual_projection(pooled)

    def _text_features(self, prompts: list[str]) -> "torch.Tensor":
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids, mask = (tokens[k].to(self.device) for k in ("input_ids", "attention_mask"))
        pooled = self._model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return self._model.text_projection(pooled)


def subject_fidelity(generated: "torch.Tensor", reference: "torch.Tensor") -> float:
    """CLIP-I or DINO (arXiv 2208.12242, section 4.2): mean cosine over all N x M pairs.

    ``generated [N, D]``, ``reference [M, D]``; in [-1, 1], higher is closer to the subject.
    Raises ``ValueError`` for empty, non-finite or mismatched embeddings, as all functions here do.
    """
    generated, reference = _units(generated, reference, "generated", "reference")
    return float(generated.mean(0) @ reference.mean(0))


def reference_fidelity(reference: "torch.Tensor") -> float:
    """The ceiling of :func:`subject_fidelity`: mean cosine among the real pictures (Table 1).

    ``reference [M, D]`` without the M self-pairs; in [-1, 1]. Raises ``ValueError`` if M < 2.
    """
    return _mean_among(reference, "reference")


def prompt_adherence(pictures: "torch.Tensor", texts: "torch.Tensor") -> float:
    """CLIP-T (arXiv 2208.12242, section 4.2): mean cosine of each picture with its own prompt.

    ``pictures [N, D]``, ``texts [N, D]`` row by row; in [-1, 1]. ``ValueError`` if counts differ.
    """
    pictures, texts = _units(pictures, texts, "pictures", "texts", by_row=True)
    return float((pictures * texts).sum(-1).mean())


def diversity(pictures: "torch.Tensor") -> float:
    """How much pictures of one prompt differ: mean ``1 - cosine`` over pairs without self-pairs.

    ``pictures [N, D]``; in [0, 2], 0 when all are alike. Raises ``ValueError`` if N < 2.
    """
    return 1 - _mean_among(pictures, "pictures")


def prior_drift(base: "torch.Tensor", tuned: "torch.Tensor") -> float:
    """How far training moved the class: mean ``1 - cosine`` of pictures of one prompt and seed.

    ``base [N, D]``, ``tuned [N, D]`` row by row; in [0, 2], 0 when the class is as it was. PRES's
    question, asked of the base instead of the subject. ``ValueError`` if counts differ.
    """
    base, tuned = _units(base, tuned, "base", "tuned", by_row=True)
    return float(1 - (base * tuned).sum(-1).mean())


def strip_identifier(prompt: str, identifier: str) -> str:
    """``prompt`` without ``identifier`` as a whole word in that case, runs of spaces made one."""
    word = rf"(?<![\w-]){re.escape(identifier)}(?![\w-])"
    return " ".join((re.sub(word, " ", prompt) if identifier else prompt).split())


def evaluate(
    encoder: Encoder,
    reference: list[Image.Image],
    generated: list[Image.Image],
    prompts: list[str],
    class_pictures: list[Image.Image],
    identifier: str,
    base_class_pictures: list[Image.Image] | None = None,
) -> dict[str, float]:
    """Every measure of one tuned model by one encoder.

    ``prompts[i]`` made ``generated[i]``; the identifier is stripped before the text encoder.
    ``class_pictures`` are the tuned model's pictures of one class prompt, and
    ``base_class_pictures`` the base's with the same seeds, in the same order. Gives
    ``subject_fidelity``, ``prompt_adherence`` (not by a DINO), ``class_diversity`` and, with the
    base's, ``prior_drift``. ``ValueError`` for no pictures, unequal counts, one class picture.
    """
    if len(prompts) != len(generated):
        raise ValueError(
            f"there are {len(prompts)} prompts for {len(generated)} generated pictures; give one "
            "prompt a picture, repeated where a prompt made several."
        )
    pictures, of_class = encoder.images(generated), encoder.images(class_pictures)
    scores = {"subject_fidelity": subject_fidelity(pictures, encoder.images(reference))}
    if encoder.reads_texts:
        texts = encoder.texts([strip_identifier(prompt, identifier) for prompt in prompts])
        scores["prompt_adherence"] = prompt_adherence(pictures, texts)
    scores["class_diversity"] = diversity(of_class)
    if base_class_pictures is not None:
        scores["prior_drift"] = prior_drift(encoder.images(base_class_pictures), of_class)
    return scores


def _mean_among(embeddings: "torch.Tensor", name: str) -> float:
    rows = _unit(embeddings, name)
    count, total = len(rows), rows.sum(0)
    if count < 2:
        raise ValueError(f"there is only one row of {name} embeddings; give two or more to pair.")
    return float((total @ total - count) / (count * (count - 1)))  # all pairs less self-pairs


def _units(
    one: "torch.Tensor", other: "torch.Tensor", name: str, other_name: str, by_row: bool = False
) -> "tuple[torch.Tensor, torch.Tensor]":
    one, other = _unit(one, name), _unit(other, other_name)
    if one.shape[1] != other.shape[1] or (by_row and len(one) != len(other)):
        raise ValueError(
            f"the {name} embeddings are {list(one.shape)} and the {other_name} ones "
            f"{list(other.shape)}; embed both with one encoder"
            + (", one row for one row." if by_row else ".")
        )
    return one, other


def _unit(embeddings: "torch.Tensor", name: str) -> "torch.Tensor":
    """Rows of length 1 in float64: ``[N, D]``, N >= 1, finite and not zero."""
    if embeddings.ndim != 2 or embeddings.shape[0] == 0:
        raise ValueError(
            f"the {name} embeddings have shape {list(embeddings.shape)}; give one row or more."
        )
    rows = embeddings.detach().cpu().double()
    length = rows.norm(dim=-1, keepdim=True)
    wrong = (~(length.isfinite() & (length > 0))).flatten().nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"row {wrong[0]} of the {name} embeddings is zero or not finite; leave it out."
        )
    return rows / length
