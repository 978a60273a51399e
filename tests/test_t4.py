"""The whole path in float16, as a T4 computes it: see tests/t4.py."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from t4 import Seen, T4Accelerator
from t4 import t4 as t4
from test_quantize import without_gpu as without_gpu

from dreambooth_lib import sample
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.export import pipeline_folder
from dreambooth_lib.export.comfyui_checkpoint import write_checkpoint
from dreambooth_lib.export.comfyui_lora import write_lora
from dreambooth_lib.families import loading
from dreambooth_lib.families.loading import BaseError
from dreambooth_lib.families.stable_diffusion import StableDiffusion
from dreambooth_lib.training import accelerator, runs, validation
from dreambooth_lib.training.batches import Batch
from dreambooth_lib.training.loop import NonFiniteLoss, prior_preservation, train, training_steps
from dreambooth_lib.training.losses import Loss
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.optimizer_step import Optimizer
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation_record import history

Make = Callable[..., TrainConfig]
VIEW = validation.ValidationPlan(class_images=2, inference_steps=1)
LORA = {"method": "lora", "memory": "low", "learning_rate": 1e-3}
DOG = Path(loading.BUNDLED) / "subjects" / "patch_dog"


@pytest.fixture
def started(
    tmp_path: Path, photos: str, make_config: Make, clip_folder: Path
) -> Callable[..., Run]:
    """Start a run of two updates that is validated once more at its end."""

    def start(base: str, **changes: Any) -> Run:
        given = {"steps": 2, "batch_size": 1, "class_images": 2, "validate_every": 2} | changes
        if base == "toybox":
            fields = {"prior_inference_steps": 2, **given}
            config = TrainConfig(Subject(str(DOG), "dog"), base, **fields)
        else:
            fields = {"scorer": str(clip_folder), "resolution": 16, **given}
            config = make_config(base, photos, **fields)
        run = runs.start(config, tmp_path / "run")
        (run.folder / "validation").mkdir()
        (run.folder / "validation" / "plan.json").write_text(json.dumps(asdict(VIEW)))
        return run

    return start


def moved(run: Run) -> bool:
    """Tell whether training changed what the run's base draws."""
    tuned, base = (loading.load_model(of) for of in (str(run.folder), run.config.base))
    weights = base.denoiser.state_dict()
    return any(not torch.equal(v, weights[k]) for k, v in tuned.denoiser.state_dict().items())


WAYS = [
    ("toybox", {}),
    ("toybox", LORA),
    ("sd1", {"memory": "low"}),
    ("sd2", LORA | {"memory": "standard"}),
    ("sdxl", {"train_text_encoder": True}),
    ("sdxl", LORA),
    ("sd3", {}),
    ("sd3", LORA),
    ("flux", {}),
    ("flux", LORA),
    ("flux_2_klein", LORA),
]


@pytest.mark.parametrize(("base", "changes"), WAYS)
def test_the_whole_path_computes_in_float16_and_stays_finite(
    base: str,
    changes: dict[str, Any],
    t4: Seen,
    started: Callable[..., Run],
    tiny_bases: Callable[[str], str],
    tmp_path: Path,
) -> None:
    run = started(base if base == "toybox" else tiny_bases(base), **changes)
    steps = list(train(run))
    assert [step.step for step in steps] == [1, 2] and steps[-1].validation is not None
    assert [row.step for row in history(run)] == [0, 2]
    for row in history(run):
        assert fmean(row.by_image["subject_fidelity"]) == pytest.approx(row.subject_fidelity, 1e-6)
    saved = run.load_checkpoint()
    assert saved is not None
    assert saved["scale"][0] != 2.0**16  # where it begins
    assert t4.denoiser == {torch.float16}
    assert t4.encoder == {torch.float32} and t4.decoder == {torch.float16}
    assert t4.scorer == {torch.float32}  # on a GPU halves would meet the photos' floats on the CPU
    for at in (None, 2):
        (picture,) = sample(run, ["a {} dog"], [0], at=at, steps=2)
        assert picture.image.getbbox() is not None
    assert t4.denoiser == {torch.float16}
    pipeline_folder.write_model(run, 2, tmp_path / "kept")
    assert moved(run)
    lora = tmp_path / "kept" / "pytorch_lora_weights.safetensors"
    if run.config.method == "lora":
        write_lora(lora, tmp_path / "file.safetensors")
    elif base == "toybox":
        write_checkpoint(tmp_path / "kept", tmp_path / "file.safetensors")


def test_qlora_of_klein_computes_in_float16_and_stays_finite(
    t4: Seen,
    started: Callable[..., Run],
    tiny_bases: Callable[[str], str],
    without_gpu: None,
) -> None:
    """So may it be offered on a T4: no number is infinite that the clipped blocks could give."""
    run = started(tiny_bases("flux_2_klein"), **(LORA | {"quantize": "nf4", "validate_every": 0}))
    losses = [step.loss for step in train(run)]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert t4.denoiser == {torch.float16} and t4.encoder == {torch.float32}
    (picture,) = sample(run, ["a {} dog"], [0], steps=2)
    assert picture.image.getbbox() is not None


