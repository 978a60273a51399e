"""Identity and drift: retrieval, masks and other prompts, against plain NumPy."""

import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawings, save_photos
from PIL import Image

from dreambooth_lib.core.errors import InputError, KitError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.evaluation.dreambench import Benchmark, Protocol, draw_all
from dreambooth_lib.evaluation.masks import cut_out, find_mask
from dreambooth_lib.evaluation.scores import Row, score
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.metrics.identity import average_precision

DRIFT = ("a car in the city", "a {noun} on a bed", "a house")
SHORT = Protocol(images_per_prompt=2, class_images=3, steps=1, batch_size=8, drift_prompts=DRIFT)


def by_ranks(query: np.ndarray, photos: np.ndarray, others: np.ndarray) -> float:
    """Return average precision as retrieval defines it: over the ranks where photos stand."""
    gallery = np.concatenate([others, photos])  # look-alikes first where both are as near
    is_photo = np.arange(len(gallery)) >= len(others)
    order = np.argsort(-(gallery @ query), kind="stable")
    found = np.cumsum(is_photo[order])
    precisions = found / np.arange(1, len(gallery) + 1)
    return float(precisions[is_photo[order]].mean())


def unit(shape: tuple[int, int], seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_average_precision_is_that_of_the_ranks() -> None:
    queries, photos, others = unit((20, 5), 0), unit((4, 5), 1), unit((9, 5), 2)
    got = average_precision(*map(torch.from_numpy, (queries, photos, others)))
    assert got.tolist() == pytest.approx([by_ranks(q, photos, others) for q in queries])
    assert 0 < got.min() < got.max() <= 1


def test_average_precision_of_plain_cases() -> None:
    photos, others = torch.eye(4)[:2], torch.eye(4)[2:]
    queries = torch.tensor([[1.0, 0.9, 0, 0], [1.0, 0, 0.5, 0.5], [0, 0, 1, 0.5]])
    first, mixed, last = average_precision(queries, photos, others).tolist()
    assert first == 1
    assert mixed == pytest.approx((1 / 1 + 2 / 4) / 2)
    assert last == pytest.approx((1 / 3 + 2 / 4) / 2)
    tied = average_precision(torch.ones(1, 2), torch.eye(2)[:1], torch.eye(2)[1:])
    assert tied.item() == 0.5, "a tie is no find"
    with pytest.raises(InputError, match="look_alikes embeddings have shape"):
        average_precision(queries, photos, torch.zeros(0, 4))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_sd1: str, tiny_sd2: str) -> tuple:
    folder = tmp_path_factory.mktemp("identity")
    subjects = [
        Subject(save_photos(folder / name, count), "dog", name=name, kind="live")
        for name, count in (("rex", 3), ("tom", 2))
    ]
    for number, file in enumerate(sorted((folder / "tom").glob("*.png"))):
        drawings(1, 50 + number)[0].save(file)  # not rex's own photos
    benchmark = Benchmark(subjects, {"live": ["a {} {noun}", "a red {} {noun}"]})
    methods = {"base": lambda s: tiny_sd1, "tuned": lambda s: tiny_sd2}
    list(draw_all(benchmark, methods, folder / "out", SHORT))
    return benchmark, folder / "out", methods


def rows_of(drawn: tuple, encoder: Encoder, measure: str, method: str = "tuned") -> list[Row]:
    benchmark, out, _ = drawn
    rows = score(benchmark, [method], out, {"clip": encoder}, SHORT, judges={})
    return [row for row in rows if row.measure == measure and row.subject == "rex"]


def embed(encoder: Encoder, paths: list[Path]) -> np.ndarray:
    return encoder.embed_images([Image.open(p).convert("RGB") for p in paths]).double().numpy()


def test_the_gallery_is_the_bases_class_images_and_other_subjects_photos(
    drawn: tuple, clip: Encoder
) -> None:
    benchmark, out, _ = drawn
    rex, tom = (sorted(Path(s.photos).glob("*.png")) for s in benchmark.subjects)
    classes = [out / f"base/rex/class-s{10_000 + i}.png" for i in range(3)]
    photos, others = embed(clip, rex), embed(clip, [*classes, *tom])
    rows = rows_of(drawn, clip, "retrieval_precision")
    assert len(rows) == 4
    for row in rows:
        number = ["a {} dog", "a red {} dog"].index(row.prompt or "")
        (query,) = embed(clip, [out / f"tuned/rex/p0{number}-s{row.seed}.png"])
        assert row.value == pytest.approx(by_ranks(query, photos, others))


def test_drift_is_told_for_each_prompt(drawn: tuple, clip: Encoder) -> None:
    _, out, _ = drawn
    rows = rows_of(drawn, clip, "prompt_drift")
    assert [row.prompt for row in rows] == ["a car in the city", "a dog on a bed", "a house"]
    for number, row in enumerate(rows):
        base, tuned = (
            embed(clip, [out / f"{method}/rex/drift0{number}-s{seed}.png" for seed in range(2)])
            for method in ("base", "tuned")
        )
        assert row.value == pytest.approx(1 - (base * tuned).sum(-1).mean(), abs=1e-6)
        assert row.value > 1e-3 and row.seed is None
    unchanged = [row.value for row in rows_of(drawn, clip, "prompt_drift", "base")]
    assert unchanged == pytest.approx([0, 0, 0], abs=1e-6)


