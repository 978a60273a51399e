"""Check that a run, the command and a notebook print what a person can act on, and no more."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launching import launched

from dreambooth_lib import __main__
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.notices import hide_casts
from dreambooth_lib.families import loading
from dreambooth_lib.training.loop import NonFiniteLoss, OutOfMemory
from dreambooth_lib.training.optimizer_step import Optimizer
from dreambooth_lib.training.runs import RunError
from dreambooth_lib.training.trainable import make_trainable

Make = Callable[..., TrainConfig]
PYTHONS = {"newest": None, "colab": os.environ.get("DREAMBOOTH_TEST_COLAB_PYTHON")}

#: All that the command prints of a training, line by line.
PRINTED = [
    r"1\.png looks blurred\.",
    r"2\.png looks blurred\.",
    r"step 1/2: instance loss \d\.\d{4}, prior loss \d\.\d{4}",
    r"step 2/2: instance loss \d\.\d{4}, prior loss \d\.\d{4}",
    r"validation took \d+% of the time; raise validate_every for fewer of them",
    r"According to the scores: subject .*learnt \(\d+%\), class .*, other prompts .*\(\d+%\)\. .*",
    r"(Best: Step \d: |No step is better than the base: ).*",
    r".*/run/pipeline",
]


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_command_prints_its_steps_and_no_more(
    python: str, tmp_path: Path, tiny_bases: Callable, photos: str, clip_folder: Path,
    make_config: Make,
) -> None:  # fmt: skip
    if python == "colab" and PYTHONS[python] is None:
        pytest.skip("needs the second environment")
    config = make_config(
        tiny_bases("sdxl"), photos, steps=2, validate_every=1, scorer=str(clip_folder),
        train_text_encoder=True, method="lora", lr_schedule="cosine", optimizer="adamw8bit",
    )  # fmt: skip
    (tmp_path / "config.toml").write_text(config.to_toml())
    command = ["-m", "dreambooth_lib", "train", str(tmp_path / "config.toml")]
    done = launched(*command, "--out", str(tmp_path / "run"), python=PYTHONS[python])
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(PRINTED), lines
    for line, expected in zip(lines, PRINTED, strict=True):
        assert re.fullmatch(expected, line), line


@pytest.mark.parametrize("error", [OutOfMemory, NonFiniteLoss, RunError])
def test_the_commands_own_errors_are_sentences(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("set memory to 'low'.")

    monkeypatch.setattr(__main__, "run_train", fail)
    monkeypatch.setattr(sys, "argv", ["dreambooth_lib", "train", "config.toml"])
    with pytest.raises(SystemExit, match=r"^error: set memory to 'low'\.$"):
        __main__.main()


@pytest.mark.slow
def test_a_notebooks_run_prints_nothing(
    tmp_path: Path, tiny_sd1: str, photos: str, clip_folder: Path, make_config: Make
) -> None:
    config = make_config(tiny_sd1, photos, steps=2, validate_every=1, scorer=str(clip_folder))
    (tmp_path / "config.toml").write_text(config.to_toml())
    code = (
        "from dreambooth_lib.notebook import widgets; widgets.quiet()\n"
        "import dreambooth_lib as db, sys; folder = sys.argv[1]\n"
        "run = db.start(db.TrainConfig.from_toml(folder + '/config.toml'), folder + '/run')\n"
        "for step in db.train(run): pass\n"
        "db.sample(run, ['a {} dog'], seeds=[0])"
    )
    done = launched("-c", code, str(tmp_path))
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stdout + done.stderr


def test_casts_to_8_bits_are_not_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import Linear8bitLt

    logger = logging.getLogger("bitsandbytes.autograd._functions")
    monkeypatch.setattr(logger, "filters", [])
    caplog.set_level(logging.WARNING, logger.name)
    layer = Linear8bitLt(8, 8, has_fp16_weights=False)
    layer.load_state_dict(torch.nn.Linear(8, 8).state_dict())
    layer.to("cpu").eval()  # training on a CPU takes another path
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        layer(torch.randn(2, 8))
        assert "MatMul8bitLt" in caplog.text + "".join(str(w.message) for w in shown)
        caplog.clear()
        shown.clear()
        hide_casts()
        layer(torch.randn(2, 8))
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert not shown


@pytest.mark.parametrize("resumed", [False, True])
def test_the_schedule_gives_no_warning_with_a_scaled_loss(
    resumed: bool, tiny_sd1: str, photos: str, make_config: Make
) -> None:
    config = make_config(tiny_sd1, photos, lr_schedule="cosine")
    family = loading.load_model(tiny_sd1)
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # as on a GPU in float16
    optimizer = Optimizer(config, accelerator, make_trainable(family, config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if resumed:
            optimizer.load_state_dict(optimizer.state_dict() | {"step": 1})
        for _ in range(2):
            weight = next(iter(optimizer.parameters))
            loss = weight.square().sum()
            optimizer.backward(loss)
            optimizer.read(loss.detach().reshape(1))
            assert optimizer.step()
