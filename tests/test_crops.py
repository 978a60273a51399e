"""Test what of photos of any shape is trained on: buckets, and crops around the subject."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drive_faults import Make
from PIL import Image
from test_masks import picture

from dreambooth_lib.core.checked_json import read_object, write_object
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.digests import write_digests
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.crops import bucket_of, buckets, crop_box, cut_away, write_centers
from dreambooth_lib.data.images import DataError, read_photos, read_source
from dreambooth_lib.data.preprocessing import to_tensor
from dreambooth_lib.data.quality_checks import check_photos
from dreambooth_lib.export import model_card
from dreambooth_lib.families import loading
from dreambooth_lib.training import image_sizes, runs, sampling
from dreambooth_lib.training.latent_cache import LatentCache
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation_record import load_images

Start = Callable[..., Run]
SQUARE, PORTRAIT, LANDSCAPE = (32, 32), (24, 40), (40, 24)


@pytest.fixture
def fields(tmp_path: Path, make_config: Make, tiny_sd1: str) -> dict[str, Any]:
    """Return the fields of a run on three portraits, one landscape and one square."""
    place = tmp_path / "mixed"
    place.mkdir()
    for number, size in enumerate([(24, 40), (26, 40), (48, 30), (24, 40), (32, 32)]):
        picture(number, size).save(place / f"{number}.png")
    subject = replace(make_config(tiny_sd1, ".").subject, photos=str(place))
    return {"subject": subject, "crop": "buckets", "hold_out": False, "resolution": 32}


def test_the_buckets_of_sdxl_are_its_papers() -> None:
    # arXiv 2307.01952, appendix I, without the four that have less area than another as long.
    published = {2048: 512, 1984: 512, 1920: 512, 1856: 512, 1792: 576, 1728: 576, 1664: 576,
                 1600: 640, 1536: 640, 1472: 704, 1408: 704, 1344: 768, 1280: 768, 1216: 832,
                 1152: 896, 1088: 960, 1024: 1024}  # fmt: skip
    sizes = buckets(1024, 32)
    assert {size for size in sizes if size[0] >= size[1]} == {*published.items()}
    assert {(height, width) for width, height in sizes} == {*sizes}


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (768, 16), (64, 16), (520, 8)])
def test_buckets_have_nearly_the_squares_area_and_the_multiple(
    resolution: int, multiple: int
) -> None:
    sizes = buckets(resolution, multiple)
    assert sizes[0] == (resolution, resolution) and len({*sizes}) == len(sizes)
    for width, height in sizes[1:]:
        assert width % multiple == height % multiple == 0
        assert width * height <= resolution**2 and max(width, height) <= 4 * min(width, height)


@pytest.mark.parametrize(("size", "bucket"), [
    ((3000, 4000), (896, 1152)), ((4000, 3000), (1152, 896)), ((1080, 1920), (768, 1344)),
    ((2000, 3000), (832, 1216)), ((999, 1000), (1024, 1024)), ((100, 9000), (512, 2048)),
])  # fmt: skip
def test_a_photo_goes_where_least_of_it_is_cut(
    size: tuple[int, int], bucket: tuple[int, int]
) -> None:
    sizes = buckets(1024, 64)
    found = bucket_of(size, sizes)
    assert cut_away(size, found) == min(cut_away(size, other) for other in sizes)
    assert cut_away(size, found) == pytest.approx(cut_away(size, bucket), abs=1e-9)


def test_a_crop_is_as_near_to_its_center_as_can_be() -> None:
    assert crop_box((101, 50), (64, 64)) == (25, 0, 75, 50)
    assert crop_box((100, 50), (64, 64), (0.3, 0.9)) == (5, 0, 55, 50)
    assert crop_box((100, 50), (64, 64), (1, 0)) == (50, 0, 100, 50)
    assert crop_box((30, 90), (48, 80), (0.5, 0)) == (0, 0, 30, 50)


def test_pixels_of_a_bucket_are_those_of_its_box() -> None:
    image = picture(0, (60, 90))
    tensor = to_tensor(image, (48, 80), (3, 5, 51, 85))
    assert tensor.shape == (3, 80, 48)
    expected = torch.tensor(list(image.crop((3, 5, 51, 85)).getdata())).view(80, 48, 3)
    torch.testing.assert_close(tensor, (expected / 127.5 - 1).permute(2, 0, 1))


def test_a_crop_that_cuts_more_than_a_fifth_is_a_finding(tmp_path: Path) -> None:
    for number, size in enumerate([(64, 64), (64, 96), (64, 200)]):
        picture(number, size).save(tmp_path / f"{number}.png")
    photos = read_photos(tmp_path)

    def found(shapes: list[tuple[int, int]] | None) -> list[tuple[str, ...]]:
        kinds = ("cropped", "extreme-aspect")
        return [finding.names for finding in check_photos(photos, 16, shapes)
                if finding.kind in kinds]  # fmt: skip

    assert found(None) == [("2.png",), ("1.png",)]
    assert found([(64, 64), (48, 80), (32, 96)]) == []
    assert found([(64, 64), (80, 48), (48, 80)]) == [("2.png",), ("1.png",)]


def test_a_crop_follows_the_mask_or_where_it_was_moved(
    tmp_path: Path, make_config: Make, tiny_sd1: str
) -> None:
    red_top = Image.new("RGB", (32, 96), "white")
    red_top.paste((255, 0, 0), (0, 0, 32, 16))
    red_top.save(tmp_path / "p.png")
    mask = Image.new("L", (32, 96))
    mask.paste(255, (0, 0, 32, 16))
    mask.save(tmp_path / "p-masklabel.png")
    family, config = loading.load_model(tiny_sd1), make_config(tiny_sd1, str(tmp_path))

    def top(crop: str) -> int:
        cache = LatentCache(read_photos(tmp_path), family, config.replace(crop=crop))
        return cache._boxes[0][1]

    assert (top("center"), top("subject")) == (32, 0)
    (photo,) = read_photos(tmp_path)
    write_centers(tmp_path, [replace(photo, center=(0.5, 1.0))])
    assert (top("center"), top("subject")) == (32, 64)
    assert "crops.json" not in " ".join(read_source(tmp_path).notes)


@pytest.mark.parametrize("content", ["[1]", '{"p.png": [0.5]}', '{"p.png": [2, 0]}', "{",
                                     "[" * 9999, '{"p.png": [NaN, 0]}'])  # fmt: skip
def test_a_broken_table_of_crops_is_named(content: str, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "p.png")
    (tmp_path / "crops.json").write_text(content)
    with pytest.raises(DataError, match=r"crops.json' in .*(no two numbers|not valid JSON)"):
        read_photos(tmp_path)


def test_no_step_mixes_buckets_and_every_photo_is_seen_equally_often(
    start_run: Start, fields: dict[str, Any]
) -> None:
    trainer = Trainer(start_run("run", "sd1", class_images=8, **fields))
    batches, seen = trainer.batches, Counter[str]()
    assert batches.shapes == [PORTRAIT, PORTRAIT, LANDSCAPE, PORTRAIT, SQUARE]
    for kinds in batches.by_shape.values():
        for cache, _ in kinds[:1]:
            sample = cache.sample

            def counted(index: list[int], generator: Any, cache: Any = cache, sample: Any = sample):
                seen.update(cache.photos[i].name for i in index)
                return sample(index, generator)

            cache.sample = counted
    shapes = Counter(tuple(batches.at(step).noised.x_t.shape) for step in range(10))
    assert shapes == {(4, 4, 20, 12): 6, (4, 4, 12, 20): 2, (4, 4, 16, 16): 2}
    assert seen == {f"{number}.png": 4 for number in range(5)}
    again = Trainer(start_run("again", "sd1", class_images=8, **fields)).batches
    for step in (9, 3, 4):
        assert torch.equal(batches.at(step).noised.x_t, again.at(step).noised.x_t)


@pytest.mark.parametrize("changes", [
    {"flip": True}, {"gradient_accumulation": 2}, {"prior": "distilled"},
    {"prior": "none", "method": "lora"},
])  # fmt: skip
def test_training_in_buckets_resumes_bit_for_bit_from_cached_latents(
    changes: dict[str, Any], start_run: Start, fields: dict[str, Any]
) -> None:
    every = fields | changes | {"steps": 4}
    whole = [step.loss for step in train(start_run("whole", "sd1", **every))]
    run, first = start_run("broken", "sd1", **every), []
    for step in train(run):
        first.append(step.loss)
        if step.step == 2:
            break
    rest = [step.loss for step in train(runs.resume(run.folder))]
    assert first + rest == whole


def test_class_images_and_validation_are_drawn_in_most_photos_bucket(
    start_run: Start, fields: dict[str, Any], clip_folder: Path, tmp_path: Path
) -> None:
    validated = {"validate_every": 2, "scorer": str(clip_folder), "class_images": 2}
    run = start_run("run", "sd1", **validated, **fields)
    list(train(run))
    drawn = load_images(run, 2)
    assert {image.size for image in drawn.subject + drawn.class_images} == {PORTRAIT}
    files = [*(tmp_path / "class_images").glob("*/*.png")]
    assert len(files) == 2 and {Image.open(file).size for file in files} == {PORTRAIT}


def test_one_bucket_of_squares_trains_as_the_center_does(
    start_run: Start, fields: dict[str, Any], photos: str
) -> None:
    subject = replace(fields["subject"], photos=photos)
    losses = [
        [step.loss for step in train(start_run(crop, "sd1", crop=crop, subject=subject))]
        for crop in ("center", "buckets", "subject")
    ]
    assert losses[0] == losses[1] == losses[2]


def test_sdxl_is_told_each_photos_size_and_crop(start_run: Start, fields: dict[str, Any]) -> None:
    trainer = Trainer(start_run("run", "sdxl", prior="none", **fields | {"batch_size": 1}))
    told = {tuple(trainer.batches.at(step).cond["time_ids"][0].tolist()) for step in range(5)}
    # Height and width as they are, top and left of the crop in the bucket's pixels, the bucket.
    assert told == {(40, 24, 0, 0, 40, 24), (40, 26, 0, 1, 40, 24), (30, 48, 0, 0, 24, 40),
                    (32, 32, 0, 0, 32, 32)}  # fmt: skip
    plain = Trainer(start_run("plain", "sdxl", **fields | {"crop": "center"}))
    assert "time_ids" not in plain.batches.at(0).cond


def test_a_flipped_photos_crop_is_told_flipped(tiny_bases: Any, tmp_path: Path) -> None:
    """Of a photo 48 wide, cut at its left: flipped, it is cut at its right."""
    Image.new("RGB", (48, 24)).save(tmp_path / "a.png")
    family = loading.load_model(tiny_bases("sdxl"), resolution=24)
    config = TrainConfig(Subject(str(tmp_path), "dog"), tiny_bases("sdxl"), crop="subject")
    cache = LatentCache(read_photos(tmp_path), family, config)
    boxes = [(24.0, 0.0, 48.0, 24.0)]
    told = [cache._framings([0], [flip], boxes).tolist() for flip in (False, True)]
    assert told == [[[24, 48, 0, 24]], [[24, 48, 0, 0]]]


def test_sdxl_takes_the_sizes_as_its_pipeline_does(tiny_bases: Any) -> None:
    family = loading.load_model(tiny_bases("sdxl"), resolution=16)
    sizes_and_crops = torch.tensor([[40, 26, 0, 3], [16, 16, 5, 0]])
    told = family.size_conditioning(sizes_and_crops, (12, 20))["time_ids"]
    embeds = family.encode_prompts(["a dog", "a cat"])["pooled"].shape[-1]
    for row, (height, width, top, left) in zip(told, sizes_and_crops.tolist(), strict=True):
        expected = family.pipeline._get_add_time_ids(
            (height, width), (top, left), (20, 12), torch.int64, embeds
        )
        assert torch.equal(row[None], expected)
    x_t, t, cond = torch.randn(2, 4, 10, 6), torch.tensor([500, 500]), ["a dog", "a dog"]
    cond = family.encode_prompts(cond)
    with torch.no_grad():
        uncropped = family.size_conditioning(torch.tensor([[20, 12, 0, 0]] * 2), (12, 20))
        same = family.predict(x_t, t, cond | uncropped)
        assert torch.equal(same, family.predict(x_t, t, cond))
        assert not torch.equal(same, family.predict(x_t, t, cond | {"time_ids": told}))


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image"])
def test_every_family_trains_and_draws_in_buckets(
    name: str, start_run: Start, fields: dict[str, Any]
) -> None:
    for number, size in enumerate([(12, 36), (12, 36), (36, 12), (12, 36)]):
        picture(number, size).save(Path(fields["subject"].photos) / f"{number}.png")
    every = fields | {"class_images": 2, "resolution": 16}
    trainer = Trainer(start_run("run", name, **every))
    assert {*trainer.batches.shapes} == {(8, 24), (24, 8), (16, 16)}
    losses = [step.loss for step in train(start_run("other", name, **every))]
    assert all(0 < loss < 100 for loss in losses)


def test_samples_are_drawn_in_the_bucket_of_most_photos(
    start_run: Start, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end, at a checkpoint, by the base beside it; whether the photos are there or not."""
    run = start_run("run", "sd1", **fields)
    list(train(run))

    def size(source: Any, at: int | None = None) -> tuple[int, int]:
        return sampling.sample(source, ["a {} dog"] if source is run else ["a dog"], [0], at=at,
                               steps=1)[0].image.size  # fmt: skip

    assert size(run) == size(run, 2) == size(sampling.load_source(run.config)) == PORTRAIT
    assert "width={}, height={}".format(*PORTRAIT) in model_card.usage(run, run.pipeline)
    plain = start_run("plain", "sd1", **fields | {"crop": "center"})
    list(train(plain))
    assert image_sizes.saved_size(plain) is None is image_sizes.saved_size(plain, 2)
    assert "width=32, height=32" in model_card.usage(plain, plain.pipeline)
    own = runs.Run(plain.folder, plain.config.replace(resolution=None))
    assert "width" not in model_card.usage(own, own.pipeline), "the base's own size"
    shutil.rmtree(fields["subject"].photos)
    assert size(run) == size(run, 2) == PORTRAIT
    goal = run.pipeline / runs.GOAL_FILE
    for odd in (None, 3, ["a", "b"], [0, 8], [8, 2**20], [8]):  # as anyone may write
        write_object(goal, (read_object(goal) or {}) | {"size": odd})
        write_digests(run.pipeline)
        with pytest.warns(UserWarning, match="generated as squares, because .*there is no folder"):
            assert size(run) == SQUARE


def test_a_distilled_model_generates_in_that_bucket(
    start_run: Start, fields: dict[str, Any], tiny_bases: Any, clip_folder: Path
) -> None:
    own = {"method": "lora", "draw_base": tiny_bases("sd1"), "prior": "none"}
    validated = {"validate_every": 2, "scorer": str(clip_folder)}
    run = start_run("run", "sd1", **fields | own | validated)
    list(train(run))
    assert {image.size for image in load_images(run, 2).subject} == {PORTRAIT}
    assert sampling.sample(run, ["a {} dog"], [0], steps=1)[0].image.size == PORTRAIT
