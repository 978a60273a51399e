"""Measure once, as a photo is decoded, what the checks compare: no pixels need to be kept."""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps


@dataclass(frozen=True, eq=False)
class Traits:
    """Hold what is known of an image besides its pixels."""

    size: tuple[int, int]  #: width and height in pixels
    digest: bytes  #: sha256 of the pixels
    bits: np.ndarray  #: bool [2, 64]: a difference hash, of the image and of its mirror image
    levels: np.ndarray  #: uint8 [2, 192]: an 8x8 colour thumbnail of each
    sharpness: float  #: variance of the Laplacian, in grey levels of 0 to 255
    is_black_and_white: bool  #: nearly all is black or white, as in a mask


def measure(image: Image.Image) -> Traits:
    """Return the traits of an RGB image."""
    hashes = [_hash(image), _hash(ImageOps.mirror(image))]
    bits, levels = (np.stack(parts) for parts in zip(*hashes, strict=True))
    digest = hashlib.sha256(image.tobytes()).digest()
    return Traits(image.size, digest, bits, levels, _sharpness(image), _is_black_and_white(image))


def _hash(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return a difference hash, bool [64], and the levels of a thumbnail, uint8 [192]."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX).convert("RGB"))
    return (grey[:, 1:] > grey[:, :-1]).ravel(), colours.ravel()


def _sharpness(image: Image.Image) -> float:
    scale = min(1.0, 256 / min(image.size))
    width, height = (max(3, round(side * scale)) for side in image.size)
    grey = image.convert("L").resize((width, height), Image.Resampling.LANCZOS)
    g = np.asarray(grey).astype(np.float32)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    return float(laplacian.var())


def _is_black_and_white(image: Image.Image) -> bool:
    sample = np.asarray(image.resize((64, 64), Image.Resampling.NEAREST).convert("RGB"))
    extreme = (sample <= 16).all(-1) | (sample >= 239).all(-1)
    return bool(extreme.mean() > 0.97)
