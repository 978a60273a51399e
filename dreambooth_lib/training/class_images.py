"""Class images for prior preservation: seeded samples of the frozen base.

With ``prior_prompts`` every second image is of one of those instead of the class prompt.

A set's folder is named by a digest of all that its images depend on, which ``manifest.json`` lists.
Another base, prompt or sampler gives another folder; sets are never mixed. ``digests.jsonl`` has
the digest of each image as it was drawn.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dreambooth_lib.core import background
from dreambooth_lib.core.checked_json import append_row, read_rows
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.digests import file_digest
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.files import open_image, replace_file, save_png
from dreambooth_lib.data.images import Photo, listed, read_images
from dreambooth_lib.families import loading
from dreambooth_lib.training.image_sizes import fit_to_photos

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from dreambooth_lib.families.base import Family

_DIGESTS = "digests.jsonl"


class ImageSet(NamedTuple):
    """A set of class images: its folder, and how each of them is drawn."""

    folder: Path
    manifest: str  #: everything that an image depends on, besides its number; JSON
    steps: int
    guidance_scale: float
    fast: bool  #: by DPM-Solver++ instead of the base's own sampler


def draw_class_images(
    config: TrainConfig, family: "Family", folder: Path, rank: int = 0, processes: int = 1
) -> Iterator[Path]:
    """Yield the paths of ``config.class_images`` PNG files, generating those that are missing.

    ``folder`` holds the sets of all runs. Of several processes each generates and yields its own
    part; the set is complete once all have finished. A batch is written while the next one is
    generated, and yielded then. A black image counts as missing: the base overflowed there. So does
    one that has changed since, with a warning. Raises :class:`NonFinite` if the base overflows now.
    """
    from dreambooth_lib.families.prompt_cache import PromptCache

    fit_to_photos(family, config)
    own_set, batch = _image_set(config, family, folder), family.default_batch_size
    manifest_file, text = own_set.folder / "manifest.json", own_set.manifest.encode()
    if rank == 0 and not (manifest_file.is_file() and manifest_file.read_bytes() == text):
        replace_file(manifest_file, text)
    own_paths = _paths(config, own_set.folder)[rank::processes]
    paths = dict(zip(range(config.class_images)[rank::processes], own_paths, strict=True))
    digests = _read_digests(own_set.folder)
    missing = [n for n, path in paths.items() if not _is_drawn(path, digests.get(path.name))]
    if damaged := [paths[number].name for number in missing if paths[number].exists()]:
        warnings.warn(f"class images in {own_set.folder} are damaged or black and are generated "
                      f"again: {listed(damaged)}.", stacklevel=2)  # fmt: skip
    yield from (path for number, path in paths.items() if number not in missing)
    if not missing:
        return
    prompts = family.prompt_cache or PromptCache(family, {*prior_prompts(config), ""})
    writing: Future[list[Path]] | None = None
    try:
        for start in range(0, len(missing), batch):
            numbers = missing[start : start + batch]
            with prompts.used_by(family):
                images = family.generate(
                    [(prompt_of(config, number), config.seed + number) for number in numbers],
                    own_set.steps, own_set.guidance_scale, fast=own_set.fast,
                )  # fmt: skip
            written = writing.result() if writing else []
            writing = background.start(_write, images, [paths[number] for number in numbers])
            yield from written
        if writing:
            yield from writing.result()
    finally:
        if writing:  # nothing goes on after this, whatever has ended the drawing
            writing.exception()


def stored_class_images(config: TrainConfig, folder: Path) -> list[Path]:
    """Return what :func:`draw_class_images` yields if no image is missing, else nothing.

    Reads no weights. Raises as ``load_model`` does.
    """
    from dreambooth_lib.training.trainable import load_meta

    if not folder.is_dir():
        return []
    family = load_meta(config)
    fit_to_photos(family, config)
    own_set = _image_set(config, family, folder)
    digests, paths = _read_digests(own_set.folder), _paths(config, own_set.folder)
    return paths if all(_is_drawn(path, digests.get(path.name)) for path in paths) else []


def _read_digests(folder: Path) -> dict[str | None, str | None]:
    return {row.get("file"): row.get("digest") for row in read_rows(folder / _DIGESTS).rows}


def _write(images: "list[Image.Image]", paths: list[Path]) -> list[Path]:
    for image, path in zip(images, paths, strict=True):
        save_png(image, path)
        append_row(path.parent / _DIGESTS, {"file": path.name, "digest": file_digest(path)})
    return paths


def prepare_class_images(
    config: TrainConfig, family: "Family", accelerator: "Accelerator", folder: Path
) -> list[Photo]:
    """Draw the missing images, each process its part, and return all with their prompts."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    with accelerator.autocast():
        for _ in draw_class_images(config, family, folder, rank, processes):
            pass
    accelerator.wait_for_everyone()
    return read_class_images(config, class_images_folder(config, family, folder))


