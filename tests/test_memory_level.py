"""What memory "auto" means: decided once on memory that is free, written down, kept, shared."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.evaluation import dreambench
from dreambooth_lib.evaluation.sweep import grid, sweep
from dreambooth_lib.training import memory_level, runs, trainable
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.memory_level import (
    USABLE_SHARE,
    choose_level,
    decide_level,
    share_level,
    with_level_for_now,
)
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation import ValidationPlan
from tools.bases import configs

Make = Callable[..., TrainConfig]
CUDA = torch.device("cuda")


@pytest.fixture
def config(photos: str, make_config: Make, tiny_sd1: str) -> Make:
    def make(**changes: Any) -> TrainConfig:
        # Drawing class images, which needs no gradients, is most of what a tiny base takes.
        fields = {"resolution": 16, "prior": "distilled", "mixed_precision": "fp16"}
        return make_config(tiny_sd1, photos, **(fields | changes))

    return make


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have this machine's CPU pass for a GPU of which so many bytes are free."""

    def make(free: float) -> None:
        monkeypatch.setattr(memory_level, "is_gpu", lambda device: True)
        monkeypatch.setattr(gpu_memory, "gpu_bytes", lambda device=None: (int(free), 16 * GIB))

    return make


def needs(config: TrainConfig) -> dict[str, int]:
    return {
        level: estimate(config.replace(memory=level), config.mixed_precision).memory
        for level in ("standard", "low", "lowest")
    }


def test_auto_takes_the_first_level_that_fits(config: Make) -> None:
    asked = config()
    assert asked.memory == "auto"
    for level, need in needs(asked).items():
        assert choose_level([asked], need) == {"memory": level}
    assert choose_level([asked], 1) == {"memory": "lowest"}
    assert choose_level([config(max_grad_norm=1.0)], 1) == {"memory": "standard"}


def test_what_an_earlier_run_left_in_the_allocator_counts_as_free(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4 on which torch has kept 10 GiB of an earlier run, none of it in use any more."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4.56 * GIB, 14.56 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert gpu_memory.gpu_bytes(CUDA)[0] == pytest.approx(14.56 * GIB)
    base = configs("sd15", tmp_path / "sd15")
    asked = TrainConfig(Subject(photos, "dog"), base)
    assert with_level_for_now(asked, CUDA).memory == "standard"
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6 * GIB)
    assert gpu_memory.gpu_bytes(CUDA)[0] == pytest.approx(8.56 * GIB), "that is still in use"