def disc(size: tuple[int, int], left: int = 3) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (left, 4, left + 7, 9))
    return mask


@pytest.fixture
def with_masks(drawn: tuple) -> Iterator[None]:
    """Add masks to rex's photos and to the images of the tuned model."""
    benchmark, out, _ = drawn
    folders = [Path(benchmark.subjects[0].photos), out / "tuned/rex"]
    for folder, names in zip(folders, ("*.png", "p*.png"), strict=True):
        (folder / "masks").mkdir()
        for file in folder.glob(names):
            disc(Image.open(file).size).save(folder / "masks" / file.name)
    yield
    for folder in folders:
        shutil.rmtree(folder / "masks")


def alone(file: Path) -> Image.Image:
    """Cut the disc out, pixel by pixel: 7 wide and 5 high, on a grey square."""
    pixels = np.full((7, 7, 3), 127, np.uint8)
    pixels[1:6] = np.asarray(Image.open(file).convert("RGB"))[4:9, 3:10]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("packed", [False, True])
def test_the_subject_alone_is_compared_where_masks_are(
    drawn: tuple, clip: Encoder, with_masks: None, packed: bool, tmp_path: Path
) -> None:
    benchmark, out, methods = drawn
    rex, tom = benchmark.subjects
    photos = sorted(Path(rex.photos).glob("*.png"))
    if packed:
        archive = shutil.make_archive(str(tmp_path / "rex"), "zip", rex.photos)
        benchmark = replace(benchmark, subjects=[replace(rex, photos=archive), tom])
    real = clip.embed_images([alone(p) for p in photos]).double().numpy()
    empty = out / "tuned/rex/masks/p01-s1.png"
    Image.new("L", Image.open(empty).size).save(empty)
    rows = rows_of((benchmark, out, methods), clip, "masked_fidelity")
    assert len(rows) == 4
    for row in rows:
        number = ["a {} dog", "a red {} dog"].index(row.prompt or "")
        if (number, row.seed) == (1, 1):
            assert row.value == 0
            continue
        file = out / f"tuned/rex/p0{number}-s{row.seed}.png"
        query = clip.embed_images([alone(file)])[0].double().numpy()
        assert row.value == pytest.approx((real @ query).mean(), abs=1e-5)


def test_without_masks_of_both_there_is_no_row(
    drawn: tuple, clip: Encoder, with_masks: None
) -> None:
    assert rows_of(drawn, clip, "masked_fidelity", "base") == []


@pytest.mark.parametrize(("harm", "message"), [
    (lambda mask: mask.unlink(), "p01-s0.png has no mask and others have"),
    (lambda mask: mask.write_bytes(mask.read_bytes()[:60]), r"masks cannot be read .*; replace or"),
    (lambda mask: Image.new("L", (5, 4)).save(mask), r"p01-s0.png is \(5, 4\) and not"),
])  # fmt: skip
def test_masks_that_cannot_be_used_are_named(
    harm: Callable[[Path], None], message: str, drawn: tuple, clip: Encoder, with_masks: None
) -> None:
    _, out, _ = drawn
    harm(out / "tuned/rex/masks/p01-s0.png")
    with pytest.raises(KitError, match=message):
        rows_of(drawn, clip, "masked_fidelity")


def test_a_photos_empty_mask_is_named(drawn: tuple, clip: Encoder, with_masks: None) -> None:
    (photo, *_) = read_photos(drawn[0].subjects[0].photos)
    mask = Path(drawn[0].subjects[0].photos) / "masks" / photo.name
    Image.new("L", Image.open(mask).size).save(mask)
    with pytest.raises(InputError, match="shows nothing; make it again"):
        rows_of(drawn, clip, "masked_fidelity")


def test_a_mask_is_turned_by_exif_that_pillow_cannot_write(tmp_path: Path) -> None:
    # Orientation 6, and the unit of resolution as text.
    tags = struct.pack("<HHI4sHHI4s", 0x112, 3, 1, b"\6\0", 0x128, 2, 2, b"2\0")
    image = drawings(1)[0]
    image.putalpha(disc(image.size))
    image.save(tmp_path / "a.png", exif=b"II*\0\x08\0\0\0\x02\0" + tags + bytes(4))
    mask = find_mask(tmp_path / "a.png")
    assert mask is not None and mask.size == image.size[::-1]


def test_an_alpha_channel_is_a_mask_if_it_hides_anything(tmp_path: Path) -> None:
    image = drawings(1)[0]
    image.save(tmp_path / "plain.png")
    opaque = image.copy()
    opaque.putalpha(255)
    opaque.save(tmp_path / "opaque.png")
    shown = image.copy()
    shown.putalpha(disc(image.size))
    shown.save(tmp_path / "shown.png")
    assert find_mask(tmp_path / "plain.png") is find_mask(tmp_path / "opaque.png") is None
    mask = find_mask(tmp_path / "shown.png")
    assert mask is not None and np.array_equal(np.asarray(mask), np.asarray(disc(image.size)))
    cut = cut_out(image, mask, tmp_path / "shown.png")
    assert cut is not None and np.array_equal(
        np.asarray(cut), np.asarray(alone(tmp_path / "plain.png"))
    )
