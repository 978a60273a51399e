"""QLoRA with bitsandbytes' own kernels on a CPU, and offloaded text encoders."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from PIL import ImageChops

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.families import loading
from dreambooth_lib.families.loading import BaseError
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import load_source, sample
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.trainable import load, make_trainable, training_load_options

Make = Callable[..., TrainConfig]
LAYERS = {"nf4": Linear4bit, "int8": Linear8bitLt}


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers quantize without a GPU, which bitsandbytes does not need.

    The kernels that only a CPU has need larger layers than those of these tests.
    """
    monkeypatch.setattr(loading, "_has_gpu", lambda: True)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    for kind in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        quantizer = getattr(bnb_quantizer, kind)
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})


@pytest.fixture
def started(start_run: Callable[..., Run]) -> Callable[..., Run]:
    return partial(start_run, method="lora")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_quantizing_without_a_gpu_is_rejected_with_a_remedy(started: Callable[..., Run]) -> None:
    with pytest.raises(BaseError, match=r"quantize is 'nf4', which needs a GPU, .*leave quantize"):
        Trainer(started("run", "sd1", quantize="nf4"))


@pytest.mark.parametrize(
    ("family", "bits"),
    [("sd1", "nf4"), ("flux", "nf4"), ("flux_2_klein", "nf4"), ("sd3", "int8"), ("z_image", "nf4")],
)
def test_a_quantized_base_trains_its_lora_resumes_and_draws(
    family: str, bits: str, started: Callable[..., Run], without_gpu: None
) -> None:
    complete = started("complete", family, quantize=bits)
    trainer = Trainer(complete)
    kinds = {type(module) for module in trainer.family.denoiser.modules()}
    assert LAYERS[bits] in kinds
    names = (*trainer.family.encoder_names, *trainer.family.large_encoder_names)
    assert all(getattr(trainer.family.pipeline, name) is None for name in names)
    assert all("lora_" in name for name in trainer.trainable.trained_weights())
    list(train(complete))
    interrupted = started("interrupted", family, quantize=bits)
    for _ in islice(train(interrupted), 1):
        pass
    list(train(runs.resume(interrupted.folder)))
    first, second = (load_state(run.checkpoints()[2])["model"] for run in (complete, interrupted))
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
    tuned = load_source(complete)
    assert LAYERS[bits] in {type(module) for module in tuned.denoiser.modules()}
    images = [sample(complete, ["a {} dog"], [0], steps=1, at=at)[0].image for at in (2, None)]
    assert images[0].size == (16, 16)
    assert max(high for _, high in ImageChops.difference(*images).getextrema()) <= 1


@pytest.mark.parametrize("family", ["flux", "flux_2_klein"])
def test_a_quantized_base_computes_in_autocasts_dtype_as_a_plain_one_does(
    family: str, started: Callable[..., Run], without_gpu: None
) -> None:
    config = started("run", family).config

    def dtypes(quantize: str | None) -> dict[str, torch.dtype]:
        """Return the dtypes of what the denoiser's layers and their LoRAs return."""
        own, seen = config.replace(quantize=quantize), dict[str, torch.dtype]()
        base = load(own, **training_load_options(own, torch.bfloat16))
        trainable = make_trainable(base, config)
        for name, module in base.denoiser.named_modules():
            if not name or name.endswith(("base_layer", "lora_B.default")):
                module.register_forward_hook(
                    lambda _, args, out, name=name: seen.update({name: out[0].dtype})
                )
        x_t, prompts = torch.randn(1, *(base.latent_size[0], 8, 8)), ["a dog"]
        with torch.autocast("cpu", torch.bfloat16):
            cond = base.conditioning(prompts)
            trainable(x_t, torch.tensor([500]), cond, prompts)
        return seen

    quantized = dtypes("nf4")
    assert len(quantized) > 2 and quantized == dtypes(None)
    assert set(quantized.values()) == {torch.bfloat16}


