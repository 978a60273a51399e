"""Preprocess images for a DINOv3, whose processor in transformers needs torchvision."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


class DINOv3Processor:
    """Do what transformers' ``DINOv3ViTImageProcessor`` does, with torch alone.

    It scales to [0, 1] before it resizes, bilinearly with antialiasing, and so never rounds to 8
    bits; a processor that uses PIL cannot give the same. Raises ``ValueError`` for settings of
    another kind.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        size = settings["size"]
        self._size = (int(size["height"]), int(size["width"]))
        self._mean, self._std = (
            torch.tensor(settings[name], dtype=torch.float32).reshape(3, 1, 1)
            for name in ("image_mean", "image_std")
        )
        self._scale = float(settings["rescale_factor"])
        steps = [settings.get(name) for name in ("do_resize", "do_rescale", "do_normalize")]
        is_bilinear = settings.get("resample") == Image.Resampling.BILINEAR
        if not all(steps) or not is_bilinear or settings.get("do_center_crop"):
            raise ValueError("preprocessor_config.json is not a DINOv3's: bilinear, without a crop")

    @classmethod
    def from_pretrained(cls, model_id: str, revision: str) -> "DINOv3Processor":
        from transformers.image_processing_base import ImageProcessingMixin

        settings, _ = ImageProcessingMixin.get_image_processor_dict(model_id, revision=revision)
        return cls(settings)

    def to_dict(self) -> dict[str, Any]:
        mean, std = self._mean.flatten().tolist(), self._std.flatten().tolist()
        return {"size": self._size, "scale": self._scale, "image_mean": mean, "image_std": std}

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> Any:
        import torch
        from torch.nn.functional import interpolate
        from transformers import BatchFeature

        pixels = []
        for image in images:
            rows = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() * self._scale
            resized = interpolate(rows[None], self._size, mode="bilinear", antialias=True)[0]
            pixels.append((resized - self._mean) / self._std)
        return BatchFeature({"pixel_values": torch.stack(pixels)})
