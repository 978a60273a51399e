"""Describe photos with a small captioning model, BLIP (arXiv 2201.12086), as captions to edit."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.errors import KitError, one_line
from dreambooth_lib.core.hub_refusals import hub_error, what_to_do
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.threads import one_at_a_time
from dreambooth_lib.data.captions import with_identifier

if TYPE_CHECKING:
    from dreambooth_lib.data.images import Photo

#: The captioner on the Hub, and what a user should know before it is downloaded.
MODEL = "Salesforce/blip-image-captioning-large"
DOWNLOAD = "1.9 GB, BSD-3-Clause licence"

_BEAMS, _NEW_TOKENS = 3, 30


class CaptionerError(KitError, RuntimeError):
    """A captioning model that cannot be loaded."""


def describe(photos: "Iterable[Photo]", subject: Subject, model: str = MODEL) -> dict[str, str]:
    """Return a caption for each photo, by name, such as "a {} dog on the beach".

    The model goes on from "a [class noun]", so that it describes what is around the subject, and
    ``{}`` is put before the noun. ``model`` is a BLIP: a Hub id or a folder. Only safetensors are
    read, and no code of the model's. The model is freed at the end. Raises
    :class:`CaptionerError` where it cannot be loaded.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    blip, tokenizer, processor = _load(model, torch.float16 if device == "cuda" else torch.float32)
    start = tokenizer(f"a {subject.class_noun}", return_tensors="pt").input_ids.to(device)
    captions = {}
    try:
        blip.to(device)
        for photo in photos:
            pixels = processor(images=photo.image, return_tensors="pt").pixel_values
            with torch.inference_mode():
                ids = blip.generate(
                    pixels.to(device, blip.dtype),
                    start,
                    num_beams=_BEAMS,
                    max_new_tokens=_NEW_TOKENS,
                    do_sample=False,
                )
            # The first token is the decoder's start, for which the tokenizer may have a word.
            text = tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
            captions[photo.name] = with_identifier(" ".join(text.split()), subject.class_noun)
    finally:
        del blip
        gpu_memory.free_memory()
    return captions


@one_at_a_time
def _load(model: str, dtype: Any) -> tuple[Any, Any, Any]:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        if config.model_type == "blip":
            blip = transformers.BlipForConditionalGeneration.from_pretrained(
                model, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            processor = transformers.BlipImageProcessorPil.from_pretrained(model)
            return blip.eval(), tokenizer, processor
    except MemoryError:
        raise
    except Exception as error:  # of any kind: the files are a stranger's
        advice = "check the network, or write the captions yourself"
        if hub_error(error):
            advice = what_to_do(error, model, "write the captions yourself")
        raise CaptionerError(
            f"the captioner '{model}' cannot be loaded ({one_line(error)[:200]}); {advice}."
        ) from error
    raise CaptionerError(
        f"the captioner '{model}' is of type '{config.model_type}'; give a BLIP such as {MODEL}."
    )