@pytest.mark.parametrize(("family", "bits"), [("sd3", "int8"), ("sdxl", "nf4")])
def test_quantizing_prints_no_needless_warnings(
    family: str,
    bits: str,
    started: Callable[..., Run],
    without_gpu: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("diffusers", "transformers"):  # whose records do not propagate
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    for name in ("diffusers", "transformers", "bitsandbytes"):
        caplog.set_level(logging.WARNING, name)
    list(islice(train(started("run", family, quantize=bits)), 1))
    lines = [record.getMessage() for record in caplog.records]
    assert not [line for line in lines if "MatMul8bitLt" in line or "will be ignored" in line]


def test_the_base_is_quantized_and_only_its_lora_learns(
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
    distance = [
        max(high for _, high in ImageChops.difference(image, drawn[1]).getextrema())
        for image in drawn
    ]
    assert distance[1] == 0 and distance[0] > 0 and distance[2] > 5


def test_quantizing_needs_a_lora_on_a_base_that_is_not_a_lora(
    started: Callable[..., Run], without_gpu: None
) -> None:
    with pytest.raises(ConfigError, match="quantize is 'nf4' but method is 'full'"):
        started("full", "sd1", method="full", quantize="nf4")
    with pytest.raises(ConfigError, match="'nf3'; leave it out, or set it to one of 'nf4', 'int8'"):
        started("bits", "sd1", quantize="nf3")
    first = started("first", "sd1")
    list(train(first))
    second = first.config.replace(base=str(first.folder), quantize="nf4")
    with pytest.raises(BaseError, match="is a LoRA, which cannot be merged"):
        Trainer(runs.start(second, first.folder.parent / "second"))


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux", "flux_2_klein", "z_image"])
def test_cached_prompts_draw_the_same_images_as_the_text_encoders(
    family: str, tiny_bases: Callable[[str], str]
) -> None:
    prompts = ["a dog", "a ohwx dog"]
    complete = loading.load_model(tiny_bases(family), resolution=16)
    cached = loading.load_model(tiny_bases(family), resolution=16, prompts=prompts)
    assert cached.text_encoders == [] and len(cached.frozen) == 1
    seeded = [(prompt, seed) for prompt in prompts for seed in (0, 1)]
    for first, second in zip(
        complete.generate(seeded, 2, 4.0), cached.generate(seeded, 2, 4.0), strict=True
    ):
        assert max(high for _, high in ImageChops.difference(first, second).getextrema()) <= 1
    with pytest.raises(KeyError, match="a cat"):
        cached.conditioning(["a cat"])


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_a_run_with_offloaded_text_encoders_validates_and_saves_the_same(
    family: str, started: Callable[..., Run], clip_folder: Path
) -> None:
    changes = {"validate_every": 2, "scorer": str(clip_folder), "method": "full"}
    changes |= {"prior": "distilled", "hold_out": False}
    standard, low = (
        started(level, family, memory=level, **changes) for level in ("standard", "low")
    )
    first, second = list(train(standard)), list(train(low))
    assert [s.loss for s in first] == pytest.approx([s.loss for s in second], rel=1e-5)
    assert first[-1].validation and second[-1].validation
    scores = [
        step.validation.prompt_adherence for step in (first[-1], second[-1]) if step.validation
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-2)
    assert {p.name for p in standard.pipeline.iterdir()} == {p.name for p in low.pipeline.iterdir()}
    assert sample(low, ["a {} dog"], [0], steps=1)


@pytest.mark.parametrize(
    ("family", "bits"), [("flux", "nf4"), ("flux_2_klein", "nf4"), ("sd3", "nf4"), ("sd3", "int8")]
)
def test_a_quantized_bases_memory_is_estimated_as_it_is(
    family: str, bits: str, started: Callable[..., Run], without_gpu: None
) -> None:
    run = started("run", family, quantize=bits, lora_rank=1, steps=1)
    estimated = estimate(run.config, "no")

    def size(module: torch.nn.Module) -> int:
        return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])

    trainer = Trainer(run)
    real = size(trainer.family.denoiser) + size(trainer.family.pipeline.vae)
    # No tensor above holds the scales, which weigh more in such small layers than usual.
    assert estimated.weights == pytest.approx(real, rel=0.05)
    assert estimate(run.config.replace(quantize=None), "no").weights > estimated.weights
    assert estimated.encoding > 0
