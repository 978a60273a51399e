"""Several processes on CPUs: that they are several, train as one does, and end together."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TWO, launched
from safetensors.torch import load_file
from test_masks import left_half, picture

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.processes import LaunchError, join_group
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import train

Make = Callable[..., TrainConfig]

#: Does one job after another in the same group; each process writes down how many it saw.
JOBS = """
import json, sys
from itertools import islice
from pathlib import Path

from dreambooth_lib import __main__ as command
from dreambooth_lib.training import runs, loop
from dreambooth_lib.core.processes import join_group

folder = Path(sys.argv[1])
state = join_group()
(folder / f"rank{state.process_index}").write_text(str(state.num_processes))
for name, steps in json.loads((folder / "jobs.json").read_text()):
    if steps is None:
        words = ["train", str(folder / f"{name}.toml"), "--out", str(folder / "two" / name)]
        command.run_train(command.parser().parse_args(words))
    elif steps == "resume":
        command.run_training(runs.resume(folder / "two" / name))
    else:
        if state.is_main_process:
            config = loop.TrainConfig.from_toml(folder / f"{name}.toml")
            runs.start(config, folder / "two" / name)
        state.wait_for_everyone()
        list(islice(loop.train(runs.resume(folder / "two" / name)), steps))
        state.wait_for_everyone()
state.destroy_process_group()  # a process that ends before the other can abort without it
"""


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    found = [load_file(file) for file in (folder / part).glob("*.safetensors")]
    return found[0] if found else {}


def assert_same_training(one: Path, two: Path, base: str, parts: list[str]) -> None:
    """Losses agree to float32's noise; weights are much nearer to each other than to the base's."""
    logs = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for row, other in zip(*logs, strict=True):
        for name in ("loss", "instance_loss", "prior_loss", "lr"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), (two, row["step"], name)
    for part in parts:
        ours, theirs = weights(one / "pipeline", part), weights(two / "pipeline", part)
        before = weights(Path(base), part) or dict.fromkeys(ours, torch.zeros(()))
        assert ours.keys() == theirs.keys() and ours
        moved = sum(float((ours[k] - before[k]).abs().sum()) for k in ours)
        apart = sum(float((ours[k] - theirs[k]).abs().sum()) for k in ours)
        assert moved > 0 and apart < 0.05 * moved, (two, part, apart / moved)


#: What two processes train, by name: base, settings, and the trained parts' folders.
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "sd1": (
        "sd1",
        {
            "train_text_encoder": True,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "validate_every": 2,
        },
        ["unet", "text_encoder"],
    ),
    "buckets and masks": (
        "sd1",
        {"crop": "buckets", "background_weight": 0.3, "flip": True, "resolution": 32},
        ["unet"],
    ),
    "distilled": (
        "sd1",
        {
            "prior": "distilled",
            "prior_prompts": ("a car", ""),
            "anchor_weight": 1.0,
            "gradient_checkpointing": True,
            "ema_decay": 0.9,
        },
        ["unet"],
    ),
    "sdxl": ("sdxl", {"train_text_encoder": True}, ["unet", "text_encoder", "text_encoder_2"]),
    "sdxl_lora": (
        "sdxl",
        {"train_text_encoder": True, "train_token": True, "method": "lora"},
        ["", "word"],
    ),
    "sd3": ("sd3", {"train_text_encoder": True}, ["transformer", "text_encoder", "text_encoder_2"]),
}


def save_mixed(folder: Path) -> str:
    """Save photos of three shapes, two of them with a mask; return the folder's path."""
    folder.mkdir()
    for number, size in enumerate([(24, 40), (48, 30), (32, 32), (24, 40)]):
        picture(number, size).save(folder / f"{number}.png")
    for number, size in enumerate([(24, 40), (48, 30)]):
        left_half(size).save(folder / f"{number}-masklabel.png")
    return str(folder)


