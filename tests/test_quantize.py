"""QLoRA by bitsandbytes' own kernels on a CPU, and text encoders that make room for training."""

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from PIL import ImageChops

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import ConfigError
from dreambooth_lib.families import loading
from dreambooth_lib.families.loading import BaseError
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import load_source, sample
from dreambooth_lib.training.setup import Trainer

Make = Callable[..., TrainConfig]
LAYERS = {"nf4": Linear4bit, "int8": Linear8bitLt}


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks for a GPU, which bitsandbytes does not need.

    Of the CPU's own kernels those that a GPU does not have want larger layers than a test has.
    """
    monkeypatch.setattr(loading, "_has_gpu", lambda: True)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    for kind in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        quantizer = getattr(bnb_quantizer, kind)
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})


@pytest.fixture
def started(
    tmp_path: Path, photos: str, make_config: Make, tiny_bases: Callable[[str], str]
) -> Callable[..., Run]:
    def start(name: str, family: str, **changes: Any) -> Run:
        fields: dict[str, Any] = {"steps": 2, "resolution": 16, "checkpoint_every": 1}
        fields |= {"method": "lora", "lora_rank": 2}
        config = make_config(tiny_bases(family), photos, **(fields | changes))
        return runs.start(config, tmp_path / name)

    return start


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_quantizing_is_refused_in_a_sentence(started: Callable[..., Run]) -> None:
    with pytest.raises(BaseError, match=r"quantize is 'nf4', which needs a GPU, .*leave quantize"):
        Trainer(started("run", "sd1", quantize="nf4"))


@pytest.mark.parametrize(
    ("family", "bits"), [("sd1", "nf4"), ("flux", "nf4"), ("sd3", "int8"), ("z_image", "nf4")]
)
def test_a_quantized_base_trains_its_lora_resumes_and_draws(
    family: str, bits: str, started: Callable[..., Run], without_gpu: None
) -> None:
    whole = started("whole", family, quantize=bits)
    trainer = Trainer(whole)
    kinds = {type(module) for module in trainer.family.denoiser.modules()}
    assert LAYERS[bits] in kinds
    names = (*trainer.family.encoder_names, *trainer.family.large_encoder_names)
    assert all(getattr(trainer.family.pipeline, name) is None for name in names)
    assert all("lora_" in name for name in trainer.trainable.trained_weights())
    list(train(whole))
    broken = started("broken", family, quantize=bits)
    for _ in islice(train(broken), 1):
        pass
    list(train(runs.resume(broken.folder)))
    one, other = (load_state(run.checkpoints()[2])["model"] for run in (whole, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    tuned = load_source(whole)
    assert LAYERS[bits] in {type(module) for module in tuned.denoiser.modules()}
    pictures = [sample(whole, ["a {} dog"], [0], steps=1, at=at)[0].image for at in (2, None)]
    assert pictures[0].size == (16, 16)
    assert max(high for _, high in ImageChops.difference(*pictures).getextrema()) <= 1


@pytest.mark.parametrize(("family", "bits"), [("sd3", "int8"), ("sdxl", "nf4")])
def test_quantizing_tells_nothing_that_is_as_it_should_be(
    family: str,
    bits: str,
    started: Callable[..., Run],
    without_gpu: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("diffusers", "transformers"):  # which keep their records to themselves
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    for name in ("diffusers", "transformers", "bitsandbytes"):
        caplog.set_level(logging.WARNING, name)
    list(islice(train(started("run", family, quantize=bits)), 1))
    told = [record.getMessage() for record in caplog.records]
    assert not [line for line in told if "MatMul8bitLt" in line or "will be ignored" in line]


def test_the_base_is_quantized_and_its_lora_is_what_is_learnt(
    started: Callable[..., Run], without_gpu: None
) -> None:
    run = started("run", "flux", quantize="nf4", learning_rate=0.1)
    list(train(run))
    config = run.config
    quantized = loading.load_model(config.base, quantize="nf4")
    drawn = [
        source.generate([("a ohwx dog", 0)], 2, 1.0)[0]
        for source in (loading.load_model(config.base), quantized, load_source(run))
    ]
    far = [max(h for _, h in ImageChops.difference(one, drawn[1]).getextrema()) for one in drawn]
    assert far[1] == 0 and far[0] > 0 and far[2] > 5


def test_quantizing_is_for_lora_and_not_on_top_of_one(
    started: Callable[..., Run], without_gpu: None
) -> None:
    with pytest.raises(ConfigError, match="quantize is 'nf4' but method is 'full'"):
        started("full", "sd1", method="full", quantize="nf4")
    with pytest.raises(ConfigError, match="quantize is 'nf3'; it can be left out, 'nf4', 'int8'"):
        started("bits", "sd1", quantize="nf3")
    first = started("first", "sd1")
    list(train(first))
    second = first.config.replace(base=str(first.folder), quantize="nf4")
    with pytest.raises(BaseError, match="is a LoRA, which cannot be merged"):
        Trainer(runs.start(second, first.folder.parent / "second"))


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux", "z_image"])
def test_known_prompts_draw_what_the_text_encoders_would_have_said(
    family: str, tiny_bases: Callable[[str], str]
) -> None:
    prompts = ["a dog", "a ohwx dog"]
    whole = loading.load_model(tiny_bases(family), resolution=16)
    known = loading.load_model(tiny_bases(family), resolution=16, prompts=prompts)
    assert known.text_encoders == [] and len(known.frozen) == 1
    wanted = [(prompt, seed) for prompt in prompts for seed in (0, 1)]
    for one, other in zip(
        whole.generate(wanted, 2, 4.0), known.generate(wanted, 2, 4.0), strict=True
    ):
        assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1
    with pytest.raises(KeyError, match="a cat"):
        known.conditioning(["a cat"])


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_a_run_without_its_text_encoders_looks_and_saves_as_one_with_them(
    family: str, started: Callable[..., Run], clip_folder: Path
) -> None:
    changes = {"validate_every": 2, "scorer": str(clip_folder), "method": "full"}
    changes |= {"prior": "distilled", "hold_out": False}
    whole, tight = (
        started(level, family, memory=level, **changes) for level in ("standard", "low")
    )
    one, other = list(train(whole)), list(train(tight))
    assert [s.loss for s in one] == pytest.approx([s.loss for s in other], rel=1e-5)
    assert one[-1].validation and other[-1].validation
    scores = [step.validation.prompt_adherence for step in (one[-1], other[-1]) if step.validation]
    assert scores[0] == pytest.approx(scores[1], abs=1e-2)
    assert {p.name for p in whole.pipeline.iterdir()} == {p.name for p in tight.pipeline.iterdir()}
    assert sample(tight, ["a {} dog"], [0], steps=1)


@pytest.mark.parametrize(("family", "bits"), [("flux", "nf4"), ("sd3", "nf4"), ("sd3", "int8")])
def test_a_quantized_base_is_counted_as_it_lies_in_memory(
    family: str, bits: str, started: Callable[..., Run], without_gpu: None
) -> None:
    run = started("run", family, quantize=bits, lora_rank=1, steps=1)
    found = estimate(run.config, "no")

    def size(module: torch.nn.Module) -> int:
        return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])

    trainer = Trainer(run)
    real = size(trainer.family.denoiser) + size(trainer.family.pipeline.vae)
    # The scales of so small layers, which no tensor above holds, are a larger share than usual.
    assert found.weights == pytest.approx(real, rel=0.05)
    assert estimate(run.config.replace(quantize=None), "no").weights > found.weights
    assert found.encoding > 0
