"""Class images for prior preservation: sampled from the frozen base, seeded, topped up.

A set lies in a folder named by a digest of what made it: ``manifest.json`` says what that was.
Change the base, the prompt or the sampler, and another folder is made; sets are never mixed.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.families import loading

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family


def manifest(config: TrainConfig, family: "Family") -> dict[str, Any]:
    """Everything that a class image depends on, besides its number."""
    scheduler, (steps, guidance_scale) = family.pipeline.scheduler, _drawing(config, family)
    quantized = {"quantize": config.quantize} if config.quantize else {}
    return quantized | {
        "base": config.base,
        "weights": _digest_of_weights(config),
        "prompt": config.subject.class_prompt,
        "sampler": type(scheduler).__name__,
        "sampler_config": {k: v for k, v in scheduler.config.items() if not k.startswith("_")},
        "inference_steps": steps,
        "guidance_scale": guidance_scale,
        "resolution": family.resolution,
        "seeds": f"{config.seed} + picture number",
    }


def draw_class_images(
    config: TrainConfig, family: "Family", folder: Path, rank: int = 0, processes: int = 1
) -> Iterator[Path]:
    """Yield the paths of ``config.class_images`` PNG files, making those that are missing.

    ``folder`` holds the sets of all runs. Of several processes each makes its own share and yields
    only those; all are there once every process is through. A black picture counts as missing: it
    is of a base that overflowed. Raises :class:`NonFinite` where the base does so here.
    """
    from dreambooth_lib.core.files import replace_file, save_png

    place, batch = class_images_folder(config, family, folder), family.default_batch_size
    if rank == 0 and not (place / "manifest.json").exists():
        replace_file(place / "manifest.json", _text(config, family).encode())
    mine = range(config.class_images)[rank::processes]
    paths = {number: place / f"{number:05d}.png" for number in mine}
    missing = [number for number in mine if not _drawn(paths[number])]
    yield from (path for number, path in paths.items() if number not in missing)
    for start in range(0, len(missing), batch):
        numbers = missing[start : start + batch]
        wanted = [(config.subject.class_prompt, config.seed + number) for number in numbers]
        images = family.generate(wanted, *_drawing(config, family))
        for number, image in zip(numbers, images, strict=True):
            save_png(image, paths[number])
            yield paths[number]


def _drawn(path: Path) -> bool:
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.getbbox() is not None  # None where all is black


def _drawing(config: TrainConfig, family: "Family") -> tuple[int, float]:
    """Steps and guidance scale of class images: the config's, or else the base's own."""
    steps, scale, own = config.prior_inference_steps, config.prior_guidance_scale, family.inference
    return steps or own.fewest_steps, own.guidance_scale if scale is None else scale


def class_images_folder(config: TrainConfig, family: "Family", folder: Path) -> Path:
    """Return where in ``folder`` the set lies that this config and base make."""
    return folder / hashlib.sha256(_text(config, family).encode()).hexdigest()[:16]


def _text(config: TrainConfig, family: "Family") -> str:
    return json.dumps(manifest(config, family), indent=2, sort_keys=True, default=str)


def _digest_of_weights(config: TrainConfig) -> str:
    """Return a digest of a local base's weights, or the hub's commit, and of LoRAs on it."""
    base = loading.resolve(config.base, config.revision)
    folders, content = [lora.path for lora in base.loras], ""
    if base.is_local:
        folders.insert(0, base.path)
    else:
        from huggingface_hub import try_to_load_from_cache

        revision = base.hub["revision"]
        cached = try_to_load_from_cache(base.path, "model_index.json", revision=revision)
        content = Path(cached).parent.name if isinstance(cached, str) else str(revision)
    for folder in map(Path, folders):
        digest = hashlib.sha256(content.encode())
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("[!.]*/*.safetensors")]):
            stat = file.stat()
            digest.update(_digest_of(file, stat.st_size, stat.st_mtime_ns))
        content = digest.hexdigest()
    return content


@cache
def _digest_of(file: Path, size: int, modified: int) -> bytes:
    """Return the sha256 of a file, read again only where its size or time is another."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
