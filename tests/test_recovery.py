"""Test that a run survives damaged files, other processes, signals and full disks.

Each damage ends in the result of an undamaged run, or in a sentence; never in other weights.
"""

import errno
import fcntl
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.bench import nursery
from PIL import Image
from safetensors.torch import load_file

from dreambooth_lib.core import digests, disk
from dreambooth_lib.core.checked_json import append_row, read_rows
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.locks import LockError, lock
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families.loading import BaseError
from dreambooth_lib.training import runs, sampling
from dreambooth_lib.training.checkpoints import CheckpointError, load_state, save_state
from dreambooth_lib.training.interrupts import Terminated, defer_interrupts, raise_on_termination
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation_record import (
    history,
    images_folder,
    load_all_images,
    load_images,
)

Start = Callable[..., Run]


def trained(run: Run, steps: int | None = None) -> Run:
    """Train a run to its end, or for some steps, and open it again."""
    training = train(run)
    for step in training:
        if step.step == steps:
            break
    training.close()
    return runs.resume(run.folder)


def bits(run: Run) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's newest checkpoint."""
    newest = list(run.checkpoints().values())[-1]
    return load_file(newest / "tensors.safetensors") | load_file(newest / "optimizer.safetensors")


def same_bits(one: Run, other: Run) -> bool:
    first, second = bits(one), bits(other)
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def flip(file: Path, place: float = 0.7) -> None:
    """Flip a bit in a file."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 16
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero_tail(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.fixture
def run(start_run: Start) -> Run:
    """A run of four steps that stands at step 2, with checkpoints of steps 1 and 2."""
    return trained(start_run("run", "sd1", steps=4, checkpoint_every=1), 2)


TENSORS, OPTIMIZER = "tensors.safetensors", "optimizer.safetensors"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the weights flipped": lambda folder: flip(folder / TENSORS),
    "a bit of the optimizer flipped": lambda folder: flip(folder / OPTIMIZER),
    "the weights cut short": lambda folder: cut(folder / TENSORS),
    "the weights' tail zeroed": lambda folder: zero_tail(folder / TENSORS),
    "the optimizer gone": lambda folder: (folder / OPTIMIZER).unlink(),
    "the weights gone": lambda folder: (folder / TENSORS).unlink(),
    "the digests cut": lambda folder: cut(folder / "digests.json"),
    "null for a state": lambda folder: (folder / "state.json").write_text("null"),
    "another step in the state": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 2', '"step": 1')
    ),
    "the weights of step 1": lambda folder: shutil.copy(
        folder.with_name("000001") / TENSORS, folder / TENSORS
    ),
    "all of step 1": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name("000001"), folder),
    ),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(
    damage: str, run: Run
) -> None:
    newest = run.checkpoints()[2]
    before = load_state(run.checkpoints()[1], ("model",))["model"]
    DAMAGES[damage](newest)
    with pytest.warns(UserWarning, match=rf"{newest} is .*continues from step 1\."):
        trainer = Trainer(run)
    assert trainer.step == 1
    weights = trainer.trainable.trained_weights()
    assert all(weights[name].equal(value) for name, value in before.items())
    assert newest.with_name("damaged-000002").is_dir() and 2 not in run.checkpoints()
    assert [step.step for step in train(run)] == [2, 3, 4]


@pytest.mark.parametrize("name", ["000006 (1)", "000005.tmp", "notes", "²²²²²²"])
def test_what_is_no_checkpoint_is_passed_over(name: str, run: Run) -> None:
    (run.folder / "checkpoints" / name).mkdir()
    (run.folder / "checkpoints" / "000009").write_text("a file")
    assert [step.step for step in train(run)] == [3, 4]


def test_a_run_without_a_whole_checkpoint_is_not_begun_again_in_silence(run: Run) -> None:
    for folder in run.checkpoints().values():
        flip(folder / TENSORS)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"000002 is damaged.*delete {run.folder}"):
            list(train(run))


def test_a_checkpoint_without_digests_of_an_earlier_version_is_read_and_its_damage_told(
    run: Run,
) -> None:
    for folder in run.checkpoints().values():
        (folder / "digests.json").unlink()
    assert run.load_checkpoint() is not None
    cut(run.checkpoints()[2] / TENSORS)
    with pytest.warns(UserWarning, match=r"000002 is damaged \(SafetensorError"):
        state = run.load_checkpoint()
    assert state is not None and state["step"] == 1


def test_a_checkpoint_that_the_disk_no_longer_reads_is_set_aside(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = digests.file_digest

    def fail(file: Path) -> str:
        if file.parent.name == "000002":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file)

    monkeypatch.setattr(digests, "file_digest", fail)
    with pytest.warns(UserWarning, match=r"000002 is damaged \(OSError.*continues from step 1"):
        state = run.load_checkpoint()
    assert state is not None and state["step"] == 1


# Logs, validations and caches.


@pytest.mark.parametrize(
    "row", ['{"step": 1, "loss"', "", "\0\0\0", "[[[[", "[]", '{"loss": 3}', "[" * 100_000]
)
def test_a_damaged_log_row_is_left_out_with_a_warning(row: str, run: Run) -> None:
    log = run.folder / "log.jsonl"
    log.write_text(f"{log.read_text()}{row}\n")
    assert [row["step"] for row in run.log()] == [1, 2]
    if row != '{"loss": 3}':  # of another program: a row, but not one of a step
        with pytest.warns(UserWarning, match=r"1 damaged rows of log\.jsonl"):
            trained(run)
        assert [row["step"] for row in run.log()] == [1, 2, 3, 4]


def test_a_digit_that_changed_in_a_row_is_noticed(run: Run) -> None:
    log = run.folder / "log.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 7', 1))
    assert [row["step"] for row in run.log()] == [2]


def test_a_line_after_half_a_line_is_whole(tmp_path: Path) -> None:
    append_row(tmp_path / "rows.jsonl", {"file": "a"})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"file": "b", "dig')  # where the process was killed
    append_row(tmp_path / "rows.jsonl", {"file": "c"})
    rows, damaged = read_rows(tmp_path / "rows.jsonl")
    assert [row["file"] for row in rows] == ["a", "c"] and damaged == 1


@pytest.fixture
def validated(start_run: Start, clip_folder: Path) -> Callable[[str], Run]:
    """Return a function that trains two of four steps of a run that validates each."""

    def make(name: str) -> Run:
        changes = {"validate_every": 1, "scorer": str(clip_folder), "steps": 4}
        return trained(start_run(name, "sd1", **changes), 2)

    return make


VALIDATION_DAMAGES: dict[str, Callable[[Run], object]] = {
    "an image of the base flipped": lambda run: flip(images_folder(run, 0) / "subject-0.png"),
    "an image of the base gone": lambda run: (images_folder(run, 0) / "class-0.png").unlink(),
    "the base's folder gone": lambda run: shutil.rmtree(images_folder(run, 0)),
    "the base's row cut": lambda run: (run.folder / "validation.jsonl").write_text(
        (run.folder / "validation.jsonl").read_text()[9:]
    ),
    "the plan cut": lambda run: cut(run.folder / "validation" / "plan.json"),
    "another plan": lambda run: (run.folder / "validation" / "plan.json").write_text(
        (run.folder / "validation" / "plan.json").read_text().replace("3", "2")
    ),
    "no plan": lambda run: (run.folder / "validation" / "plan.json").unlink(),
}


@pytest.mark.parametrize("damage", VALIDATION_DAMAGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_validation_of_the_base_is_made_again(
    damage: str, validated: Callable[[str], Run]
) -> None:
    run, whole = validated("run"), validated("whole")
    VALIDATION_DAMAGES[damage](run)
    run, whole = trained(run), trained(whole)
    assert [row.step for row in history(run)] == [0, 1, 2, 3, 4]
    for a, b in zip(history(run), history(whole), strict=True):
        assert (a.step, a.prior_drift, a.subject_fidelity) == (
            b.step, b.prior_drift, b.subject_fidelity,
        )  # fmt: skip
    pairs = zip(load_images(run, 0).subject, load_images(whole, 0).subject, strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)


def test_a_damaged_validation_image_is_named(validated: Callable[[str], Run]) -> None:
    run = validated("run")
    flip(images_folder(run, 1) / "subject-2.png")
    with pytest.raises(RunError, match=r"000001/subject-2\.png is missing or damaged"):
        load_images(run, 1)
    with pytest.warns(UserWarning, match="step 1 is not shown"):
        assert list(load_all_images(run)) == [0, 2]


CACHE_DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit flipped": flip,
    "cut": cut,
    "empty": lambda file: file.write_bytes(b""),
    "another cache": lambda file: file.write_bytes(b"<html>"),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGES)
def test_damaged_latents_are_encoded_again(damage: str, start_run: Start) -> None:
    run = trained(start_run("run", "sd1"))
    latents = list((run.folder.parent / "latents").iterdir())
    whole = [file.read_bytes() for file in latents]
    assert latents
    for file in latents:
        CACHE_DAMAGES[damage](file)
    again = trained(start_run("again", "sd1"))
    assert same_bits(run, again) and [file.read_bytes() for file in latents] == whole


def test_latents_of_other_images_are_not_taken(start_run: Start) -> None:
    run = trained(start_run("run", "sd1"))
    one, other = sorted((run.folder.parent / "latents").iterdir())
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    assert same_bits(run, trained(start_run("again", "sd1")))


def test_what_a_killed_process_was_writing_is_removed(run: Run) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    places = [run.folder, run.folder.parent / "class_images", run.folder.parent / "latents"]
    left = [place / f".file.{dead.pid}.partial" for place in places]
    living = places[1] / f".file.{os.getpid()}.partial"
    for file in (*left, living):
        file.write_text("half")
    trained(run)
    assert not any(file.exists() for file in left)
    assert living.exists(), "another run may draw class images at the same time"


@pytest.mark.parametrize("damage", [*CACHE_DAMAGES, "another picture", "gone"])
def test_a_damaged_class_image_is_drawn_again(damage: str, start_run: Start) -> None:
    run = trained(start_run("run", "sd1"))
    (folder,) = (run.folder.parent / "class_images").iterdir()
    image, whole = folder / "00001.png", (folder / "00001.png").read_bytes()
    if damage == "another picture":
        Image.new("RGB", (16, 16), "red").save(image)
    elif damage == "gone":
        image.unlink()
    else:
        CACHE_DAMAGES[damage](image)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = trained(start_run("again", "sd1"))
    told = [str(w.message) for w in caught if "are generated again: 00001.png" in str(w.message)]
    assert len(told) == (damage != "gone")
    assert same_bits(run, again) and image.read_bytes() == whole


def test_other_files_among_class_images_are_passed_over(start_run: Start) -> None:
    run = trained(start_run("run", "sd1"))
    (folder,) = (run.folder.parent / "class_images").iterdir()
    Image.new("RGB", (16, 16), "red").save(folder / "00000 (1).png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "00001.txt").write_text("a caption of something else")
    (folder / "metadata.csv").write_text("file_name,text\nno.png,a cat\n")
    (folder / "manifest.json").write_text("{")
    assert same_bits(run, trained(start_run("again", "sd1")))
    assert json.loads((folder / "manifest.json").read_text())["prompt"] == "a dog"


def test_a_missing_scorer_is_told_before_class_images_are_drawn(start_run: Start) -> None:
    run = start_run("run", "sd1", validate_every=1, scorer="no-such-folder/clip")
    with pytest.raises(ConfigError, match="no-such-folder/clip"):
        list(train(run))
    assert not (run.folder.parent / "class_images").exists()


# Changes at a resume.


@pytest.mark.parametrize(
    "changes", [{"lora_rank": 4}, {"method": "full"}, {"train_text_encoder": True}, {"dora": True}]
)
def test_a_change_that_checkpoints_do_not_fit_is_refused_and_not_written(
    changes: dict[str, Any], start_run: Start
) -> None:
    run = trained(start_run("run", "sd1", method="lora"), 1)
    before = (run.folder / "config.toml").read_bytes()
    with pytest.raises(RunError, match=rf"a run with {next(iter(changes))} .*; start a new run"):
        runs.resume(run.folder, **changes)
    assert (run.folder / "config.toml").read_bytes() == before
    assert [step.step for step in train(runs.resume(run.folder))] == [2]


def test_the_scorer_stays_once_a_run_has_validated(validated: Callable[[str], Run]) -> None:
    run = validated("run")
    with pytest.raises(RunError, match="a run with scorer "):
        runs.resume(run.folder, scorer="toybox")


def test_a_config_edited_by_hand_counts_and_is_told(run: Run) -> None:
    file = run.folder / "config.toml"
    file.write_text(file.read_text().replace("learning_rate = 0.001", "learning_rate = 0.002"))
    with pytest.warns(UserWarning, match=r"config\.toml was changed after it was written"):
        assert runs.resume(run.folder).config.learning_rate == 0.002
    changed = file.read_text().replace('method = "full"', 'method = "lora"')
    file.write_text(changed)
    with (
        pytest.warns(UserWarning),
        pytest.raises(RunError, match=r"undo the change of its config\.toml"),
    ):
        list(train(runs.resume(run.folder)))


def test_photos_that_were_moved_are_given_anew(run: Run, photos: str, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "moved")
    from dataclasses import replace

    subject = replace(run.config.subject, photos=str(tmp_path / "moved"))
    assert runs.resume(run.folder, subject=subject).config.subject == subject


def test_a_first_try_that_failed_can_be_begun_again(
    tmp_path: Path, photos: str, make_config: Callable[..., TrainConfig], tiny_sd1: str
) -> None:
    bad, good = make_config("no/such/base", photos), make_config(tiny_sd1, photos)
    run = runs.start(bad, tmp_path / "run")
    (run.folder / "log.jsonl").write_text("{}\n")
    (run.folder / ".config.toml.1234.partial").write_text("of a try that was killed")
    assert runs.start(good, tmp_path / "run").config == good
    assert not (run.folder / "log.jsonl").exists()
    (run.folder / "config.toml").write_text("steps = ")
    assert runs.start_or_resume(good, tmp_path / "run").config == good
    assert [step.step for step in train(runs.resume(run.folder))] == [1, 2, 3, 4]


def test_a_finished_run_whose_extension_fails_keeps_its_pipeline(
    start_run: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(start_run("run", "sd1"))
    before = (run.pipeline / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    extended = runs.resume(run.folder, steps=4)
    with monkeypatch.context() as broken:
        broken.setattr(Run, "append", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(train(extended))
    run = runs.resume(run.folder)
    assert run.has_pipeline and not run.finished
    assert (run.pipeline / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert runs.resume(run.folder, steps=2).finished


def test_a_caption_that_the_base_does_not_read_to_its_end_is_told(
    start_run: Start, photos: str, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "captioned")
    first = sorted(path.stem for path in (tmp_path / "captioned").iterdir())[0]
    (tmp_path / "captioned" / f"{first}.txt").write_text("a {} dog " + "in the snow " * 4)
    subject = Subject(str(tmp_path / "captioned"), "dog")
    with pytest.warns(UserWarning, match=rf"the caption of {first}.* from '.*snow' on is cut off"):
        trained(start_run("run", "sd1", subject=subject))


def test_a_damaged_pipeline_is_neither_drawn_from_nor_trained_on(start_run: Start) -> None:
    whole, lora = (
        trained(start_run("whole", "sd1")),
        trained(start_run("lora", "sd1", method="lora")),
    )
    for run in (whole, lora):
        sampling.sample(run, ["a dog"], [0], steps=1)
        flip(next(run.pipeline.rglob("*.safetensors")))
        for source in (run, str(run.folder)):
            with pytest.raises(BaseError, match=r"safetensors has changed since it was saved"):
                sampling.sample(source, ["a dog"], [0], steps=1)
    with pytest.raises(BaseError, match="has changed"):
        sampling.compose({lora: 1.0})


# Processes and signals.

HOLDER = """
import sys, time
from pathlib import Path
from dreambooth_lib.core.locks import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(run: Run) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(LockError, match=rf"{run.folder} is in use by another process"):
            next(train(run))
        with pytest.raises(LockError):
            runs.resume(run.folder, steps=9)
        assert runs.resume(run.folder).config.steps == 4
    finally:
        holder.kill()
        holder.wait()
    assert [step.step for step in train(run)] == [3, 4]


