"""Check photos, load data sets, make tensors and shuffle."""

import io
import os
import re
import time
import warnings
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import DEFAULT_IDENTIFIER, Subject
from dreambooth_lib.data import captions, preprocessing, quality_checks, subjects
from dreambooth_lib.data.images import DataError, Photo, read_photos
from dreambooth_lib.evaluation.dreambench import load_benchmark

DREAMBENCH = os.environ.get("DREAMBOOTH_TEST_DREAMBENCH", "")


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Draw coarse shapes and sharp detail, as in a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size)
    fine = rng.integers(-40, 41, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8))


def found(*images: Image.Image, resolution: int = 32) -> list[tuple[str, tuple[str, ...]]]:
    """Return all findings but "few" and "cropped"."""
    photos = [Photo(f"{i}.png", image) for i, image in enumerate(images)]
    findings = quality_checks.check_photos(photos, resolution)
    assert all(f.message.startswith(f.names[0]) and f.message.endswith(".") for f in findings)
    return [(f.kind, f.names) for f in findings if f.kind not in ("few", "cropped")]


def test_distinct_photos_have_no_findings() -> None:
    assert found(*(noise(seed) for seed in range(12))) == []


def test_one_or_two_photos_are_few_and_copies_do_not_count() -> None:
    one, two, three = (noise(seed) for seed in range(3))

    def few(*images: Image.Image) -> list[str]:
        photos = [Photo(f"{i}.png", image) for i, image in enumerate(images)]
        return [f.message for f in quality_checks.check_photos(photos, 32) if f.kind == "few"]

    assert few(one)[0].startswith("0.png alone is too little to learn from; take three to six")
    assert few(one, two)[0].startswith("0.png and 1.png alone are too little")
    assert few(one, one.copy(), two)[0].startswith("0.png and 2.png alone")
    assert few(one, two, three) == []


def test_plain_photos_of_other_colours_are_distinct() -> None:
    plain = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "white")]
    assert {kind for kind, _ in found(*plain)} == {"blurred"}


def test_each_finding() -> None:
    image = noise(1, (400, 300))
    assert found(image, image.copy(), noise(2)) == [("duplicate", ("0.png", "1.png"))]
    near = [("near-duplicate", ("0.png", "1.png"))]
    assert found(image, ImageOps.mirror(image)) == near
    assert found(image, image.resize((200, 150)).point(lambda v: int(v * 0.95))) == near
    assert found(image, image.crop((12, 8, 400, 300))) == near
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    assert found(image, Image.open(buffer)) == near
    assert found(image, resolution=512) == [("tiny", ("0.png",))]
    assert found(image.filter(ImageFilter.GaussianBlur(4))) == [("blurred", ("0.png",))]
    assert found(noise(1, (201, 100))) == [("extreme-aspect", ("0.png",))]
    assert found(noise(1, (200, 100))) == []
    assert "extreme-aspect" in dict(found(Image.new("RGB", (1, 9))))


