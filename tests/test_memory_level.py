"""Test how memory "auto" is resolved: once, by the free memory, written down, kept and shared."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation import dreambench
from dreambooth_lib.evaluation.sweep import grid, sweep
from dreambooth_lib.families import loading
from dreambooth_lib.training import memory_level, runs, setup, trainable
from dreambooth_lib.training.loop import prior_preservation, train, training_steps
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.memory_level import (
    USABLE_SHARE,
    choose_level,
    decide_level,
    resolve_memory,
    share_level,
)
from dreambooth_lib.training.native_precision import native_precision
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation import ValidationPlan
from tools.bases import configs

Make = Callable[..., TrainConfig]
CUDA = torch.device("cuda")


@pytest.fixture
def tiny_config(photos: str, make_config: Make, tiny_sd1: str) -> Make:
    def make(**changes: Any) -> TrainConfig:
        # Without "distilled", drawing class images would be most of what a tiny base takes.
        fields = {"resolution": 16, "prior": "distilled", "mixed_precision": "bf16"}
        return make_config(tiny_sd1, photos, **(fields | changes))

    return make


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the CPU stand in for a GPU with the given bytes free."""

    def make(free: float) -> None:
        monkeypatch.setattr(memory_level, "is_gpu", lambda device: True)
        monkeypatch.setattr(gpu_memory, "gpu_bytes", lambda device=None: (int(free), 16 * GIB))

    return make


def needs(config: TrainConfig) -> dict[str, int]:
    return {
        level: estimate(config.replace(memory=level), config.mixed_precision).memory
        for level in ("standard", "low", "lowest")
    }


def test_auto_takes_the_first_level_that_fits(tiny_config: Make) -> None:
    config = tiny_config()
    assert config.memory == "auto"
    for level, need in needs(config).items():
        assert choose_level([config], need) == {"memory": level}
    assert choose_level([config], 1) == {"memory": "lowest"}
    assert choose_level([tiny_config(max_grad_norm=1.0)], 1) == {"memory": "standard"}