def test_an_abandoned_training_of_this_process_does_not_bar_the_next(run: Run) -> None:
    abandoned = train(run)
    assert next(abandoned).step == 3
    assert [step.step for step in train(run)] == [4]
    with lock(run.folder):
        pass


def test_a_thread_of_this_process_is_not_another_process(tmp_path: Path) -> None:
    def hold() -> str:
        with lock(tmp_path):
            return "held"

    with lock(tmp_path), ThreadPoolExecutor() as threads:
        assert threads.submit(hold).result(10) == "held"


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_a_drive_without_locks_is_used_without_one(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="on a drive without locks"), lock(tmp_path):
        pass


def test_a_drive_of_whose_locks_an_earlier_filelock_complains_is_used_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.warns(UserWarning, match="on a drive without locks"), lock(tmp_path):
        pass


def test_signals_are_kept_while_any_training_is_open() -> None:
    first, second = raise_on_termination(), raise_on_termination()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    second.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("interruptible")
def test_a_deferred_signal_is_not_lost_where_the_block_fails() -> None:
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise OSError


def resume_by_command(folder: Path, said: Path) -> None:
    """Run the command in a process of its own, which has signals as in a shell's foreground."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
    sys.argv = ["dreambooth_lib", "resume", str(folder)]
    runpy.run_module("dreambooth_lib", run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_first(
    number: signal.Signals, start_run: Start, tmp_path: Path
) -> None:
    run = start_run("run", "sd1", steps=100_000, checkpoint_every=100_000, prior="none")
    said = tmp_path / "said"
    process = nursery().Process(target=resume_by_command, args=(run.folder, said))
    process.start()
    deadline = time.monotonic() + 60
    while not run.log() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(60)
    reached = run.log()[-1]["step"]
    assert list(run.checkpoints()) == [reached], "the last update is saved"
    assert process.exitcode == 128 + number
    resume = f"'python -m dreambooth_lib resume {run.folder}'"
    assert f"interrupted; resume with {resume}" in said.read_text()


def test_signals_that_a_program_handles_are_left_to_it(run: Run) -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    try:
        training = train(run)
        next(training)
        signal.raise_signal(signal.SIGTERM)
        next(training)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [signal.SIGTERM]


# Disks.


def test_a_full_disk_stops_a_checkpoint_before_it_is_begun(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = train(run)
    next(training)
    monkeypatch.setattr(disk, "_free_bytes", lambda _: 100)
    with pytest.raises(DiskError) as told:
        list(training)
    assert re.search(
        r"000004 needs [\d.]+ MB, and its disk has 0\.0 MB free; free some space.*"
        r"The checkpoint of step 3 is safe; resume the run",
        str(told.value),
    )
    monkeypatch.undo()
    assert [step.step for step in train(run)] == [4]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_state_that_cannot_be_written_leaves_nothing_half_made(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match=rf"{tmp_path / 'state'} could not be written"):
        save_state(tmp_path / "state", {"step": 1, "model": {"w": torch.ones(3)}})
    assert list(tmp_path.iterdir()) == []


def test_files_are_flushed_as_windows_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "fsync", fsync)
    save_state(tmp_path / "state", {"step": 1, "model": {"w": torch.ones(3)}})
    replace_file(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_drive_that_is_gone_is_told_with_what_is_safe(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    training = train(run)
    next(training)
    monkeypatch.setattr(disk.shutil, "disk_usage", gone)
    with pytest.raises(DiskError, match=r"not connected.*checkpoint of step 3 is safe"):
        list(training)


def test_a_run_whose_folder_is_removed_ends_in_a_sentence(run: Run) -> None:
    training = train(run)
    next(training)
    shutil.rmtree(run.folder)
    with pytest.raises(DiskError, match=rf"{run.folder}.* could not be written.*folder is still"):
        list(training)


def test_a_run_in_a_place_that_cannot_be_written_ends_in_a_sentence(
    tmp_path: Path, photos: str, make_config: Callable[..., TrainConfig]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DiskError, match=rf"{tmp_path / 'file'}.* could not be written"):
        runs.start(make_config("toybox", photos), tmp_path / "file" / "run")


def test_a_log_that_cannot_be_read_is_named(run: Run) -> None:
    (run.folder / "log.jsonl").unlink()
    (run.folder / "log.jsonl").symlink_to("log.jsonl")  # to itself
    with pytest.raises(DiskError, match=r"log\.jsonl cannot be read .*; replace or delete it"):
        run.log()


def test_a_copy_of_a_validation_image_that_a_drive_made_is_passed_over(
    validated: Callable[[str], Run],
) -> None:
    run = validated("run")
    folder = images_folder(run, 1)
    shutil.copy(folder / "subject-0.png", folder / "subject-0 (1).png")
    assert len(load_images(run, 1).subject) == 4
    (folder / "digests.json").unlink()
    (folder / "subject-3.png").unlink()
    (folder / "subject-9.png").write_bytes((folder / "subject-0.png").read_bytes())
    with pytest.raises(RunError, match=r"subject-3\.png is missing or damaged"):
        load_images(run, 1)