def test_load_subject_reads_and_warns(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate("acd", start=1):
        noise(seed, (60, 48)).save(folder / f"{name}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "tiny" is no warning
        subject = subjects.load_subject(folder, "dog")
    assert (subject.name, subject.identifier) == ("photos", DEFAULT_IDENTIFIER)
    assert Path(subject.photos) == folder.resolve()
    noise(1, (60, 48)).save(folder / "b.png")
    with pytest.warns(UserWarning, match="same photo"):
        subject = subjects.load_subject(folder, "dog", "zwx", "Rex")
    assert (subject.instance_prompt, subject.name) == ("a zwx dog", "Rex")
    with pytest.raises(ConfigError):
        subjects.load_subject(folder, " ")
    (folder / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.png"):
        subjects.load_subject(folder, "dog")


def told(folder: Path, *identifier: str) -> str:
    """Return all warnings of load_subject."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        subjects.load_subject(folder, "dog", *identifier)
    return "\n".join(str(warning.message) for warning in caught)


def test_captions_without_the_identifier_are_told(tmp_path: Path) -> None:
    for seed in range(5):
        noise(seed, (60, 48)).save(tmp_path / f"p{seed}.png")
    for seed, text in enumerate(["a dog on grass", "an OHWX dog", "a {} dog", "ohwxes, dogs"]):
        (tmp_path / f"p{seed}.txt").write_text(text)
    text = told(tmp_path)
    assert "2 of 4 captions (p0.png and others) lack the identifier 'ohwx'" in text
    assert "put '{}' before the class noun, as in" in text and "'a {} dog on the grass'" in text
    assert "3 of 4 captions" in told(tmp_path, "zwx")
    (tmp_path / "p0.txt").write_text("ohwx dog")
    assert "1 of 4 captions (p3.png) lacks the identifier" in told(tmp_path)
    (tmp_path / "p3.txt").unlink()
    (tmp_path / "notes.json").write_text("{}")
    assert told(tmp_path).startswith("notes.json is not used, because it holds no caption of a ")
    (tmp_path / "p9.txt").write_text("")
    assert (
        "notes.json and p9.txt are not used, because they hold no caption of a photo here"
        in told(tmp_path)
    )
    (tmp_path / "p9.mov").write_text("")
    assert "p9.mov is not used, because it is neither a photo nor a caption." in told(tmp_path)


def words(text: str, **_: bool) -> SimpleNamespace:
    """Make a token of each four letters of a word, and two special ones, as a tokenizer does."""
    parts = [word[i : i + 4] for word in text.split() for i in range(0, len(word), 4)]
    return SimpleNamespace(input_ids=["start", *parts, "end"])


def test_the_words_that_no_text_encoder_reads_are_named() -> None:
    assert captions.cut_words("one two six ten", [(words, 6)]) == ""
    assert captions.cut_words(" one  two six ten ", [(words, 5)]) == "ten"
    assert captions.cut_words("one two hippopotamus ten", [(words, 5)]) == "hippopotamus ten"
    assert captions.cut_words("one two", [(words, 2)]) == "one two"
    assert captions.cut_words("one two six", [(words, 4), (words, 9)]) == "", "the second reads it"
    assert captions.cut_words("one two six", [(words, 3), (words, 4)]) == "six"
    assert captions.cut_words("one two", []) == ""


def test_captions_longer_than_the_base_reads_are_named() -> None:
    dog, image = Subject("photos", "dog"), noise(1)
    photos = [Photo("a.png", image, "a {} dog"), Photo("b.png", image, "a {} dog on the far beach")]
    (message,) = captions.check_lengths([*photos, Photo("c.png", image)], dog, [(words, 8)])
    assert message == (
        "the caption of b.png is too long: it has 8 tokens, and the base's text encoders read at "
        "most 6; everything from 'beach' on is cut off."
    )
    (message,) = captions.check_lengths(photos, dog, [(words, 8)], "set prompt_chunks to 3")
    assert message.endswith("everything from 'beach' on is cut off; set prompt_chunks to 3.")
    assert captions.count_tokens("one hippopotamus", [(words, 3), (words, 4)]) == (4, 2)
    assert captions.check_lengths(photos, dog, [(words, 8), (words, 77)]) == []
    many = [Photo(f"{i}.png", image, "a {} dog on the far beach") for i in range(20)]
    messages = captions.check_lengths(many, dog, [(words, 7)])
    assert len(messages) == 5 and messages[-1].startswith("16 more captions are too long")
    late = [Photo("b.png", image, "on the far beach a {} dog")]
    with pytest.raises(DataError, match=r"the caption of b\.png has the identifier 'ohwx' past"):
        captions.check_lengths(late, dog, [(words, 7)])
    with pytest.raises(DataError, match="the instance prompt has the identifier"):
        captions.check_lengths([], Subject("photos", "dog", "ohwxohwxohwx"), [(words, 4)])


def signs(text: str, **_: bool) -> SimpleNamespace:
    """Make a token of each word, sign and Chinese character, as CLIP's tokenizer about does."""
    parts = re.findall(r"[\u4e00-\u9fff]|[a-z]+|[^\w\s]", text.lower())
    return SimpleNamespace(input_ids=["start", *parts, "end"])


@pytest.mark.parametrize(
    ("caption", "cut"),
    [
        ("ohwx,dog,grass,tree,sky", "tree,sky"),
        ("OHWX, dog, grass, tree", "tree"),
        ("ohwx，一只狗在草地上跑", "草地上跑"),
        ("ohwx dog on the grass it basks", "basks"),
        ("a ohwx dog on grass by ohwx", "ohwx"),
    ],
)
def test_a_long_caption_is_cut_by_tokens_whatever_separates_its_words(
    caption: str, cut: str
) -> None:
    photos = [Photo("a.png", noise(1), caption)]
    (message,) = captions.check_lengths(photos, Subject("photos", "dog"), [(signs, 8)])
    assert message.endswith(f"everything from '{cut}' on is cut off.")


def test_an_identifier_beyond_what_is_read_is_one_in_any_case_and_a_whole_word() -> None:
    late, limits = [Photo("b.png", noise(1), "on,the,far,beach,an,OHWX,dog")], [(signs, 8)]
    with pytest.raises(DataError, match="identifier 'ohwx' past"):
        captions.check_lengths(late, Subject("photos", "dog"), limits)
    basks = [Photo("b.png", noise(1), "a dog, a cat, it basks")]
    assert captions.check_lengths(basks, Subject("photos", "dog", "sks"), limits)
    sks = [Photo("b.png", noise(1), "it basks, a dog, a sks")]
    with pytest.raises(DataError, match="identifier 'sks' past"):
        captions.check_lengths(sks, Subject("photos", "dog", "sks"), limits)


def test_one_sentence_tells_that_the_crop_cuts_photos() -> None:
    photos = [Photo(f"{i}.png", noise(i, (64, 48))) for i in range(7)]
    photos += [Photo("square.png", noise(7, (64, 52))), Photo("long.png", noise(8, (100, 40)))]
    findings = [f for f in quality_checks.check_photos(photos, 32) if f.kind == "cropped"]
    assert [f.names for f in findings] == [tuple(f"{i}.png" for i in range(7))]
    assert findings[0].message.startswith("0.png, 1.png, 2.png, 3.png and 3 more files lose more")


def pairs_one_by_one(photos: list[Photo]) -> list[tuple[int, int, bool]]:
    """Find near-duplicates by the definition, pair by pair."""
    near = []
    for a, b in combinations(range(len(photos)), 2):
        first, second = photos[a].traits, photos[b].traits
        same, mirrored = (
            (first.bits[side] != second.bits[0]).sum() <= 12
            and np.abs(first.levels[side].astype(float) - second.levels[0]).mean() <= 20.0
            for side in (0, 1)
        )
        if same or mirrored:
            near.append((a, b, not same))
    return near


def test_near_duplicates_are_those_of_every_pair() -> None:
    rng, photos = np.random.default_rng(0), []
    for number in range(60):
        image = noise(number // 4, (40, 40))
        if number % 3 == 0:
            image = ImageOps.mirror(image)
        change = rng.integers(0, 80)
        image = image.point(lambda level, change=change: min(255, level + change))  # type: ignore[misc]
        photos.append(Photo(f"{number}.png", image))
    pairs = pairs_one_by_one(photos)
    assert 20 < len(pairs) < 90 and {mirrored for *_, mirrored in pairs} == {False, True}
    near = quality_checks._near_duplicates(photos)
    found = [
        (a, b, m) for a, (others, flags) in enumerate(near)
        for b, m in zip(others.tolist(), flags.tolist(), strict=True)
    ]  # fmt: skip
    assert found == pairs
    labels = list(range(60))
    for a, b, _ in pairs:
        kept, merged = sorted((labels[a], labels[b]))
        labels = [kept if label == merged else label for label in labels]
    groups = [[i for i, n in enumerate(labels) if n == first] for first in sorted(set(labels))]
    assert quality_checks.near_duplicate_groups(photos) == groups


def test_thousands_of_frames_are_compared_in_seconds() -> None:
    frames = [noise(0, (32, 32)).point(lambda level, i=i: level + i % 8) for i in range(50)]  # type: ignore[misc]
    traits = [Photo("", frame).traits for frame in frames]
    photos = [Photo(f"{i}.png", frames[i % 50]) for i in range(2000)]
    for i, photo in enumerate(photos):
        photo.__dict__["traits"] = traits[i % 50]
    start = time.process_time()
    assert quality_checks.hold_out(photos) == (photos, [])
    assert time.process_time() - start < 8
    findings = [f for f in quality_checks.check_photos(photos, 32) if f.kind == "near-duplicate"]
    assert [len(f.names) for f in findings] == [len({t.digest for t in traits})]


def test_a_table_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    root = dataset(tmp_path, "subject_name,class\ndog,dog", "dog")
    (root / "dataset" / "prompts_and_classes.txt").write_bytes(b"caf\xe9")
    for load in (subjects.load_dataset, load_benchmark):
        with pytest.raises(DataError, match=r"prompts_and_classes\.txt is not UTF-8"):
            load(root)


def dataset(root: Path, table: str, *names: str) -> Path:
    for name in names:
        (root / "dataset" / name).mkdir(parents=True)
    text = f"Classes\n\n{table}\n\nPrompts\n\nprompt_list = [\n'a {{0}}'.format(a, b),\n]\n"
    (root / "dataset" / "prompts_and_classes.txt").write_text(text)
    return root


def test_dataset_layout(tmp_path: Path) -> None:
    table = "subject_name,class\nbear,stuffed animal\ncat2,cat\ndog,dog\nvase,vase"
    root = dataset(tmp_path, table, "vase", "cat2", "bear", ".git")
    found = subjects.load_dataset(root)
    assert [(s.name, s.class_noun, s.kind) for s in found] == [
        ("bear", "stuffed animal", "object"),
        ("cat2", "cat", "live"),
        ("vase", "vase", "object"),
    ]
    assert subjects.load_dataset(root / "dataset") == found
    assert Path(found[1].photos) == (root / "dataset" / "cat2").resolve()


def test_dataset_with_types(tmp_path: Path) -> None:
    root = dataset(tmp_path, "subject_name,class,type\nfox,fox,live\ndog,dog,object", "fox", "dog")
    assert [(s.name, s.kind) for s in subjects.load_dataset(root)] == [
        ("fox", "live"),
        ("dog", "object"),
    ]


@pytest.mark.parametrize(
    ("table", "names", "word"),
    [
        ("subject_name,class\ndog,dog", ("dog", "fox"), "'fox'"),
        ("subject_name,class\ndog,dog", (), "no folder"),
        ("name,noun\ndog,dog", ("dog",), "no table"),
        ("subject_name,class\ndog", ("dog",), "line 4"),
        ("subject_name,class,type\ndog,dog,alive", ("dog",), "line 4"),
    ],
)
def test_dataset_errors(tmp_path: Path, table: str, names: tuple[str, ...], word: str) -> None:
    (tmp_path / "dataset").mkdir()
    with pytest.raises(DataError, match=word) as caught:
        subjects.load_dataset(dataset(tmp_path, table, *names))
    assert str(tmp_path) in str(caught.value)


def test_dataset_without_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts_and_classes\.txt"):
        subjects.load_dataset(tmp_path)


@pytest.mark.skipif(not DREAMBENCH, reason="DREAMBOOTH_TEST_DREAMBENCH is not set")
def test_real_dataset() -> None:
    found = subjects.load_dataset(DREAMBENCH)
    assert len(found) == 8
    assert [s.name for s in found if s.kind == "live"] == ["cat2", "dog"]
    for subject in found:
        photos = read_photos(subject.photos)
        assert 4 <= len(photos) <= 6
        assert quality_checks.check_photos(photos) == []


def test_to_tensor_by_hand() -> None:
    columns = np.array([[0, 51, 102, 255], [255, 153, 204, 0]], np.uint8)
    image = Image.fromarray(np.stack([columns, columns // 3, 255 - columns], axis=-1))
    tensor = preprocessing.to_tensor(image, 2)
    assert tensor.shape == (3, 2, 2)
    assert tensor.dtype == torch.float32
    assert torch.allclose(tensor[0], torch.tensor([[-0.6, -0.2], [0.2, 0.6]]))
    assert torch.allclose(tensor[2], -tensor[0])
    assert torch.equal(preprocessing.to_tensor(image, 2, flip=True), tensor.flip(-1))
    assert torch.equal(
        preprocessing.to_tensor(image.transpose(Image.Transpose.TRANSPOSE), 2),
        tensor.mT.contiguous(),
    )


def test_to_tensor_does_not_distort() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (125, 25, 175, 75))  # a square in the middle stays one
    bright = preprocessing.to_tensor(image, 40)[0] > 0
    assert bright[10:30, 10:30].all()
    assert bright.sum() == 400


def test_random_crop() -> None:
    ramp = np.tile(np.arange(100, dtype=np.uint8), (10, 1))
    image = Image.fromarray(np.stack([ramp] * 3, axis=-1))

    def lefts(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        crops = [
            preprocessing.to_tensor(image, 10, "random", generator=generator) for _ in range(200)
        ]
        return [round(float(crop[0, 0, 0] + 1) * 127.5) for crop in crops]

    assert lefts(0) == lefts(0) != lefts(1)
    assert (min(lefts(0)), max(lefts(0))) == (0, 90)
    with pytest.raises(DataError, match="'middle'"):
        preprocessing.to_tensor(image, 10, "middle")


@pytest.mark.parametrize("size", [(900, 400), (301, 777), (640, 640)])
def test_a_reduced_photo_has_the_same_random_crops(size: tuple[int, int]) -> None:
    rough = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    image = Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)
    small = preprocessing.reduced(image, 64)
    assert min(small.size) == 64
    assert preprocessing.reduced(small, 64) is small, "others stay as they are"
    for seed in range(10):
        crops = [
            preprocessing.to_tensor(
                given, 32, "random", generator=torch.Generator().manual_seed(seed), size=size
            )
            for given in (image, small)
        ]
        assert (crops[0] - crops[1]).abs().mean() < 0.02
        assert (crops[0] - crops[1].flip(2)).abs().mean() > 0.1


def test_shuffled_stream() -> None:
    stream = preprocessing.shuffled(5, 7, 0, 50)
    epochs = [stream[i : i + 5] for i in range(0, 50, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    for start in range(20):
        for length in (0, 1, 3, 12):
            assert preprocessing.shuffled(5, 7, start, length) == stream[start : start + length]
    assert preprocessing.shuffled(5, 8, 0, 50) != stream
    assert preprocessing.shuffled(1, 0, 3, 2) == [0, 0]
    with pytest.raises(DataError):
        preprocessing.shuffled(0, 0, 0, 1)


def test_a_class_in_a_table_that_cannot_be_seen_is_refused_with_its_table(tmp_path: Path) -> None:
    (tmp_path / "rex").mkdir()
    (tmp_path / "prompts_and_classes.txt").write_text("subject_name,class\nrex,dog\u200b\n")
    with pytest.raises(DataError, match=r"prompts_and_classes\.txt: .*U\+200B"):
        subjects.load_dataset(tmp_path)