@pytest.mark.parametrize("memory", ["auto", "standard"])
def test_an_adapter_that_overflows_in_float16_is_refused_before_anything_is_loaded(
    memory: str, photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for module in (memory_level, setup):
        monkeypatch.setattr(module, "join_group", lambda: SimpleNamespace(
            device=CUDA, is_main_process=True, num_processes=1))  # fmt: skip
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    fields: dict[str, Any] = {"method": "lora", "adapter": "delora", "memory": memory}
    config = TrainConfig(Subject(photos, "dog"), **fields)
    run = runs.start(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="adapter is 'delora', which produces NaN in float16"):
        setup.Trainer(run)
    if memory == "auto":
        with pytest.raises(ConfigError, match="'delora', which produces NaN"):
            share_level(tmp_path, [config])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    memory_level.check_adapter("delora", native_precision("auto", CUDA))


def test_memory_that_the_allocator_keeps_of_an_earlier_run_counts_as_free(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test a T4 on which torch reserves 10 GiB of an earlier run, none of it in use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4.56 * GIB, 14.56 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert gpu_memory.gpu_bytes(CUDA)[0] == pytest.approx(14.56 * GIB)
    base = configs("sd15", tmp_path / "sd15")
    config = TrainConfig(Subject(photos, "dog"), base, prior="none", validate_every=0)
    assert resolve_memory(config, CUDA).memory == "standard"
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6 * GIB)
    assert gpu_memory.gpu_bytes(CUDA)[0] == pytest.approx(8.56 * GIB), "6 GiB are still in use"


def test_garbage_is_collected_before_free_memory_is_read(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test a model in a reference cycle, as an earlier run's trainer is."""

    class Model:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()
    try:
        garbage = weakref.ref(Model())
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device: (1 if garbage() else 14 * GIB, 15 * GIB)
        )
        assert resolve_memory(tiny_config(), CUDA).memory == "standard"
    finally:
        gc.enable()


@pytest.mark.parametrize("fields", [
    {"memory": "standard"}, {"memory": "low"}, {"memory": "lowest", "ema_decay": 0.9},
    {"memory": "low", "method": "lora", "lora_rank": 1},
])  # fmt: skip
def test_a_session_frees_what_it_trained(
    fields: dict[str, Any], tiny_config: Make, tmp_path: Path
) -> None:
    trainer = Trainer(runs.start(tiny_config(prior="none", **fields), tmp_path / "run"))
    next(training_steps(trainer, prior_preservation))
    left = [weakref.ref(o) for o in (trainer, trainer.optimizer, trainer.family.denoiser)]
    del trainer
    gpu_memory.free_memory()
    assert [each() for each in left] == [None, None, None]


def test_a_model_that_an_interrupted_cell_holds_is_freed_before_another_is_loaded(
    tiny_sd1: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        pass

    left = []

    def cell() -> None:
        model = Model()
        left.append(weakref.ref(model))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        cell()
    assert left[0]() is not None
    monkeypatch.setattr(sys, "last_value", kept.value, raising=False)  # as IPython keeps it
    loading.load_model(tiny_sd1)
    assert left[0]() is not None, "without a GPU, its variables stay for the debugger"
    monkeypatch.setattr(loading, "_has_gpu", lambda: True)
    loading.load_model(tiny_sd1)
    assert left[0]() is None


def test_a_level_is_written_down_and_printed_once_and_kept(
    tiny_config: Make,
    gpu: Callable[[float], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, need = runs.start(tiny_config(), tmp_path / "run"), needs(tiny_config())
    gpu(need["low"] / USABLE_SHARE + 1)
    assert decide_level(run, CUDA).memory == "low"
    assert runs.read_level(run.folder) == {"memory": "low"}
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    taken = [f"{need[level] / GIB:.1f} GiB" for level in ("low", "standard")]
    free = f"{(need['low'] / USABLE_SHARE + 1) / GIB:.1f} GiB"
    assert output == (
        f"The run trains at memory level 'low' (about {taken[0]}); this GPU has {free} free, and "
        f"'standard' would take about {taken[1]}.\n"
    )
    again = runs.resume(run.folder)
    assert again.config.memory == "auto", "as configured"
    assert again.resolved_config.memory == "low"
    gpu(16 * GIB)
    assert decide_level(again, CUDA).memory == "low", "as it started"
    gpu(need["low"])  # the margin of a first choice is not needed
    assert decide_level(again, CUDA).memory == "low"
    assert capsys.readouterr().out == ""
    gpu(need["lowest"] / USABLE_SHARE + 1)
    assert decide_level(again, CUDA).memory == "lowest"
    output = capsys.readouterr().out
    assert output.startswith("The run started at memory level 'low', which takes about ")
    assert " free, so the run continues at level 'lowest' (about " in output
    assert runs.resume(run.folder).resolved_config.memory == "lowest"
    config = runs.resume(run.folder, memory="standard")
    assert decide_level(config, CUDA).memory == "standard", "the config counts"


def test_a_run_trains_and_resumes_at_its_level(
    tiny_config: Make, gpu: Callable[[float], None], tmp_path: Path
) -> None:
    run = runs.start(tiny_config(mixed_precision="auto", checkpoint_every=2), tmp_path / "run")
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


def test_a_run_of_bfloat16_weights_is_exported_in_bfloat16(
    tiny_config: Make, tmp_path: Path
) -> None:
    run = runs.start(tiny_config(mixed_precision="bf16", steps=1, prior="none"), tmp_path / "run")
    (run.folder / "memory.json").write_text('{"memory": "lowest"}')
    list(train(run))
    family = trainable.load_to_export(run, 1)
    assert family.denoiser.dtype is torch.bfloat16
    (run.folder / "memory.json").unlink()
    assert trainable.load_to_export(run, 1).denoiser.dtype is torch.float16


def test_all_cells_of_a_study_train_at_one_level(
    tiny_config: Make, gpu: Callable[[float], None], tmp_path: Path, clip_folder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Test a cell without the prior, which alone would fit at a higher level."""
    config = tiny_config(mixed_precision="auto", scorer=str(clip_folder), prior="distilled")
    cells = grid(config, prior_weight=[0.0, 1.0])
    plain = [c.replace(mixed_precision="no", validate_every=2) for c in cells.values()]
    without, with_prior = (needs_of(c, "standard") for c in plain)
    assert without < with_prior
    gpu((without + with_prior) / 2 / USABLE_SHARE)
    plan = ValidationPlan(class_images=2, unrelated=1, inference_steps=1)
    results = list(sweep(cells, tmp_path / "study", [2], plan))
    assert [cell.error for cell in results] == [None, None]
    levels = [runs.resume(tmp_path / "study" / name).resolved_config.memory for name in cells]
    assert levels == ["low", "low"]
    assert "The study trains at memory level 'low'" in capsys.readouterr().out
    assert list(sweep(cells, tmp_path / "study", [2], plan)), "the study resumes"


def test_all_subjects_of_an_evaluation_train_at_the_level_of_the_first(
    tiny_config: Make, gpu: Callable[[float], None], tmp_path: Path, photos: str,
) -> None:  # fmt: skip
    plain = tiny_config(mixed_precision="no", prior="none", steps=1)
    gpu(needs_of(plain, "low") / USABLE_SHARE + 1)
    tuned = dreambench.Tuned(tmp_path, lambda subject: plain.replace(subject=subject))
    first = tuned(Subject(photos, "dog", name="first"))
    gpu(16 * GIB)
    second = tuned(Subject(photos, "dog", name="second"))
    assert [run.resolved_config.memory for run in (first, second)] == ["low", "low"]


def test_on_several_processes_a_full_model_saves_memory_by_checkpointing(tiny_config: Make) -> None:
    """Test that no level is chosen that steps the optimizer before gradients are exchanged."""
    full, lora = tiny_config(), tiny_config(method="lora", lora_rank=1)
    assert choose_level([full], 1, 2) == {"memory": "standard", "gradient_checkpointing": True}
    assert choose_level([full], GIB, 2) == {"memory": "standard"}
    assert choose_level([lora], 1, 2) == {"memory": "lowest"}
    assert choose_level([full, lora], 1, 2)["memory"] == "standard"


TWO = """
import sys, torch
from accelerate import PartialState
from dreambooth_lib.training import memory_level, runs
from dreambooth_lib.core import gpu_memory
state = PartialState(cpu=True)
assert state.num_processes == 2
free = [1, 2**34][state.process_index]  # only the first process's counts
memory_level.is_gpu = lambda device: True
gpu_memory.gpu_bytes = lambda device=None: (free, 2**34)
config = memory_level.decide_level(runs.resume(sys.argv[1]), torch.device("cpu"))
said = f"{state.process_index} {config.memory} {config.gradient_checkpointing}\\n"
sys.stdout.write(said)  # at once: the other process may write between two pieces
sys.stdout.flush()
state.destroy_process_group()  # a process that ends before the other can abort without it
"""


def test_two_processes_train_at_the_level_of_the_first(tiny_config: Make, tmp_path: Path) -> None:
    run = runs.start(tiny_config(), tmp_path / "run")
    (tmp_path / "two.py").write_text(TWO)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "two.py"), str(run.folder)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ")]
    expected = ["0 standard True", "1 standard True"]
    assert sorted(lines) == expected, (done.stdout, done.stderr[-2000:])
    assert done.stdout.count("The run trains at memory level") == 1


def test_peak_memory_is_reset_for_each_run(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test that an earlier run of this process does not count."""
    resets: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr("dreambooth_lib.training.setup.is_gpu", lambda device: True)
    Trainer(runs.start(tiny_config(prior="none"), tmp_path / "run"))
    assert len(resets) == 1


def test_nothing_is_decided_without_a_gpu(tiny_config: Make, tmp_path: Path) -> None:
    run = runs.start(tiny_config(), tmp_path / "run")
    cpu = torch.device("cpu")
    assert decide_level(run, cpu) == run.config == resolve_memory(run.config, cpu)
    share_level(tmp_path, [run.config])
    assert not list(tmp_path.rglob("memory.json"))
