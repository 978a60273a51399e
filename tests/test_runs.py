"""Test a run's folder: starting, resuming, the log, and which checkpoints stay."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_photos
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.made_with import MADE_WITH_FILE
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.training import config_changes, photo_record, runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.runs import Run, RunError

Make = Callable[..., TrainConfig]


@pytest.fixture
def run(tmp_path: Path, photos: str, make_config: Make) -> Run:
    return runs.start(make_config("toybox", photos, checkpoints_kept=2), tmp_path / "run")


def test_a_started_run_opens_again_with_the_same_config(run: Run) -> None:
    assert runs.resume(run.folder) == run
    assert run.log() == [] and run.checkpoints() == {} and run.load_checkpoint() is None


def test_a_folder_that_holds_a_run_is_not_started_again(run: Run) -> None:
    run.save_checkpoint(1, state_of(1))
    before = (run.folder / "config.toml").read_text()
    with pytest.raises(RunError, match=r"already holds a run.*resume\("):
        runs.start(run.config.replace(steps=9), run.folder)
    assert (run.folder / "config.toml").read_text() == before


def test_a_folder_that_holds_other_files_is_refused_and_left_alone(
    tmp_path: Path, photos: str, make_config: Make
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(RunError, match="not empty"):
        runs.start(make_config("toybox", photos), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_run_started_twice_is_resumed_with_the_second_config(
    tmp_path: Path, photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(photos).parent)
    config = make_config("toybox", Path(photos).name, prior_weight=1.0)
    started = runs.start_or_resume(config, tmp_path / "run")
    assert started.config.subject.photos == photos
    again = runs.start_or_resume(config.replace(prior_weight=0.5, steps=9), tmp_path / "run")
    assert again.config == started.config.replace(prior_weight=0.5, steps=9)
    assert runs.resume(tmp_path / "run") == again


def test_a_run_stays_where_it_is_when_the_working_folder_changes(
    tmp_path: Path, photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    started = runs.start(make_config("toybox", photos), "run")
    resumed = runs.resume("run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert started.folder == resumed.folder == tmp_path / "run"
    assert runs.resume(resumed, steps=7).config.steps == 7, "by the run itself"
    assert runs.resume(tmp_path / "run").config.steps == 7


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("subject.class_noun", "cat", "with class noun 'dog', but your settings have 'cat'"),
        ("subject.identifier", "hta", "with identifier 'ohwx', but your settings have 'hta'"),
        ("train_text_encoder", True, "with train_text_encoder false, but your settings have true"),
        ("clip_skip", 2, "without clip_skip, but your settings have 2"),
    ],
)
def test_a_run_of_another_subject_or_method_is_not_resumed(
    field: str, value: Any, said: str, run: Run
) -> None:
    name, of_subject = field.removeprefix("subject."), field.startswith("subject.")
    subject = dataclasses.replace(run.config.subject, **({name: value} if of_subject else {}))
    config = run.config.replace(subject=subject, **({} if of_subject else {name: value}))
    run.save_checkpoint(1, state_of(1))
    with pytest.raises(RunError, match=rf"holds a run {said}; choose another folder for a new run"):
        runs.start_or_resume(config, run.folder)
    changes = {"subject": subject} if of_subject else {name: value}
    with pytest.raises(RunError, match=rf"holds a run {said}; start a new run for that"):
        runs.resume(run.folder, **changes)
    assert runs.resume(run.folder) == run


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "model": {}}


def finish(run: Run, step: int) -> None:
    run.save_checkpoint(step, state_of(step))
    run.pipeline.mkdir()
    (run.pipeline / "model_index.json").write_text("{}")


def test_a_finished_run_keeps_the_settings_it_was_trained_with(run: Run) -> None:
    finish(run, 4)
    assert runs.start_or_resume(run.config, run.folder) == run, "nothing is changed"
    with pytest.raises(RunError, match=r"finished with prior_weight 1.0, but .* have 0.5; start"):
        runs.start_or_resume(run.config.replace(prior_weight=0.5, steps=9), run.folder)
    assert runs.resume(run.folder) == run
    assert runs.start_or_resume(run.config.replace(steps=9), run.folder).config.steps == 9


@pytest.mark.parametrize("has_pipeline", [True, False])
def test_a_finished_run_is_not_resumed_with_other_photos_captions_crops_or_masks(
    has_pipeline: bool, tmp_path: Path, make_config: Make
) -> None:
    """A large pipeline is not backed up, so that a restored run has none."""
    place = Path(save_photos(tmp_path / "rex"))
    config = make_config("toybox", str(place), steps=4, crop="subject", background_weight=0.1)
    run = runs.start(config, tmp_path / "run")
    photo_record.note(run.folder, read_photos(place), config)
    finish(run, 4)
    if not has_pipeline:
        shutil.rmtree(run.pipeline)
    assert runs.start_or_resume(config, run.folder) == run
    mask = Image.new("L", (24, 20))
    mask.paste(255, (0, 0, 24, 10))
    changes: dict[str, Callable[[], Any]] = {
        "captions": lambda: (place / "1.txt").write_text("a {} dog in the snow"),
        "captions and crops": lambda: (place / "crops.json").write_text('{"2.png": [0.2, 0.5]}'),
        "captions, crops and masks": lambda: mask.save(place / "3-masklabel.png"),
        "photos": lambda: Image.new("RGB", (24, 20), "red").save(place / "0.png"),
    }
    for words, change in changes.items():
        change()
        why = rf"trained with other {words} than .*rex has now; choose another folder"
        with pytest.raises(RunError, match=why):
            runs.start_or_resume(config, run.folder)
    shutil.rmtree(place)
    assert runs.start_or_resume(config, run.folder) == run, "there is nothing to compare"


def test_a_note_of_an_earlier_version_is_compared_by_what_it_has(
    tmp_path: Path, make_config: Make
) -> None:
    place = Path(save_photos(tmp_path / "rex"))
    run = runs.start(make_config("toybox", str(place), steps=4), tmp_path / "run")
    note = {"digests": photo_record.digests_of(read_photos(place))}
    (run.folder / "photo_digests.json").write_text(json.dumps(note))
    finish(run, 4)
    (place / "1.txt").write_text("a {} dog in the snow")
    assert runs.start_or_resume(run.config, run.folder) == run
    (place / "3.png").unlink()
    with pytest.raises(RunError, match="trained with other photos than"):
        runs.start_or_resume(run.config, run.folder)


def test_a_run_at_its_last_step_keeps_its_settings_without_its_pipeline(run: Run) -> None:
    run.save_checkpoint(4, state_of(4))
    assert not run.finished and runs.start_or_resume(run.config, run.folder) == run
    with pytest.raises(RunError, match=r"its last step with prior_weight 1.0, but .* have 0.5;"):
        runs.start_or_resume(run.config.replace(prior_weight=0.5), run.folder)
    assert runs.why_not_resumable(run.config.replace(prior_weight=0.5, steps=9), run.folder)
    saved_on_less = run.config.replace(memory="low", checkpoints_kept=5, steps=9)
    assert runs.start_or_resume(saved_on_less, run.folder).config.memory == "low"


def test_a_run_that_stopped_early_keeps_its_settings_without_its_pipeline(run: Run) -> None:
    run = runs.resume(run.folder, early_stop=True, validate_every=1)
    run.save_checkpoint(3, state_of(3))
    (run.folder / MADE_WITH_FILE).write_text('{"step": 3}')
    changed = run.config.replace(prior_weight=0.5)
    with pytest.raises(RunError, match=r"its last step with prior_weight 1.0, but .* have 0.5;"):
        runs.start_or_resume(changed, run.folder)
    assert runs.why_not_resumable(changed.replace(early_stop=False), run.folder) is None
    (run.folder / MADE_WITH_FILE).write_text('{"step": 2}')  # resumed since
    assert runs.why_not_resumable(changed, run.folder) is None


def test_a_run_cannot_be_made_shorter_than_it_is(run: Run) -> None:
    run.save_checkpoint(3, state_of(3))
    with pytest.raises(RunError, match=r"is already at step 3, beyond steps 2; raise steps"):
        runs.start_or_resume(run.config.replace(steps=2), run.folder)
    assert runs.resume(run.folder) == run
    assert runs.start_or_resume(run.config.replace(steps=3), run.folder).config.steps == 3


def test_a_run_starts_in_an_empty_folder(tmp_path: Path, photos: str, make_config: Make) -> None:
    (tmp_path / "empty").mkdir()
    run = runs.start(make_config("toybox", photos), tmp_path / "empty")
    assert runs.resume(tmp_path / "empty") == run


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_run_is_not_resumed(exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"not a run.*config\.toml"):
        runs.resume(tmp_path / "folder")


def test_changes_on_resuming_are_saved(run: Run) -> None:
    changed = runs.resume(run.folder, steps=99, learning_rate=1e-5)
    assert (changed.config.steps, changed.config.learning_rate) == (99, 1e-5)
    assert runs.resume(run.folder) == changed


def test_an_invalid_change_is_refused_and_not_saved(run: Run) -> None:
    with pytest.raises(ConfigError, match="steps"):
        runs.resume(run.folder, steps=0)
    assert runs.resume(run.folder) == run


def test_a_run_with_relative_paths_is_resumed_from_any_folder(
    tmp_path: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("photos", "class", "base"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    runs.start(make_config("base", "photos", class_folder="class"), "run")
    monkeypatch.chdir("/")
    config = runs.resume(tmp_path / "run").config
    assert config.subject.photos == str(tmp_path / "photos")
    assert config.class_folder == str(tmp_path / "class")
    assert config.base == str(tmp_path / "base")


@pytest.mark.parametrize("base", ["toybox", "owner/name"])
def test_base_names_are_not_taken_for_paths(
    base: str, tmp_path: Path, photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toybox").mkdir()
    monkeypatch.chdir(tmp_path)
    assert runs.start(make_config(base, photos), "run").config.base == base


def test_the_log_is_read_row_by_row(run: Run) -> None:
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 5e-324, "prior_loss": None}]
    for row in rows:
        run.append("log", row)
    assert run.rows("log") == rows


def test_a_half_written_row_is_left_out_and_later_rows_are_complete(run: Run) -> None:
    run.append("log", {"step": 1})
    with (run.folder / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.rows("log") == [{"step": 1}]
    run.truncate("log", 1)
    run.append("log", {"step": 2})
    assert run.rows("log") == [{"step": 1}, {"step": 2}]


def test_truncating_the_log_drops_exactly_the_later_rows(run: Run) -> None:
    for step in range(1, 6):
        run.append("log", {"step": step})
    run.truncate("log", 3)
    assert [row["step"] for row in run.rows("log")] == [1, 2, 3]
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    run.truncate("log", 0)
    assert run.rows("log") == []


def test_the_newest_checkpoints_stay_and_the_newest_is_loaded(run: Run) -> None:
    for step in (8, 9, 10, 11):
        run.save_checkpoint(step, state_of(step))
    assert list(run.checkpoints()) == [10, 11]
    assert run.load_checkpoint() == state_of(11)


def test_checkpoints_are_ordered_by_number_beyond_six_digits(run: Run) -> None:
    for step in (999_999, 1_000_000):
        run.save_checkpoint(step, state_of(step))
    assert run.load_checkpoint() == state_of(1_000_000)


def test_a_half_written_checkpoint_is_ignored(run: Run) -> None:
    run.save_checkpoint(2, state_of(2))
    partial = run.folder / "checkpoints" / ".000004.partial"
    partial.mkdir()
    (partial / "tensors.safetensors").write_bytes(b"half")
    assert list(run.checkpoints()) == [2]
    assert run.load_checkpoint() == state_of(2)
    run.save_checkpoint(4, state_of(4))
    assert not partial.exists()
    assert run.load_checkpoint() == state_of(4)


def test_a_finished_run_with_earlier_defaults_is_resumed(
    tmp_path: Path, photos: str, make_config: Make
) -> None:
    config = make_config("toybox", photos)
    run = runs.start(config.replace(checkpoint_every=100), tmp_path / "run")
    run.pipeline.mkdir()
    (run.pipeline / "model_index.json").write_text("{}")
    assert runs.why_not_resumable(config, run.folder) is None
    assert runs.start_or_resume(config, run.folder).config.checkpoint_every == 100
    why = str(runs.why_not_resumable(config.replace(checkpoint_every=7), run.folder))
    assert "checkpoint_every 100" in why


def test_only_the_newest_checkpoint_has_the_optimizers_state(run: Run) -> None:
    moments = {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": []}
    for step in (1, 2, 3, 4):
        state = {"step": step, "model": {"w": torch.full((4,), step)}, "optimizer": moments}
        run.save_checkpoint(step, state, best=1)
    assert list(run.checkpoints()) == [1, 3, 4]
    states = {step: load_state(path) for step, path in run.checkpoints().items()}
    assert {step for step, state in states.items() if "optimizer" in state} == {4}
    assert all(state["model"]["w"].tolist() == [step] * 4 for step, state in states.items())
    loaded = run.load_checkpoint()
    assert loaded is not None and loaded["step"] == 4 and "optimizer" in loaded
    shutil.rmtree(run.checkpoints()[4])
    loaded = run.load_checkpoint()
    assert loaded is not None and loaded["step"] == 3 and "optimizer" not in loaded


def test_a_failed_write_keeps_all_older_checkpoints(run: Run) -> None:
    for step in (1, 2):
        run.save_checkpoint(step, state_of(step))
    with pytest.raises(TypeError):
        run.save_checkpoint(3, {"step": object()})
    assert list(run.checkpoints()) == [1, 2]
    assert run.load_checkpoint() == state_of(2)


def test_the_first_difference_names_both_values() -> None:
    old, new = {"steps": 4, "seed": 0, "gone": 1}, {"steps": 4, "seed": 1}
    said = "with seed 0, but your settings have 1"
    assert str(config_changes.first_difference(old, new)) == said
    gone = config_changes.first_difference(old, new, ["seed"])
    assert str(gone) == "with gone 1, but your settings have none"
    came = config_changes.first_difference(new, old, ["seed"])
    assert str(came) == "without gone, but your settings have 1"
    assert config_changes.first_difference(old, new, ["seed", "gone"]) is None
