"""Test masks: how they are found, and how they weigh the loss."""

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drive_faults import Make
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.crops import write_centers
from dreambooth_lib.data.images import DataError, read_photos
from dreambooth_lib.data.masks import read_mask
from dreambooth_lib.evaluation.masks import find_mask
from dreambooth_lib.families import loading
from dreambooth_lib.notebook.drive_copy import copy_photos
from dreambooth_lib.training.batches import Batch
from dreambooth_lib.training.held_out_loss import HeldOutLoss
from dreambooth_lib.training.latent_cache import LatentCache
from dreambooth_lib.training.loop import prior_preservation, train
from dreambooth_lib.training.losses import latent_weights, per_sample_errors
from dreambooth_lib.training.prior_distillation import Teacher
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer

Start = Callable[..., Run]


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def left_half(size: tuple[int, int] = (32, 32)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder of four photos, each with a mask on its left half."""
    place = tmp_path / "masked"
    place.mkdir()
    for number in range(4):
        picture(number).save(place / f"{number}.png")
        left_half().save(place / f"{number}-masklabel.png")
    return place


def subject_of(config: TrainConfig, folder: Path) -> dict[str, Any]:
    return {"subject": replace(config.subject, photos=str(folder))}


@pytest.mark.parametrize("name", ["p-masklabel.png", "p_mask.png", "mask_p.png", "P.matte.webp",
                                  "p.png", "masks/p.png", "Masks/p_mask.png", "p_mask_0.png",
                                  "p (mask).png", "pmask.png", "p-masklabel (1).png",
                                  "p_mask (2).png"])  # fmt: skip
def test_a_mask_is_found_beside_its_photo(name: str, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "p.jpg")
    picture(1).save(tmp_path / "q.jpg")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    left_half().save(tmp_path / name)
    (tmp_path / name).with_suffix(".json").write_text("{}")  # of a program that draws masks
    first, second = read_photos(tmp_path)
    mask = read_mask(first)
    assert mask is not None and mask.getbbox() == (0, 0, 16, 32)
    assert read_mask(second) is None


@pytest.mark.parametrize("first", ["p", "p (3)"])
def test_masks_that_are_numbered_as_their_photos_are_belong_to_these(
    first: str, tmp_path: Path
) -> None:
    names = [first, "p (1)", "p (2)"]
    for number, name in enumerate(names):
        picture(number).save(tmp_path / f"{name}.png")
        mask = name.replace("p", "p-mask", 1)
        left_half().save(tmp_path / f"{mask}.png")
    photos = read_photos(tmp_path)
    assert sorted(photo.name for photo in photos) == sorted(f"{name}.png" for name in names)
    for photo in photos:
        assert photo.mask is not None
        assert photo.mask.name == photo.name.replace("p", "p-mask", 1)


def test_a_backup_has_the_masks_and_the_crops(tmp_path: Path) -> None:
    place = tmp_path / "photos"
    place.mkdir()
    image = picture(0)
    image.putalpha(left_half())
    image.save(place / "a.png")
    for name, size in {"b": (64, 32), "c": (32, 32), "d": (32, 32)}.items():
        picture(1, size).save(place / f"{name}.jpg")
    left_half((32, 16)).save(place / "mask_b.png")
    (place / "masks").mkdir()
    (place / "masks" / "c.png").write_bytes(b"broken")
    write_centers(place, [replace(read_photos(place)[1], center=(0.25, 0.5))])
    copy_photos(place, tmp_path / "copies")
    photos, copies = read_photos(place), read_photos(tmp_path / "copies")
    assert [copy.center for copy in copies] == [None, (0.25, 0.5), None, None]
    for photo, copy in zip(photos[:2], copies, strict=False):
        own, copied = read_mask(photo), read_mask(copy)
        assert own is not None and copied is not None
        assert np.array_equal(np.asarray(own), np.asarray(copied))
    assert read_mask(copies[3]) is None


def test_a_map_is_no_mask_and_a_zip_has_masks_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name, image in {"p.png": picture(0), "p-depth.png": left_half(),
                            "q.png": picture(1), "q_mask.png": left_half()}.items():  # fmt: skip
            image.save(tmp_path / name)
            archive.write(tmp_path / name, name)
    first, second = read_photos(tmp_path / "photos.zip")
    assert read_mask(first) is None and read_mask(second) is not None


@pytest.mark.parametrize(
    ("photos", "masks"),
    [("", "Masks/"), ("dog/", "dog/Masks/"), ("photos/", "masks/"), ("dog/photos/", "dog/masks/")],
)
def test_a_zip_has_a_folder_of_masks_as_a_folder_does(
    photos: str, masks: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for place, image in {photos: picture(0), masks: left_half()}.items():
            image.save(tmp_path / "image.png")
            archive.write(tmp_path / "image.png", f"{place}p.png")
    (photo,) = read_photos(tmp_path / "photos.zip")
    mask = read_mask(photo)
    assert mask is not None and mask.getbbox() == (0, 0, 16, 32)
    with zipfile.ZipFile(tmp_path / "masks.zip", "w") as archive:
        archive.write(tmp_path / "image.png", "masks/p.png")
    assert len(read_photos(tmp_path / "masks.zip")) == 1, "whose photos are of masks"


def test_an_alpha_channel_is_the_mask_upright(tmp_path: Path) -> None:
    image = picture(0, (32, 24))
    image.putalpha(left_half((32, 24)))
    exif = Image.Exif()
    exif[0x112] = 3  # upside down
    image.save(tmp_path / "p.png", exif=exif)
    (photo,) = read_photos(tmp_path)
    mask = read_mask(photo)
    assert mask is not None and mask.getbbox() == (16, 0, 32, 24)


@pytest.mark.parametrize("kind", ["white on transparent", "cut-out"])
def test_a_transparent_masks_alpha_is_the_mask(kind: str, tmp_path: Path) -> None:
    picture(0, (32, 24)).save(tmp_path / "p.png")
    shown = Image.new("RGB", (32, 24), "white") if kind[0] == "w" else picture(0, (32, 24))
    shown.putalpha(left_half((32, 24)))
    shown.save(tmp_path / "p-masklabel.png")
    (photo,) = read_photos(tmp_path)
    mask = read_mask(photo)
    assert mask is not None and mask.getbbox() == (0, 0, 16, 24) and mask.getextrema()[1] == 255


@pytest.mark.parametrize("kind", ["plain", "white on transparent", "dark cut-out on white"])
def test_training_and_evaluation_read_a_mask_alike(kind: str, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "p.png")
    mask = left_half()
    if kind != "plain":
        mask = Image.new("RGB", (32, 32), "white")
        if kind.startswith("dark"):
            mask.paste("black", (0, 0, 16, 32))
        mask.putalpha(left_half())
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "p.png")
    (photo,) = read_photos(tmp_path)
    for found in (read_mask(photo), find_mask(tmp_path / "p.png")):
        assert found is not None and found.tobytes() == left_half().tobytes()


def test_a_mask_of_zeros_and_ones_is_refused(tmp_path: Path) -> None:
    picture(0, (32, 24)).save(tmp_path / "p.png")
    left_half((32, 24)).point(lambda level: level // 255).save(tmp_path / "p-masklabel.png")
    (photo,) = read_photos(tmp_path)
    with pytest.raises(
        DataError, match=r"p-masklabel.png.* is almost black \(its brightest pixel is 1\)"
    ):
        read_mask(photo)
    (tmp_path / "masks").mkdir()
    shutil.copy(tmp_path / "p-masklabel.png", tmp_path / "masks" / "p.png")
    with pytest.raises(DataError, match="almost black"):
        find_mask(tmp_path / "p.png")


def test_a_mask_is_scaled_to_its_photo_but_never_bent(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "p.jpg")
    left_half((64, 64)).save(tmp_path / "p_mask.png")
    (photo,) = read_photos(tmp_path)
    mask = read_mask(photo)
    assert mask is not None and mask.size == (32, 32)
    left_half((64, 32)).save(tmp_path / "p_mask.png")
    (photo,) = read_photos(tmp_path)
    with pytest.raises(DataError, match="64 x 32 pixels, and its photo 32 x 32; make the mask"):
        read_mask(photo)
    left_half((64, 32)).save(tmp_path / "mask_p.png")
    with pytest.raises(DataError, match=r"are both masks of 'p\.jpg'; keep one"):
        read_photos(tmp_path)


def test_weights_by_hand_have_a_mean_of_one() -> None:
    coverage = torch.tensor([1.0, 0.5, 0, 0]).view(1, 1, 2, 2)
    weights = latent_weights(coverage, 0.2)
    assert weights is not None
    expected = torch.tensor([1.0, 0.6, 0.2, 0.2]) / 0.5
    torch.testing.assert_close(weights.flatten(), expected)
    errors = torch.tensor([2.0, 1, 0, 0]).view(1, 1, 2, 2)
    of_all = per_sample_errors(errors, torch.zeros_like(errors), weights)
    assert of_all.item() == pytest.approx((2 * 4 + 1.2 * 1) / 4)
    assert latent_weights(coverage, None) is None and latent_weights(None, 0.2) is None


def test_a_small_subjects_error_is_of_the_size_of_a_whole_photos() -> None:
    small = torch.zeros(1, 1, 8, 8)
    small[0, 0, 2:4, 2:4] = 1
    error = torch.full((1, 4, 8, 8), 3.0)
    weighted = per_sample_errors(error, error * 0, latent_weights(small, 0.0))
    assert weighted.item() == per_sample_errors(error, error * 0).item() == 9.0


def test_the_loss_has_no_gradient_outside_the_subject(
    start_run: Start, folder: Path, make_config: Make, tiny_sd1: str
) -> None:
    photos = subject_of(make_config(tiny_sd1, "."), folder)
    trainer = Trainer(start_run("run", "sd1", background_weight=0.0, **photos))
    (batch,) = trainer.micro_batches()
    prediction = torch.zeros_like(batch.noised.target).requires_grad_()
    prior_preservation(prediction, batch, trainer.config).total.backward()
    gradient = prediction.grad
    assert gradient is not None and batch.coverage is not None
    instance, prior = gradient[~batch.is_prior], gradient[batch.is_prior]
    assert instance[..., 4:].abs().max() == 0 and (instance[..., :4] != 0).all()
    assert (prior != 0).all()


def test_flips_and_random_crops_take_the_mask_along(
    tmp_path: Path, make_config: Make, tiny_sd1: str
) -> None:
    picture(0, (64, 32)).save(tmp_path / "p.png")
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "p_mask.png")
    family, photos = loading.load_model(tiny_sd1), read_photos(tmp_path)
    config = make_config(tiny_sd1, str(tmp_path), background_weight=0.1, flip=True)
    cut = r"the mask of p.png shows nothing in its crop; set crop to 'subject'"
    with pytest.raises(DataError, match=cut):
        LatentCache(photos, family, config, masked=True)
    cache = LatentCache(photos, family, config.replace(crop="subject"), masked=True)
    plain, flipped = cache.coverages
    assert torch.equal(plain[0, 0, 0], torch.tensor([1.0] * 4 + [0] * 4))
    assert torch.equal(plain.flip(-1), flipped)
    random = LatentCache(photos, family, config.replace(crop="random"), masked=True)
    generator = torch.Generator().manual_seed(0)
    drawn = [random.sample([0], generator).coverage for _ in range(20)]
    shares = {part.mean().item() for part in drawn if part is not None}
    assert len(shares) > 3 and max(shares) <= 0.5


def test_without_any_mask_the_field_is_refused_and_with_few_it_warns(
    start_run: Start, folder: Path, make_config: Make, tiny_sd1: str
) -> None:
    photos = subject_of(make_config(tiny_sd1, "."), folder)
    (folder / "2-masklabel.png").unlink()
    with pytest.warns(UserWarning, match=r"1 of 4 photos have no mask, such as 2.png"):
        trainer = Trainer(start_run("few", "sd1", background_weight=0.0, **photos))
    coverage = trainer.batches.by_shape[16, 16][0][0].coverages[0]
    assert coverage.mean((1, 2, 3)).tolist() == [0.5, 0.5, 1, 0.5]
    for mask in folder.glob("*-masklabel.png"):
        mask.unlink()
    with pytest.raises(DataError, match="background_weight is set but no photo has a mask"):
        Trainer(start_run("none", "sd1", background_weight=0.0, **photos))


@pytest.mark.parametrize("prior", ["generated", "distilled", "none"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_backgrounds_prior_has_the_gradient_of_two_errors(
    method: str, prior: str, start_run: Start, folder: Path, make_config: Make, tiny_sd1: str
) -> None:
    photos = subject_of(make_config(tiny_sd1, "."), folder)
    fields = {"background_weight": 0.5, "background_prior": True, "method": method, "prior": prior}
    trainer = Trainer(start_run("run", "sd1", **fields, **photos))
    batches = trainer.batches
    before: list[Batch] = []
    teacher = batches.teacher
    assert isinstance(teacher, Teacher)
    batches.teacher = lambda batch: (before.append(batch), teacher(batch))[1]  # type: ignore[assignment, func-returns-value, return-value]
    (batch,) = trainer.micro_batches()
    own, m = before[0].noised, batch.coverage
    assert m is not None
    row = ~batch.is_prior
    with torch.no_grad():
        base = loading.load_model(tiny_sd1).predict(
            own.x_t[row], own.t[row], {n: v[row] for n, v in batch.cond.items()}
        )
    prediction = torch.randn(own.target.shape).requires_grad_()
    prior_preservation(prediction, batch, trainer.config).instance.backward()
    assert prediction.grad is not None
    gradient = prediction.grad[row]
    weights = m[row] + 0.5 * (1 - m[row])
    two = prediction.detach().clone().requires_grad_()
    squares = m[row] * (two[row] - own.target[row]) ** 2
    squares = squares + 0.5 * (1 - m[row]) * (two[row] - base) ** 2
    (squares / weights.mean((1, 2, 3), keepdim=True)).flatten(1).mean(1).mean().backward()
    assert two.grad is not None
    torch.testing.assert_close(gradient, two.grad[row], rtol=1e-4, atol=1e-6)


def test_masked_training_in_micro_batches_resumes_to_the_same_losses(
    start_run: Start, folder: Path, make_config: Make, tiny_sd1: str
) -> None:
    from dreambooth_lib.training import runs

    photos = subject_of(make_config(tiny_sd1, "."), folder)
    fields = {"background_weight": 0.3, "flip": True, "steps": 3, **photos}
    whole = [step.loss for step in train(start_run("whole", "sd1", **fields))]
    micro = [s.loss for s in train(start_run("micro", "sd1", gradient_accumulation=2, **fields))]
    assert micro == pytest.approx(whole, rel=1e-4)
    run = start_run("broken", "sd1", **fields)
    first = []
    for step in train(run):
        first.append(step.loss)
        break
    rest = [step.loss for step in train(runs.resume(run.folder))]
    assert first + rest == whole


def test_the_held_out_loss_is_of_the_subject_alone(
    start_run: Start, folder: Path, make_config: Make, tiny_sd1: str, clip_folder: Path
) -> None:
    photos = subject_of(make_config(tiny_sd1, "."), folder)
    fields = {"validate_every": 2, "scorer": str(clip_folder), **photos}
    masked = Trainer(start_run("run", "sd1", background_weight=0.0, **fields)).validator
    assert masked is not None
    weights = masked.held_out.weights["subject"]
    assert weights is not None and weights[..., 4:].max() == 0 and weights[..., :4].min() == 2


def test_with_random_crops_a_held_out_photo_is_judged_where_its_mask_is(
    tmp_path: Path, make_config: Make, tiny_sd1: str
) -> None:
    mask = Image.new("L", (64, 16))
    mask.paste(255, (48, 0, 64, 16))
    picture(0, mask.size).save(tmp_path / "p.png")
    mask.save(tmp_path / "p-masklabel.png")
    config = make_config(tiny_sd1, str(tmp_path), crop="random", background_weight=0.0)
    photos = {"subject": read_photos(tmp_path)}
    held_out = HeldOutLoss(config, loading.load_model(tiny_sd1), photos)
    weights = held_out.weights["subject"]
    assert weights is not None and weights.min() == 1