def read_class_images(config: TrainConfig, folder: Path) -> list[Photo]:
    """Read the images that :func:`draw_class_images` drew; pass over any other file there.

    The captions are their prompts, and those of the class come last.
    """
    photos = read_images(folder, {path.name for path in _paths(config, folder)})
    class_prompt = config.subject.class_prompt
    of_prompts = [replace(p, caption=prompt_of(config, int(Path(p.name).stem))) for p in photos]
    return sorted(of_prompts, key=lambda photo: photo.caption == class_prompt)


def prior_prompts(config: TrainConfig) -> list[str]:
    """Return every prompt whose images a config's prior preserves, that of the class first."""
    return [config.subject.class_prompt, *(config.prior_prompts or ())]


def prompt_of(config: TrainConfig, number: int) -> str:
    """Return the prompt of a class image by its number."""
    if config.prior_prompts is None or number % 2 == 0:
        return config.subject.class_prompt
    return config.prior_prompts[number // 2 % len(config.prior_prompts)]


def _paths(config: TrainConfig, folder: Path) -> list[Path]:
    return [folder / f"{number:05d}.png" for number in range(config.class_images)]


def _is_drawn(path: Path, digest: str | None) -> bool:
    """Return whether an image is there; a killed process may have noted no digest."""
    try:
        if not path.is_file() or digest not in (None, file_digest(path)):
            return False
        return open_image(path).getbbox() is not None  # None where all is black
    except (InputError, OSError):
        return False


def class_images_folder(config: TrainConfig, family: "Family", folder: Path) -> Path:
    """Return the folder of this config's and base's set in ``folder``."""
    return _image_set(config, family, folder).folder


def inference_steps(config: TrainConfig, family: "Family", folder: Path) -> int:
    """Return in how many steps each image of this config's and base's set is drawn."""
    return _image_set(config, family, folder).steps


def _image_set(config: TrainConfig, family: "Family", folder: Path) -> ImageSet:
    """Return this config's and base's set in ``folder``, whether it has images yet or not.

    Unless the config says in how many steps, the fast sampler draws where the base can use it.
    """
    own, scale = family.inference, config.prior_guidance_scale
    scale = own.guidance_scale if scale is None else scale
    fast = config.prior_inference_steps is None and own.fast_steps is not None
    steps = config.prior_inference_steps or own.fast_steps or own.fewest_steps
    text = _manifest(config, family, steps, scale, fast)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return ImageSet(folder / name, text, steps, scale, fast)


def _manifest(
    config: TrainConfig, family: "Family", steps: int, guidance_scale: float, fast: bool
) -> str:
    scheduler = family.scheduler(fast)
    more: dict[str, Any] = {"quantize": config.quantize} if config.quantize else {}
    if family.size != (family.resolution,) * 2:
        more["size"] = family.size
    if config.prior_prompts is not None:
        more["prior_prompts"] = config.prior_prompts
    if config.prompt_chunks > 1:
        more["prompt_chunks"] = config.prompt_chunks
    if config.clip_skip is not None:
        more["clip_skip"] = config.clip_skip
    content = more | {
        "base": config.base,
        "weights": _weights_digest(config),
        "prompt": config.subject.class_prompt,
        "sampler": type(scheduler).__name__,
        "sampler_config": {k: v for k, v in scheduler.config.items() if not k.startswith("_")},
        "inference_steps": steps,
        "guidance_scale": guidance_scale,
        "resolution": family.resolution,
        "seeds": f"{config.seed} + picture number",
    }
    return json.dumps(content, indent=2, sort_keys=True, default=str)


def _weights_digest(config: TrainConfig) -> str:
    """Return a digest of a local base's weights, or a Hub base's commit, with that of its LoRAs."""
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
            digest.update(_file_digest(file, stat.st_size, stat.st_mtime_ns))
        content = digest.hexdigest()
    return content


@cache
def _file_digest(file: Path, size: int, modified: int) -> bytes:
    """Return a file's sha256, cached until its size or modification time changes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