def test_garbage_of_an_earlier_run_is_collected_before_the_gpu_is_asked(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a trainer is, whose parts hold each other, when it has only just been let go of."""

    class Model:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()
    try:
        left = weakref.ref(Model())
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device: (1 if left() else 14 * GIB, 15 * GIB)
        )
        assert with_level_for_now(config(), CUDA).memory == "standard"
    finally:
        gc.enable()


def test_a_level_is_written_down_printed_once_and_kept(
    config: Make, gpu: Callable[[float], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, need = runs.start(config(), tmp_path / "run"), needs(config())
    gpu(need["low"] / USABLE_SHARE + 1)
    assert decide_level(run, CUDA).memory == "low"
    assert json.loads((run.folder / "memory.json").read_text()) == {"memory": "low"}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(
        "The run trains with memory 'low', which takes"
    )
    again = runs.resume(run.folder)
    assert again.config.memory == "auto", "as was asked"
    assert again.resolved_config.memory == "low"
    gpu(16 * GIB)
    assert decide_level(again, CUDA).memory == "low", "as it began"
    gpu(need["low"])  # it is there, and the margin that a first choice leaves is not needed
    assert decide_level(again, CUDA).memory == "low"
    assert capsys.readouterr().out == ""
    gpu(need["lowest"] / USABLE_SHARE + 1)
    assert decide_level(again, CUDA).memory == "lowest"
    said = capsys.readouterr().out
    assert (
        said.startswith("The run started with memory 'low'.") and "continues with 'lowest'" in said
    )
    assert runs.resume(run.folder).resolved_config.memory == "lowest"
    asked = runs.resume(run.folder, memory="standard")
    assert decide_level(asked, CUDA).memory == "standard", "what is asked for counts"


def test_a_run_trains_and_resumes_at_its_level(
    config: Make, gpu: Callable[[float], None], tmp_path: Path
) -> None:
    run = runs.start(config(mixed_precision="auto", checkpoint_every=2), tmp_path / "run")
    plain = run.config.replace(mixed_precision="no")
    gpu(needs_of(plain, "low") / USABLE_SHARE + 1)
    for step in train(run):
        if step.step == 2:
            break
    gpu(16 * GIB)
    trainer = Trainer(runs.resume(run.folder))
    assert trainer.config.memory == "low"


def needs_of(config: TrainConfig, level: str) -> int:
    return estimate(config.replace(memory=level), config.mixed_precision).memory


def test_a_run_of_bfloat16_weights_is_kept_in_them(config: Make, tmp_path: Path) -> None:
    run = runs.start(config(mixed_precision="bf16", steps=1, prior="none"), tmp_path / "run")
    (run.folder / "memory.json").write_text('{"memory": "lowest"}')
    list(train(run))
    family = trainable.load_to_export(run, 1)
    assert family.denoiser.dtype is torch.bfloat16
    (run.folder / "memory.json").unlink()  # as of a run before levels were written down
    assert trainable.load_to_export(run, 1).denoiser.dtype is torch.float16


def test_all_cells_of_a_study_train_at_one_level(
    config: Make, gpu: Callable[[float], None], tmp_path: Path, clip_folder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Without the prior half as many pictures go through the model: alone that cell would fit."""
    asked = config(mixed_precision="auto", scorer=str(clip_folder), prior="distilled")
    cells = grid(asked, prior_weight=[0.0, 1.0])
    plain = [c.replace(mixed_precision="no", validate_every=2) for c in cells.values()]
    without, with_prior = (needs_of(one, "standard") for one in plain)
    assert without < with_prior
    gpu((without + with_prior) / 2 / USABLE_SHARE)
    view = ValidationPlan(class_images=2, unrelated=1, inference_steps=1)
    done = list(sweep(cells, tmp_path / "study", [2], view))
    assert [cell.error for cell in done] == [None, None]
    found = [runs.resume(tmp_path / "study" / name).resolved_config.memory for name in cells]
    assert found == ["low", "low"]
    assert "The study trains with memory 'low'" in capsys.readouterr().out
    assert list(sweep(cells, tmp_path / "study", [2], view)), "it goes on where it was"


def test_all_subjects_of_an_evaluation_train_at_the_level_of_the_first(
    config: Make, gpu: Callable[[float], None], tmp_path: Path, photos: str,
) -> None:  # fmt: skip
    plain = config(mixed_precision="no", prior="none", steps=1)
    gpu(needs_of(plain, "low") / USABLE_SHARE + 1)
    tuned = dreambench.Tuned(tmp_path, lambda subject: plain.replace(subject=subject))
    first = tuned(Subject(photos, "dog", name="one"))
    gpu(16 * GIB)
    second = tuned(Subject(photos, "dog", name="other"))
    assert [run.resolved_config.memory for run in (first, second)] == ["low", "low"]


def test_of_several_processes_a_whole_model_saves_memory_by_checkpointing(config: Make) -> None:
    """Weights that are updated within the backward pass would not wait for other gradients."""
    whole, lora = config(), config(method="lora", lora_rank=1)
    assert choose_level([whole], 1, 2) == {"memory": "standard", "gradient_checkpointing": True}
    assert choose_level([whole], GIB, 2) == {"memory": "standard"}
    assert choose_level([lora], 1, 2) == {"memory": "lowest"}
    assert choose_level([whole, lora], 1, 2)["memory"] == "standard"


TWO = """
import sys, torch
from accelerate import PartialState
from dreambooth_lib.training import memory_level, runs
from dreambooth_lib.core import gpu_memory
state = PartialState(cpu=True)
assert state.num_processes == 2
free = [1, 2**34][state.process_index]  # only the first one's counts
memory_level.is_gpu = lambda device: True
gpu_memory.gpu_bytes = lambda device=None: (free, 2**34)
found = memory_level.decide_level(runs.resume(sys.argv[1]), torch.device("cpu"))
print(state.process_index, found.memory, found.gradient_checkpointing, flush=True)
state.destroy_process_group()  # a process that ends before the other can abort without it
"""


def test_two_processes_train_at_the_level_that_the_first_decides(
    config: Make, tmp_path: Path
) -> None:
    run = runs.start(config(), tmp_path / "run")
    (tmp_path / "two.py").write_text(TWO)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "two.py"), str(run.folder)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ")]
    assert sorted(said) == ["0 standard True", "1 standard True"]
    assert done.stdout.count("The run trains with memory") == 1


def test_the_peak_of_memory_is_a_runs_own(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run of this process took most is no peak of this one."""
    reset: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr("dreambooth_lib.training.setup.is_gpu", lambda device: True)
    Trainer(runs.start(config(prior="none"), tmp_path / "run"))
    assert len(reset) == 1


def test_nothing_is_decided_without_a_gpu(config: Make, tmp_path: Path) -> None:
    run = runs.start(config(), tmp_path / "run")
    assert (
        decide_level(run, torch.device("cpu"))
        == run.config
        == with_level_for_now(run.config, torch.device("cpu"))
    )
    share_level(tmp_path, [run.config])
    assert not list(tmp_path.rglob("memory.json"))
