"""Check that a folder in DreamBench++'s layout is read as a benchmark, and evaluated."""

import sys
from pathlib import Path

import pytest
from conftest import drawings

from dreambooth_lib.__main__ import main
from dreambooth_lib.data.images import DataError, read_photos
from dreambooth_lib.evaluation.benchmarks import load_benchmark
from dreambooth_lib.evaluation.tables import read_csv

CAPTIONS = {
    "live_subject/animal/00": ("Dog", ["a dog on the beach", "A photo of a red Dog, a dog"]),
    "live_subject/human/00": ("dog cat", ["a dog cat in snow", "dogs in the snow"]),
    "object/00": ("cat", ["a cat's photo", "the beach in the snow"]),
    "style/00": ("Impressionist", ["a dog", "a cat"]),
}


@pytest.fixture
def plus(tmp_path: Path) -> Path:
    """Write one photo and a file of captions for each subject, as the data set has them."""
    for place, image in zip(CAPTIONS, drawings(len(CAPTIONS)), strict=True):
        noun, captions = CAPTIONS[place]
        photo = (tmp_path / "data/images" / place).with_suffix(".jpg")
        text = (tmp_path / "data/captions" / place).with_suffix(".txt")
        for file in (photo, text):
            file.parent.mkdir(parents=True, exist_ok=True)
        image.save(photo)
        text.write_text("\n".join([noun, *captions]) + "\n")
    (tmp_path / "data/preview.py").write_text("1 / 0")
    return tmp_path / "data"


@pytest.mark.filterwarnings("ignore:the 1 styles")
def test_each_photo_is_a_subject_with_prompts_of_its_own(plus: Path) -> None:
    for folder in (plus, plus.parent):
        found = load_benchmark(folder)
        assert [(s.name, s.class_noun, s.kind) for s in found.subjects] == [
            ("live_subject_animal_00_dog", "Dog", "animal"),
            ("live_subject_human_00_dog_cat", "dog cat", "human"),
            ("object_00_cat", "cat", "object"),
        ]
        dog, both, cat = found.subjects
        assert found.prompts_for(dog) == ["a {} Dog on the beach", "A photo of a red {} Dog, a dog"]
        assert found.prompts_for(both) == [
            "a {} dog cat in snow", "a {} dog cat, dogs in the snow",
        ]  # fmt: skip
        assert found.prompts_for(cat) == ["a {} cat's photo", "a {} cat, the beach in the snow"]
        assert [len(read_photos(subject.photos)) for subject in found.subjects] == [1, 1, 1]
        only = found.only(["object_00_cat"])
        assert only.prompts_for(only.subjects[0]) == found.prompts_for(cat)


def test_styles_are_left_out_and_that_is_said(plus: Path) -> None:
    with pytest.warns(UserWarning, match=r"^the 1 styles in .*data are left out"):
        load_benchmark(plus)
    for name in ("live_subject", "object"):
        (plus / "images" / name).rename(plus / name)
    with pytest.raises(DataError, match="no photo of a subject"):
        load_benchmark(plus)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"00\.txt has no captions; write the subject's noun"),
        ("cat\n\n", r"00\.txt has no captions"),
        ("cat\na {0.__class__} cat", r"00\.txt has a brace in 'a \{0\.__class__\} cat'"),
        ("cat\u200b\na cat", r"00\.txt: subject\.class_noun contains the invisible character"),
        (None, r"00\.txt cannot be read"),
        (b"cat\n\xff", r"00\.txt is not UTF-8"),
    ],
)
def test_captions_that_cannot_be_used_are_named(
    plus: Path, text: str | bytes | None, sentence: str
) -> None:
    file = plus / "captions/object/00.txt"
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=sentence):
        load_benchmark(plus)


def test_a_photo_twice_or_in_no_category_is_refused(plus: Path) -> None:
    photo = plus / "images/object/00.jpg"
    (photo.with_suffix(".jpeg")).write_bytes(photo.read_bytes())
    with pytest.raises(DataError, match=r"00\.jpg is another photo of object_00_cat; keep one"):
        load_benchmark(plus)
    photo.with_suffix(".jpeg").rename(plus / "images/00.jpg")
    with pytest.raises(DataError, match=r"images/00\.jpg is in no category"):
        load_benchmark(plus)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the 1 styles")
def test_the_command_evaluates_it_with_one_photo_a_subject(
    plus: Path, tiny_sd1: str, clip_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    words = ["evaluate", str(plus), "--base", tiny_sd1, "--encoders", str(clip_folder),
             "--images-per-prompt", "2", "--steps", "1", "--class-images", "2", "--scorer",
             str(clip_folder), "--out", str(tmp_path / "out")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["dreambooth_lib", *words])
    main()
    said = capsys.readouterr().out
    assert "| dreambooth |" in said and "| real images |" not in said.partition("arXiv")[0]
    rows = read_csv(tmp_path / "out/scores.csv")
    assert {row.kind for row in rows} == {"animal", "human", "object"}
    assert {row.method for row in rows} == {"base", "dreambooth"}, "no pairs among one photo"