@pytest.mark.slow
def test_two_processes_train_as_one_does(
    tmp_path: Path, tiny_bases: Any, photos: str, clip_folder: Path, make_config: Make
) -> None:
    jobs: list[tuple[str, Any]] = []
    for name, (base, settings, _) in CASES.items():
        judge = {"scorer": str(clip_folder)} if "validate_every" in settings else {}
        config = make_config(tiny_bases(base), photos, steps=3, **settings, **judge)
        if config.train_token:  # which the base must not have already
            config = replace(config, subject=replace(config.subject, identifier="<rex>"))
        if "crop" in settings:
            mixed = save_mixed(tmp_path / "mixed")
            config = replace(config, subject=replace(config.subject, photos=mixed))
        (tmp_path / f"{name}.toml").write_text(config.to_toml())
        jobs.append((name, None))
    whole = make_config(tiny_bases("sd1"), photos, steps=4, lr_schedule="cosine")
    for name in ("reference", "stopped", "stopped_by_two", "stopped_by_one"):
        (tmp_path / f"{name}.toml").write_text(whole.to_toml())
    jobs += [("stopped", 2), ("stopped", "resume"), ("stopped_by_two", 2)]
    half = runs.start(whole, tmp_path / "two" / "stopped_by_one")
    for step in train(half):
        if step.step == 2:
            break
    jobs += [("stopped_by_one", "resume")]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "jobs.py").write_text(JOBS)
    made = launched(*TWO, str(tmp_path / "jobs.py"), str(tmp_path))
    assert made.returncode == 0, made.stderr[:8000]
    assert [(tmp_path / f"rank{n}").read_text() for n in range(2)] == ["2", "2"]
    list(train(runs.resume(tmp_path / "two" / "stopped_by_two")))
    for name in [*CASES, "reference"]:
        run = runs.start(TrainConfig.from_toml(tmp_path / f"{name}.toml"), tmp_path / "one" / name)
        list(train(run))
    for name, (base, _, parts) in CASES.items():
        assert_same_training(
            tmp_path / "one" / name, tmp_path / "two" / name, tiny_bases(base), parts
        )
    for name in ("stopped", "stopped_by_two", "stopped_by_one"):
        reference = tmp_path / "one" / "reference"
        assert_same_training(reference, tmp_path / "two" / name, tiny_bases("sd1"), ["unet"])


#: Fails in the first process alone: while it validates, or in the loop of who trains.
FAILS = """
import sys

from dreambooth_lib.training import runs, loop, validation_record
from dreambooth_lib.core.processes import join_group

kind, folder = sys.argv[1:]
first = join_group().is_main_process


def fail(*given):
    raise RuntimeError("only the first one fails")


if kind == "validating" and first:
    validation_record.Validator.validate = fail
for step in loop.train(runs.resume(folder)):
    if kind == "looping" and first and step.step == 2:
        fail()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["validating", "looping"])
def test_an_error_in_one_process_ends_all(
    kind: str, tmp_path: Path, tiny_sd1: str, photos: str, clip_folder: Path, make_config: Make
) -> None:
    config = make_config(
        tiny_sd1, photos, steps=8, prior_weight=0, validate_every=4, scorer=str(clip_folder)
    )
    run = runs.start(config, tmp_path / "run")
    (tmp_path / "fails.py").write_text(FAILS)
    made = launched(*TWO, str(tmp_path / "fails.py"), kind, str(run.folder))  # in time
    assert made.returncode == 1
    assert "[rank0]: RuntimeError: only the first one fails" in made.stderr
    assert list(run.checkpoints()) == ([2] if kind == "looping" else [])


def test_one_process_of_accelerates_where_two_were_asked_for_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    def environment(*words: str) -> dict[str, str]:
        given = launch_command_parser().parse_args([*words, "--dynamo_backend", "no", "train.py"])
        return prepare_simple_launcher_cmd_env(_validate_launch_command(given)[0])[1]

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    words = ("--cpu", "--num_machines", "1", "--mixed_precision", "no", "--num_processes")
    one, two = environment(*words, "1"), environment(*words, "2")
    with monkeypatch.context() as patch:
        for name in one.keys() - os.environ.keys():
            patch.setenv(name, one[name])
        assert join_group().num_processes == 1
    for name in two.keys() - os.environ.keys():
        monkeypatch.setenv(name, two[name])
    with pytest.raises(LaunchError, match=r"started only one process.*'torchrun --standalone"):
        join_group()


def test_a_mac_trains_on_its_cpu() -> None:
    # Its GPU has no 8-bit AdamW, and what is copied to it may be read too early.
    code = (
        "import torch\n"
        "torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True\n"
        "from dreambooth_lib.core.processes import join_group\n"
        "print(join_group().device.type)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["cpu"]


def test_processes_that_form_no_group_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_group().num_processes == 1  # of this test
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="2 processes were started and cannot form a group"):
        join_group()


def test_more_processes_than_gpus_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match="4 processes were started for 2 GPUs"):
        join_group()
