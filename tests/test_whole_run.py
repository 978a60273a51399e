"""Test that a whole run reads, digests and loads nothing twice for nothing."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dreambooth_lib.core.digests import DIGESTS, changed_file
from dreambooth_lib.families import loading
from dreambooth_lib.families.base_files import BaseError
from dreambooth_lib.notebook import drive_copy
from dreambooth_lib.notebook.drive_backup import backup
from dreambooth_lib.training import checkpoints, setup
from dreambooth_lib.training.checkpoints import OPTIMIZER, TENSORS
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import load_source

Start = Callable[..., Run]


class Digested(Counter[str]):
    """How often each file was read for its digest, by the end of its path, and how much in all."""

    weights = 0  #: bytes of safetensors files


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> Digested:
    found, real = Digested(), hashlib.file_digest

    def digest(file: Any, *rest: Any) -> Any:
        path = Path(file.name)
        found["/".join(path.parts[-2:])] += 1
        found.weights += path.stat().st_size * (path.suffix == ".safetensors")
        return real(file, *rest)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return found


def test_checkpoints_are_digested_as_they_are_written(start_run: Start, digested: Digested) -> None:
    run = start_run("run", "sd1", prior_weight=0.0)
    list(train(run))
    assert not [name for name in digested if name.endswith((TENSORS, OPTIMIZER))]
    newest = run.checkpoints()[2]
    assert changed_file(newest) is None
    assert digested[f"000002/{TENSORS}"] == digested[f"000002/{OPTIMIZER}"] == 1


def test_a_rounded_copy_reads_source_and_copy_once(
    start_run: Start, digested: Digested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run("run", "sd1", prior_weight=0.0)
    list(train(run))
    digested.clear()
    monkeypatch.setattr(drive_copy, "LARGE", 100)
    assert backup(run, tmp_path / "copy") is None
    copy = tmp_path / "copy" / "checkpoints" / "000002"
    assert digested[f"000002/{TENSORS}"] == digested[f".000002.partial/{TENSORS}"] == 1
    assert digested[f"000002/{OPTIMIZER}"] == 0, "its copy is compared with the same digest"
    assert digested[f".000002.partial/{OPTIMIZER}"] == 1
    assert changed_file(copy) is None and (copy / DIGESTS).exists()
    assert (copy / TENSORS).stat().st_size < (run.checkpoints()[2] / TENSORS).stat().st_size


def test_the_bytes_digested_by_a_run_and_its_backups_are_as_computed(
    start_run: Start, digested: Digested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive_copy, "LARGE", 100)
    run, backups = start_run("run", "sd1", prior_weight=0.0, steps=4), 0
    for step in train(run):
        backups += step.saved
        assert not step.saved or backup(run, tmp_path / "copy") is None
    newest, copy = run.checkpoints()[4], tmp_path / "copy" / "checkpoints" / "000004"
    weights, optimizer, rounded = (
        file.stat().st_size for file in (newest / TENSORS, newest / OPTIMIZER, copy / TENSORS)
    )
    pipeline = sum(file.stat().st_size for file in run.pipeline.glob("*/*.safetensors"))
    assert backups == 4
    # As docs/performance.md has it: nothing of a checkpoint but for its backup.
    assert digested.weights == backups * (weights + rounded + optimizer) + pipeline


def test_a_pipeline_is_checked_once_until_it_changes(start_run: Start, digested: Digested) -> None:
    run = start_run("run", "sd1", prior_weight=0.0)
    list(train(run))
    digested.clear()
    load_source(run)
    load_source(run)
    weights = run.pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    assert digested[f"vae/{weights.name}"] == 1
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BaseError, match=r"vae/.* has changed since it was saved"):
        load_source(run)


@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "with text encoder"])
def test_a_half_precision_run_loads_its_base_once(
    start_run: Start, tiny_sd1: str, text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    loads, real = [], UNet2DConditionModel.from_pretrained.__func__

    def counted(cls: Any, *args: Any, **options: Any) -> Any:
        loads.append(args)
        return real(cls, *args, **options)

    changes = {"mixed_precision": "bf16", "prior_weight": 0.0, "train_text_encoder": text}
    run = start_run("run", "sd1", learning_rate=0.01, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "from_pretrained", classmethod(counted))
        list(train(run))
    assert len(loads) == 1
    trained = checkpoints.load_state(run.checkpoints()[2])["model"]
    saved, base = (loading.load_model(source).pipeline for source in (str(run.folder), tiny_sd1))
    for name, tensor in saved.unet.state_dict().items():
        assert torch.equal(tensor, trained[f"denoiser.{name}"])
    for name, tensor in base.vae.state_dict().items():
        assert torch.equal(tensor, saved.vae.state_dict()[name]), "not rounded"
    for name, tensor in base.text_encoder.state_dict().items():
        own = saved.text_encoder.state_dict()[name]
        assert torch.equal(own, trained.get(f"text_encoders.0.{name}", tensor))
    for part in ("unet", "vae", "text_encoder"):
        for file in (run.pipeline / part).glob("*.safetensors"):
            assert all(tensor.dtype is torch.float32 for tensor in load_file(file).values())


def test_the_weights_of_a_base_that_is_a_lora_are_not_merged_twice(
    start_run: Start, tmp_path: Path
) -> None:
    lora = start_run("lora", "sd1", method="lora", learning_rate=0.1, prior_weight=0.0)
    list(train(lora))
    run = start_run("run", "sd1", mixed_precision="bf16", prior_weight=0.0)
    shutil.rmtree(run.folder)
    run = setup.Run(run.folder, run.config.replace(base=str(lora.folder)))
    run.folder.mkdir()
    (run.folder / "config.toml").write_text(run.config.to_toml())
    list(train(run))
    trained = checkpoints.load_state(run.checkpoints()[2])["model"]
    for name, tensor in load_source(run).denoiser.state_dict().items():
        assert torch.equal(tensor, trained[f"denoiser.{name}"])


def test_early_stopping_reads_no_checkpoint_where_the_last_step_is_the_best(
    start_run: Start, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"early_stop": True, "validate_every": 1, "ema_decay": 0.5, "prior_weight": 0.0}
    run = start_run("run", "sd1", scorer=str(clip_folder), **changes)
    monkeypatch.setattr(setup.Trainer, "_best_step", lambda trainer: 2)
    monkeypatch.setattr(setup, "checkpoint_weights", None)
    list(train(run))
    at = load_source(run, 2).denoiser.state_dict()
    for name, tensor in load_source(run).denoiser.state_dict().items():
        assert torch.equal(tensor, at[name])