def test_a_base_whose_autoencoder_overflows_float16_trains_and_draws(
    t4: Seen, started: Callable[..., Run], tiny_sd1: str, tmp_path: Path
) -> None:
    """SDXL's own is of that kind: both halves go beyond float16 before their first norm."""
    plain = DiffusionPipeline.from_pretrained(tiny_sd1)
    for half in (plain.vae.encoder, plain.vae.decoder):
        half.conv_in.weight.data *= 2**18
        half.conv_in.bias.data *= 2**18
    plain.save_pretrained(tmp_path / "base")
    overflowing = plain.vae.half()
    assert overflowing.encode(torch.ones(1, 3, 16, 16).half()).latent_dist.mean.isnan().any()
    assert overflowing.decode(torch.ones(1, 4, 8, 8).half()).sample.isnan().any()
    run = started(str(tmp_path / "base"))
    assert [step.step for step in train(run)] == [1, 2]
    assert t4.decoder == {torch.float16, torch.float32}
    (picture,) = sample(run, ["a {} dog"], [0], steps=1)
    assert picture.image.getbbox() is not None


def test_a_first_update_that_overflows_float16_says_so(
    t4: Seen, started: Callable[..., Run], tiny_sd1: str, tmp_path: Path
) -> None:
    plain = DiffusionPipeline.from_pretrained(tiny_sd1)
    plain.unet.conv_out.weight.data.fill_(1e5)
    plain.save_pretrained(tmp_path / "base")
    run = started(str(tmp_path / "base"), prior_weight=0.0, validate_every=0)
    with pytest.raises(
        NonFiniteLoss,
        match=r"at step 1 .*: values probably overflowed float16 .*65,504\): set mixed",
    ):
        list(train(run))


class HighScale(T4Accelerator):
    """Begins with a loss scale at which gradients overflow."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)


@pytest.mark.parametrize("memory", ["standard", "low"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_an_update_that_overflows_moves_nothing_and_is_not_counted(
    optimizer: str, memory: str, t4: Seen, started: Callable[..., Run], tiny_sd1: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(accelerator, "Accelerator", HighScale)
    run = started(tiny_sd1, optimizer=optimizer, memory=memory, prior_weight=0.0, validate_every=0)
    trainer, tries, real = Trainer(run), 0, Optimizer.step
    before = [parameter.detach().clone() for parameter in trainer.optimizer.parameters]

    def counted(optimizer: Optimizer) -> bool:
        nonlocal tries
        if made := real(optimizer):
            return made
        tries += 1
        assert all(map(torch.equal, before, optimizer.parameters))
        assert trainer.step == 0 and run.log() == []
        return False

    monkeypatch.setattr(Optimizer, "step", counted)
    step = next(training_steps(trainer))
    assert tries >= 5 and step.step == 1
    assert not any(map(torch.equal, before, trainer.optimizer.parameters))


@pytest.mark.parametrize("memory", ["standard", "low"])
def test_gradients_that_no_scale_helps_end_the_run_in_a_sentence(
    memory: str, t4: Seen, started: Callable[..., Run], tiny_sd1: str
) -> None:
    def objective(prediction: torch.Tensor, batch: Batch, config: TrainConfig) -> Loss:
        prediction.register_hook(lambda gradient: gradient * float("nan"))
        return prior_preservation(prediction, batch, config)

    run = started(tiny_sd1, memory=memory, prior_weight=0.0, validate_every=0)
    with pytest.raises(NonFiniteLoss, match=r"overflow float16 at step 1 .*use mixed_precision"):
        list(train(run, objective))
    assert run.log() == [] and run.checkpoints() == {}


def test_a_family_that_float16_is_too_small_for_is_refused(
    t4: Seen,
    started: Callable[..., Run],
    tiny_bases: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_bases("z_image")
    run = started(base, method="lora")
    with pytest.raises(ConfigError, match=r"z_image' produces NaN in float16.* with bfloat16"):
        next(train(run))
    with pytest.raises(ConfigError, match="produces NaN in float16"):
        estimate(run.config, "fp16")
    with pytest.raises(BaseError, match=r"z_image' produces NaN in float16.*use one that"):
        sample(base, ["a dog"], [0], steps=1)
    monkeypatch.setattr(StableDiffusion, "half_dtypes", (torch.bfloat16,))
    with pytest.raises(BaseError, match="sd1' produces NaN in float16"):
        sample(tiny_bases("sd1"), ["a dog"], [0], steps=1)
    assert estimate(run.config, "bf16").memory > 0
    run = runs.resume(run.folder, mixed_precision="no", validate_every=0)
    assert [step.step for step in train(run)] == [1, 2]
