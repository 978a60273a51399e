"""Make masks of photos with a small segmentation model, CLIPSeg (arXiv 2112.10003), from a word."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.encoder_revisions import revision_of
from dreambooth_lib.core.errors import KitError, one_line
from dreambooth_lib.core.files import save_png
from dreambooth_lib.core.hub_refusals import hub_error, what_to_do
from dreambooth_lib.core.threads import one_at_a_time
from dreambooth_lib.data.images import DataError
from dreambooth_lib.data.masks import SUFFIX
from dreambooth_lib.data.sources import folded

if TYPE_CHECKING:
    from dreambooth_lib.data.images import Photo

#: The model on the Hub, and what a user should know before it is downloaded.
MODEL = "CIDAS/clipseg-rd64-refined"
DOWNLOAD = "0.6 GB, Apache-2.0 licence"
THRESHOLD = 0.4  #: of where the model is surest, above which a pixel is the subject's


class MaskMakerError(KitError, RuntimeError):
    """A segmentation model that cannot be loaded."""


def find_subject(
    photos: "Sequence[Photo]", words: str, model: str = MODEL
) -> dict[str, Image.Image]:
    """Return by name how surely each pixel of a photo is what ``words`` say, as images of mode L.

    White is where the model is surest in that photo. ``model`` is a CLIPSeg: a Hub id or a folder.
    Only safetensors are read, and no code of the model's. Raises :class:`MaskMakerError` where it
    cannot be loaded.
    """
    import torch

    network, processor = _load(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    try:
        network.to(device).eval()
        for photo in photos:
            inputs = processor(text=[words], images=[photo.image], return_tensors="pt")
            with torch.inference_mode():
                logits = network(**inputs.to(device)).logits.float()
            sure = logits.reshape(logits.shape[-2:]).sigmoid()
            levels = (255 * sure / sure.max()).round().byte().cpu().numpy()
            size = photo.traits.size
            found[photo.name] = Image.fromarray(levels).resize(size, Image.Resampling.BILINEAR)
    finally:
        del network
        gpu_memory.free_memory()
    return found


@one_at_a_time
def _load(model: str) -> tuple[Any, Any]:
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    options: dict[str, Any] = {} if Path(model).is_dir() else {"revision": revision_of(model)}
    try:
        network = CLIPSegForImageSegmentation.from_pretrained(
            model, use_safetensors=True, **options
        )
        return network, CLIPSegProcessor.from_pretrained(model, **options)
    except Exception as error:  # of a download or a folder, nearly any kind
        instead = "put masks of your own beside the photos"
        advice = f"check your network, or {instead}"
        if hub_error(error):
            advice = what_to_do(error, model, instead)
        raise MaskMakerError(
            f"the segmentation model {model} cannot be loaded ({one_line(error)}); {advice}."
        ) from error


def at_threshold(found: Image.Image, threshold: float) -> Image.Image:
    """Return a mask, white where :func:`find_subject` is at least as sure as ``threshold``."""
    return found.point(lambda level: 255 * (level >= max(1, round(255 * threshold))))


def save_masks(folder: Path, photos: "Sequence[Photo]", masks: Mapping[str, Image.Image]) -> None:
    """Save masks, by the names of photos in a folder, where these photos' masks are.

    Else they go beside their photos as ``NAME-masklabel.png``. Raises :class:`DataError` before
    anything is written: for photos in a zip, for a mask that is not a PNG, and for photos
    that would share a mask, such as ``a.jpg`` beside ``a.png``.
    """
    if not folder.is_dir():
        raise DataError(
            f"masks cannot be saved in {folder}, which is not a folder; if it is a zip, unpack it "
            "and use the folder."
        )
    places: dict[Path, Image.Image] = {}
    owners: dict[str, str] = {}
    for photo in photos:
        if photo.name not in masks:
            continue
        place, there = folder / f"{Path(photo.name).stem}{SUFFIX}", photo.mask
        if there is not None:  # with a second mask the photos could not be read
            if there.suffix != ".png":
                raise DataError(
                    f"{there}, the mask of '{photo.name}', is not a PNG; save it as PNG instead, "
                    "or remove it."
                )
            place = there.folder / there.name
        other = owners.setdefault(folded(str(place)), photo.name)
        if other != photo.name:
            raise DataError(
                f"'{other}' and '{photo.name}' in {folder} would share the mask {place.name}; "
                "rename one of them."
            )
        places[place] = masks[photo.name]
    for place, mask in places.items():
        save_png(mask, place)
