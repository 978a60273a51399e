"""Test how images become latents, where these stay, and what random crops cost."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from drive_faults import Make
from PIL import Image

from dreambooth_lib.core.tensor_cache import read_tensors, write_tensors
from dreambooth_lib.data import decoding, images
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.families import loading
from dreambooth_lib.training import latent_cache
from dreambooth_lib.training.latent_cache import LatentCache
from tools import launches
from tools.launch_counter import on_device


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List which files are decoded; no photo is kept as it is read."""
    names: list[str] = []

    def decode(where: str, *given: Any) -> Image.Image:
        names.append(where)
        return decoding.decode(where, *given)

    monkeypatch.setattr(images, "KEPT_PIXELS", 0)
    monkeypatch.setattr(images, "decode", decode)
    return names


def draw(cache: LatentCache, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([cache.sample([0, 1], generator).x_0 for _ in range(number)])


def test_random_crops_decode_each_photo_once_and_resume_to_the_same_bits(
    tmp_path: Path, tiny_sd1: str, make_config: Make, decoded: list[str]
) -> None:
    for number in range(2):
        gradient = Image.linear_gradient("L").resize((400, 300 + number))
        Image.merge("RGB", [gradient] * 3).save(tmp_path / f"{number}.png")
    photos, family = read_photos(tmp_path), loading.load_model(tiny_sd1)
    config = make_config(tiny_sd1, str(tmp_path), crop="random")
    decoded.clear()
    cache = LatentCache(photos, family, config)
    first = draw(cache, 4)
    assert len(decoded) == 2
    assert torch.equal(first, draw(LatentCache(read_photos(tmp_path), family, config), 4))


def test_latents_scaled_otherwise_are_no_cached_ones(
    tmp_path: Path, tiny_sd1: str, make_config: Make
) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "0.png")
    photos, family = read_photos(tmp_path), loading.load_model(tiny_sd1)
    config, drawn = make_config(tiny_sd1, str(tmp_path), crop="center"), []
    for factor in (0.18215, 0.13025):
        family.pipeline.vae.register_to_config(scaling_factor=factor)
        cache = LatentCache(photos, family, config, tmp_path / "latents")
        drawn.append(cache.posteriors[False].mean)
    assert torch.allclose(drawn[1] / drawn[0], torch.tensor(0.13025 / 0.18215), atol=1e-3)


def test_photos_beyond_what_is_kept_are_decoded_when_drawn(
    tmp_path: Path, tiny_sd1: str, make_config: Make, decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for number in range(2):
        Image.new("RGB", (400, 300), (number, 9, 99)).save(tmp_path / f"{number}.png")
    family = loading.load_model(tiny_sd1)
    side = latent_cache.KEPT_RESOLUTIONS * family.resolution
    monkeypatch.setattr(latent_cache, "KEPT_PIXELS", side * round(side * 4 / 3))
    config = make_config(tiny_sd1, str(tmp_path), crop="random")
    cache = LatentCache(read_photos(tmp_path), family, config)
    decoded.clear()
    draw(cache, 3)
    assert decoded == [f"'1.png' in {tmp_path}"] * 3


def test_photos_that_can_be_cropped_in_one_way_only_are_encoded_once(
    tmp_path: Path, tiny_sd1: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        gradient = Image.linear_gradient("L").rotate(90 * number)
        Image.merge("RGB", [gradient] * 3).save(tmp_path / f"{number}.png")
    family = loading.load_model(tiny_sd1)
    config = make_config(tiny_sd1, str(tmp_path), crop="random", flip=True)
    cache, afresh = (LatentCache(read_photos(tmp_path), family, config) for _ in range(2))
    afresh.posteriors = []  # as where there are other crops
    expected = draw(afresh, 4)
    monkeypatch.setattr(family, "encode_images", lambda pixels: pytest.fail("encoded afresh"))
    torch.testing.assert_close(draw(cache, 4), expected)


@pytest.mark.parametrize("memory", ["standard", "low"])
def test_a_gpu_holds_only_the_latents_and_prompts_of_a_step(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers, follow = list[Any](), launches.follow

    def noting(trainer: Any, during: Any) -> Any:
        trainers.append(trainer)
        return follow(trainer, during)

    monkeypatch.setattr(launches, "follow", noting)
    launches.count({"memory": memory, "flip": True}, tiny=True)
    (trainer,) = trainers
    batches = trainer.batches
    caches = [cache for kinds in batches.by_shape.values() for cache, _ in kinds]
    kept = [part for cache in caches for posterior in cache.posteriors for part in posterior]
    kept += batches.prompt_cache.cond.values()
    assert len(caches) == 2 and len(kept) > 8
    assert not any(map(on_device, kept))
    known = trainer.family.prompt_cache
    assert known is (batches.prompt_cache if memory == "low" else None), "not the same ones twice"


def test_cached_tensors_are_written_without_a_copy_of_them(tmp_path: Path) -> None:
    tensors = {"mean": torch.rand(2**20), "std": torch.rand(2**20).bfloat16()}
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "x.safetensors", tensors)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**20
    read = read_tensors(tmp_path / "x.safetensors", ("mean", "std"))
    assert read is not None and all(torch.equal(read[name], tensors[name]) for name in tensors)
