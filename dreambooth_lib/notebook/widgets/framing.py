"""Show and change what training sees of each photo: its crop, and its mask."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ipywidgets import Button, Checkbox, Dropdown, FloatSlider, Text, VBox
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.crops import FOLLOWING, Size, bucket_of, buckets, center_for, write_centers
from dreambooth_lib.data.images import DataError, Photo
from dreambooth_lib.data.masks import read_mask
from dreambooth_lib.data.preprocessing import box_for, resized
from dreambooth_lib.figures import image_grids
from dreambooth_lib.notebook import mask_maker
from dreambooth_lib.notebook.widgets.parts import (
    Panel,
    busy,
    control,
    empty_image,
    show_image,
    with_hints,
)

_THUMBNAIL = 192  # pixels a side of a mask that is shown
_CROPS = {"center crop": "center", "square around the subject": "subject",
          "aspect ratio buckets, which keep most of each photo": "buckets",
          "random square crops": "random"}  # fmt: skip
_WHOLE = -1.0  # in the menu only, which cannot show None: no masks are used
_WEIGHTS = {"the whole photo": _WHOLE, "the subject alone": 0.0,
            "the subject; background at 10%": 0.1}  # fmt: skip


class FramingPanel(Panel):
    """Choose how photos are cropped, move crops, and make masks; closed until it is opened or used.

    It calls ``changed`` to have the photos shown again, and ``reload`` when their files have
    changed. ``changes`` are fields of a config.
    """

    def __init__(
        self,
        config: TrainConfig,
        size_multiple: int,
        changed: Callable[[], Any],
        reload: Callable[[], Any],
    ):
        self._multiple, self._reload = size_multiple, reload
        self._photos: Sequence[Photo] = ()
        self._folder, self._found = Path(), dict[str, Image.Image]()
        weight = _WHOLE if config.background_weight is None else config.background_weight
        weights = _WEIGHTS
        if weight not in weights.values():
            weights = weights | {f"the subject, and the rest at {weight:g}": weight}
        self.crop = control(Dropdown, "crop", options=_CROPS, value=config.crop)
        self.photo = control(Dropdown, "photo to adjust", options=[])
        slider: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.05, "value": 0.5}
        self.across = control(FloatSlider, "left to right", **slider)
        self.down = control(FloatSlider, "top to bottom", **slider)
        self.weight = control(Dropdown, "train on", options=weights, value=weight)
        self.base = control(Checkbox, "background prior", value=config.background_prior)
        self._noun = config.subject.class_noun
        self.words = control(Text, "subject to mask", value=self._noun)
        self.threshold = control(FloatSlider, "threshold", **slider | {
            "min": 0.05, "max": 0.95, "value": mask_maker.THRESHOLD})  # fmt: skip
        self.move = Button(description="Move the crop")
        self.make = Button(description="Make masks", layout={"width": "auto"})
        self.save = Button(description="Save the masks", disabled=True, layout={"width": "auto"})
        self.masks = empty_image()
        hints = {
            self.crop: "nothing important should be cut off; buckets keep most",
            self.photo: "the photo whose crop you move; center and random crops cannot be moved",
            self.across: "the horizontal position of the crop",
            self.down: "the vertical position of the crop",
            self.move: "saves the position in crops.json beside the photos",
            self.weight: "with masks, the model learns less of what is around the subject",
            self.base: "outside the masks, preserve the base's prediction instead of learning the "
            "photo",
            self.words: "what the masks should show, in a word or two",
            self.make: f"downloads {mask_maker.MODEL} once ({mask_maker.DOWNLOAD})",
            self.threshold: "lower it if parts of the subject are missing",
            self.save: "saves NAME-masklabel.png, or replaces the photo's mask; you can edit it",
        }  # fmt: skip
        is_set = self.crop.value != "center" or self.weight.value != _WHOLE
        self.opened = Checkbox(description="Change crops and masks", indent=False, value=is_set)
        self._body = VBox([with_hints(hints), self.masks])
        super().__init__(self.opened, self._body)
        self.on_change(self._open, self.opened)
        self._open()
        self.on_change(changed, self.crop)
        self.on_change(self._show_center, self.photo)
        self.on_change(self._show_masks, self.threshold)
        for button, action in ((self.move, self._move), (self.make, self._make),
                               (self.save, self._save)):  # fmt: skip
            button.on_click(self.callback(action))

    def _open(self) -> None:
        self._body.layout.display = "" if self.opened.value else "none"

    @property
    def changes(self) -> dict[str, Any]:
        """Return the config's fields that are set here."""
        weight = None if self.weight.value == _WHOLE else self.weight.value
        return {
            "crop": self.crop.value,
            "background_weight": weight,
            "background_prior": bool(weight) and self.base.value,
        }

    def shapes(self, photos: Sequence[Photo], resolution: int) -> list[Size]:
        """Return the size that each photo is cropped to."""
        if self.crop.value != "buckets":
            return [(resolution, resolution)] * len(photos)
        sizes = buckets(resolution, self._multiple)
        return [bucket_of(photo.traits.size, sizes) for photo in photos]

    def cropped(self, photos: Sequence[Photo], shapes: Sequence[Size]) -> list[Image.Image]:
        """Return the crops of photos, in the middle where training crops at random."""
        crop = "center" if self.crop.value == "random" else self.crop.value
        shown = []
        for photo, shape in zip(photos, shapes, strict=True):
            size = photo.traits.size
            box = box_for(size, shape, crop, center=center_for(photo, crop))
            shown.append(resized(photo.image, shape, box, size, Image.Resampling.LANCZOS))
        return shown

    def use(self, photos: Sequence[Photo], folder: str | Path, noun: str) -> None:
        """Show these photos, which are in a folder or zip; masks show the noun if nothing else."""
        if self.words.value == self._noun:
            self.words.value = noun
        self._noun = noun
        if photos is self._photos:
            return
        names = [photo.name for photo in photos]
        if [photo.name for photo in self._photos] != names or self._folder != Path(folder):
            self._found = {}
            self._photos, self._folder = photos, Path(folder)
            self.photo.options = names
            self.photo.index = 0 if names else None  # an empty menu stays on None by itself
        self._photos = photos
        self._show_center()
        self._show_masks()

    def _chosen(self) -> Photo:
        return next(photo for photo in self._photos if photo.name == self.photo.value)

    def _show_center(self) -> None:
        if self.photo.value is not None:
            self.across.value, self.down.value = center_for(self._chosen(), FOLLOWING[0])

    def _move(self) -> None:
        if not self._folder.is_dir():
            raise DataError(
                f"crops cannot be saved in {self._folder}, which is not a folder; if it is a zip, "
                "unpack it and use the folder."
            )
        if self.crop.value not in FOLLOWING:
            raise DataError("center and random crops cannot be moved; choose another crop above.")
        moved, center = self._chosen().name, (self.across.value, self.down.value)
        write_centers(self._folder, [
            replace(photo, center=center) if photo.name == moved else photo
            for photo in self._photos
        ])  # fmt: skip
        self._reload()

    def _make(self) -> None:
        with busy(self.make):
            words = self.words.value.strip()
            if not words or not self._photos:
                raise DataError(
                    "there is nothing to mask; choose photos, and name the subject in a word or "
                    "two."
                )
            self._found = mask_maker.find_subject(self._photos, words)
        self._show_masks()

    def _masks(self) -> dict[str, Image.Image]:
        threshold = self.threshold.value
        return {n: mask_maker.at_threshold(found, threshold) for n, found in self._found.items()}

    def _show_masks(self) -> None:
        """Show the masks just made over the photos, or else the photos' own masks."""
        masks: dict[str, Image.Image | None] = {**self._masks()}
        self.save.disabled = not masks
        masks = masks or {photo.name: read_mask(photo) for photo in self._photos}
        shown = [_dimmed(photo, mask) for photo in self._photos if (mask := masks[photo.name])]
        self.masks.layout.display = "none"
        if shown:
            show_image(self.masks, image_grids.grid(shown, 6).save)

    def _save(self) -> None:
        mask_maker.save_masks(self._folder, self._photos, self._masks())
        self._found = {}
        if self.weight.value == _WHOLE:
            self.weight.value = 0.1
        self._reload()


def _dimmed(photo: Photo, mask: Image.Image) -> Image.Image:
    """Return a small photo, its background dark and grey."""
    image = photo.image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    share = np.asarray(mask.resize(image.size)).astype(np.float32)[..., None] / 255
    grey = np.asarray(image.convert("L").convert("RGB")).astype(np.float32) / 3
    levels = share * np.asarray(image) + (1 - share) * grey
    return Image.fromarray(levels.round().astype(np.uint8))
