"""What earlier versions wrote is read, resumed and sampled from under its old names."""

import json
import shutil
from pathlib import Path

import pytest

import dreambooth_lib as db
from dreambooth_lib.core.old_names import current_fields, current_protocol, locate
from dreambooth_lib.evaluation.sweep_table import MEASURES, recommend
from dreambooth_lib.families.loading import BUNDLED
from dreambooth_lib.training.class_images import draw_class_images
from dreambooth_lib.training.sampling import load_source
from dreambooth_lib.training.validation_record import images_folder, load_images, plan_of

#: A LoRA run of rank 1 on the bundled base, interrupted at step 1 of 2 by version 0.1.0 before
#: its fields and files had their present names; beside it the class images that it drew.
OLD = Path(__file__).parent / "data" / "old_run"
SENTENCE = "watch_every is now called validate_every"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "runs")
    config = tmp_path / "runs" / "run" / "config.toml"
    photos = BUNDLED / "subjects" / "patch_dog"
    config.write_text(config.read_text().replace("PHOTOS", str(photos)))
    return tmp_path / "runs" / "run"


def test_an_old_run_is_resumed_and_sampled_from(old: Path) -> None:
    with pytest.warns(UserWarning, match=SENTENCE):
        run = db.resume(old)
    assert run.config.class_images == 2 and run.config.validate_every == 1
    assert run.config.scorer == "toybox" and plan_of(run).class_images == 3
    assert [result.step for result in db.history(run)] == [0, 1]
    before = images_folder(run, 1)
    assert before == old / "watch" / "000001" and len(load_images(run, 1).subject) == 4
    (earlier,) = db.sample(run, ["a {} dog"], seeds=[0], at=1, steps=1)
    steps = [step.step for step in db.train(run)]
    assert steps == [2] and [row["step"] for row in run.log()] == [1, 2]
    assert [result.step for result in db.history(run)] == [0, 1, 2]
    assert (old / "watch" / "000002").is_dir() and not (old / "validation").exists()
    (later,) = db.sample(run, ["a {} dog"], seeds=[0], steps=1)
    assert earlier.image.tobytes() != later.image.tobytes()


def test_old_class_images_are_used_and_not_drawn_again(old: Path) -> None:
    with pytest.warns(UserWarning, match=SENTENCE):
        config = db.resume(old).config
    folder = locate(old.parent, "class_images")
    assert folder.name == "class_pictures"
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*/*.png")}
    assert len(times) == 2
    paths = list(draw_class_images(config, load_source(config), folder))
    assert len(paths) == 2
    if set(paths) == set(times):  # else another diffusers has more settings of the sampler
        assert {file: file.stat().st_mtime_ns for file in paths} == times
    assert locate(old.parent / "run", "class_images").name == "class_images", "of a new folder"


def test_an_old_toml_file_is_read_with_a_sentence(tmp_path: Path, photos: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        f"class_pictures = 5\nwatch_every = 7\njudge = 'some/clip'\n[subject]\n"
        f"pictures = '{photos}'\nclass_noun = 'dog'\n"
    )
    with pytest.warns(UserWarning) as told:
        config = db.TrainConfig.from_toml(file)
    assert (config.class_images, config.validate_every, config.scorer) == (5, 7, "some/clip")
    assert [str(one.message) for one in told] == [
        "In the config, class_pictures is now called class_images, watch_every is now called "
        "validate_every, judge is now called scorer, subject.pictures is now called "
        "subject.photos; the next version will not read the old names."
    ]
    assert "class_images = 5" in config.to_toml() and "watch_every" not in config.to_toml()


def test_an_old_note_of_what_drew_images_is_read() -> None:
    flat = {"subject.pictures": "/p", "class_pictures": 3}
    assert current_fields(flat) == {"subject.photos": "/p", "class_images": 3}


def test_an_old_table_is_read() -> None:
    row = dict.fromkeys(MEASURES, 0.5) | {"prior_weight": 1.0, "step": 4, "seed": 0, "cell": "a"}
    row["standing"] = row.pop("score")
    assert "score" in current_fields(row)
    assert recommend([row]).score == pytest.approx(0.5)


def test_an_old_protocol_is_that_of_the_same_pictures() -> None:
    assert current_protocol(json.loads('{"class_pictures": 24, "pictures": 4, "steps": 5}')) == {
        "class_images": 24, "images_per_prompt": 4, "steps": 5,
    }  # fmt: skip
