"""Test sampling: images follow from the seed alone, and models stay as they were."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation.dreambench import Protocol
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.training import runs, sampling
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.sampling import Sample, compose, fill, load_source, sample
from dreambooth_lib.training.validation import ValidationPlan

Make = Callable[..., TrainConfig]
QUICK: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def family(tiny_sd1: str) -> Family:
    return loading.load_model(tiny_sd1)


@pytest.fixture(scope="module")
def finished(
    tiny_sd1: str, photos: str, make_config: Make, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    config = make_config(tiny_sd1, photos, steps=2, prior_weight=0.0)
    run = runs.start(config, tmp_path_factory.mktemp("runs") / "run")
    list(train(run))
    return run


def test_words_of_a_prompt_that_the_base_does_not_read_are_told(finished: Run) -> None:
    long = "a photo of a {} dog " + "in the snow " * 4
    with pytest.warns(
        UserWarning, match=r"is too long: it has .*; everything from '.*snow' on is cut off"
    ):
        sample(finished, [long], [0], **QUICK)


def pixels(samples: list[Sample]) -> np.ndarray:
    return np.stack([np.asarray(s.image).astype(int) for s in samples])


def test_every_prompt_is_drawn_with_every_seed_prompts_outermost(family: Family) -> None:
    samples = sample(family, ["a dog", "a cat"], [5, 6, 7], **QUICK)
    assert [(s.prompt, s.seed) for s in samples] == [
        (prompt, seed) for prompt in ("a dog", "a cat") for seed in (5, 6, 7)
    ]
    assert {s.image.size for s in samples} == {(16, 16)}


def test_a_seeds_image_is_the_same_at_any_batch_size(family: Family) -> None:
    batch, pairs, single = (
        pixels(sample(family, ["a dog"], [0, 1, 2], batch_size=size, **QUICK)) for size in (8, 2, 1)
    )
    assert np.abs(batch - pairs).max() <= 1
    assert np.abs(batch - single).max() <= 1
    assert np.abs(batch[0] - batch[1]).max() > 10


def test_the_same_call_draws_the_same_images_whatever_ran_before(family: Family) -> None:
    first = pixels(sample(family, ["a dog"], [3], **QUICK))
    torch.manual_seed(11)
    sample(family, ["a cat"], [8], **QUICK)
    assert np.array_equal(first, pixels(sample(family, ["a dog"], [3], **QUICK)))


def test_prompt_guidance_and_negative_prompt_each_change_the_image(family: Family) -> None:
    plain = pixels(sample(family, ["a dog"], [0], steps=2, guidance_scale=3.0))
    for changed in (
        sample(family, ["a cat"], [0], steps=2, guidance_scale=3.0),
        sample(family, ["a dog"], [0], steps=2, guidance_scale=60.0),
        sample(family, ["a dog"], [0], steps=2, guidance_scale=3.0, negative_prompt="red snow"),
        sample(family, ["a dog"], [0], steps=4, guidance_scale=3.0),
    ):
        assert not np.array_equal(plain, pixels(changed))


@pytest.mark.parametrize(
    ("name", "scale", "reads"),
    [("flux", 3.5, False), ("sd1", 1.0, False), ("sd1", 1.5, True), ("z_image", 0.5, True),
     ("z_image", 0.0, False), ("flux_2_klein", 1.0, False), ("sd3", 4.0, True)],
)  # fmt: skip
def test_a_negative_prompt_that_would_change_nothing_is_left_out_with_a_warning(
    name: str, scale: float, reads: bool, tiny_bases: Callable[[str], str]
) -> None:
    family = loading.load_model(tiny_bases(name), resolution=16)
    how: dict[str, Any] = {"steps": 2, "guidance_scale": scale}
    plain = pixels(sample(family, ["a dog"], [0], **how))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = pixels(sample(family, ["a dog"], [0, 0], negative_prompt="a cat on snow", **how))
    told = [str(one.message) for one in caught if "negative prompt" in str(one.message)]
    assert len(told) == (not reads) and np.array_equal(plain[0], other[0]) == (not reads)


@pytest.mark.parametrize(
    ("prompts", "seeds", "steps", "sentence"),
    [
        ("a dog", [0], 2, r"prompts is the text 'a dog'; give a list"),
        (["a dog"], 0, 2, r"seeds is 0; give a list"),
        (["a dog"], [0, -1], 2, r"seeds is \[0, -1\]; .* from 0 to 2\*\*63 - 1"),
        (["a dog"], [2**63], 2, r"seeds is"),
        (["a dog"], ["1"], 2, r"seeds is \['1'\]"),
        (["a dog"], [0], 0, r"steps is 0; give"),
        (["a dog"], [0], 2.5, r"steps is 2.5; give"),
        (["a dog"], [0], 2000, r"steps is 2000, but '.*sd1' supports at most 1000; lower it"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_told_in_a_sentence(
    prompts: Any, seeds: Any, steps: Any, sentence: str, family: Family
) -> None:
    with pytest.raises(InputError, match=sentence):
        sample(family, prompts, seeds, steps=steps)


def test_plans_and_loras_of_another_kind_are_told_in_a_sentence() -> None:
    with pytest.raises(InputError, match="inference_steps is 0; give 1 or more"):
        ValidationPlan(inference_steps=0)
    with pytest.raises(InputError, match="images_per_prompt is -1; give 1 or more"):
        Protocol(images_per_prompt=-1)
    with pytest.raises(InputError, match=r"loras is \['run'\]; give a dict"):
        compose(["run"])  # type: ignore[arg-type]


def test_a_run_draws_at_its_configs_guidance_scale(finished: Run) -> None:
    changed = dataclasses.replace(finished, config=finished.config.replace(guidance_scale=60.0))
    by_run, by_changed, by_argument = (
        pixels(sample(source, ["a dog"], [0], steps=2, **more))
        for source, more in ((finished, {}), (changed, {}), (changed, {"guidance_scale": 7.5}))
    )
    assert np.array_equal(by_run, by_argument) and not np.array_equal(by_run, by_changed)


def test_braces_in_a_prompt_stand_for_the_runs_identifier(finished: Run) -> None:
    (filled,) = sample(finished, ["a {} dog on the beach"], [0], **QUICK)
    assert filled.prompt == "a ohwx dog on the beach"
    (written_out,) = sample(finished, ["a ohwx dog on the beach"], [0], **QUICK)
    assert np.array_equal(pixels([filled]), pixels([written_out]))


def test_fill_takes_the_subjects_identifier_and_leaves_other_prompts_alone() -> None:
    subject = Subject("photos", "dog", identifier="zwx")
    assert fill("a {} dog and a {} dog", subject) == "a zwx dog and a zwx dog"
    assert fill("a dog", subject) == fill("a dog", None) == "a dog"


def test_a_base_has_no_identifier_for_braces_in_a_prompt(family: Family) -> None:
    with pytest.raises(ValueError, match=r"'a \{\} dog'.*no subject"):
        sample(family, ["a {} dog"], [0], **QUICK)


def test_a_base_is_sampled_by_its_path(family: Family, tiny_sd1: str) -> None:
    by_path, loaded = (sample(source, ["a dog"], [0], **QUICK) for source in (tiny_sd1, family))
    assert np.array_equal(pixels(by_path), pixels(loaded))


def test_an_unfinished_run_is_refused_by_name(
    tmp_path: Path, tiny_sd1: str, photos: str, make_config: Make
) -> None:
    config = make_config(tiny_sd1, photos, prior_weight=0.0)
    run = runs.start(config, tmp_path / "half-way")
    with pytest.raises(RunError, match=r"half-way has not finished"):
        sample(run, ["a dog"], [0])
    next(iter(train(run)))
    with pytest.raises(RunError, match=r"half-way has not finished"):
        sample(run, ["a dog"], [0])


def first_latents(source: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Return the noise that sampling from a source starts from, [B, C, h, w]."""
    from diffusers import UNet2DConditionModel

    inputs: list[torch.Tensor] = []
    forward = UNet2DConditionModel.forward

    def spy(unet: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs.append(latents.clone())
        return forward(unet, latents, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", spy)
        sample(source, ["a dog"], [0, 1], **QUICK)
    return inputs[0]


def test_base_and_run_start_from_the_same_noise_and_end_differently(
    finished: Run, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = (first_latents(source, monkeypatch) for source in (family, finished))
    assert torch.equal(base, tuned)
    assert not torch.equal(base[0], base[1])
    before, after = (sample(s, ["a dog"], [0], **QUICK) for s in (family, finished))
    assert not np.array_equal(pixels(before), pixels(after))


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_returns_to_the_mode_it_was_in(
    fails: bool, tiny_sd1: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = loading.load_model(tiny_sd1)
    (encoder,) = family.text_encoders
    family.denoiser.train()
    encoder.eval()
    modes: list[tuple[bool, bool]] = []
    forward = type(family.denoiser).forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        modes.append((family.denoiser.training, encoder.training))
        if fails:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(family.denoiser), "forward", spy)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(family, ["a dog"], [0], **QUICK)
    else:
        sample(family, ["a dog"], [0], **QUICK)
    assert set(modes) == {(False, False)}
    assert family.denoiser.training and not encoder.training


def test_weights_stay_trainable_after_sampling(tiny_sd1: str) -> None:
    family = loading.load_model(tiny_sd1)
    sample(family, ["a dog"], [0], **QUICK)
    cond = family.encode_prompts(["a dog"])
    prediction = family.predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), cond)
    prediction.sum().backward()
    assert all(p.grad is not None for p in family.denoiser.parameters())


def test_a_gpu_that_accelerate_is_told_to_leave_alone_draws_nothing(
    tiny_sd1: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_no_gpu(device: torch.device) -> None:
        raise ValueError(f"Expected a cuda device, but got: {device}")  # as torch's

    PartialState()  # chooses the CPU, as with ACCELERATE_USE_CPU=true
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", of_no_gpu)
    denoiser = load_source(tiny_sd1).denoiser
    assert (denoiser.dtype, denoiser.device.type) == (torch.float32, "cpu")
    monkeypatch.setattr(sampling, "drawing_gpu", lambda: torch.device("cuda"))
    assert sampling.sampling_dtype() is torch.bfloat16


def test_a_pipeline_that_would_fill_the_gpu_is_offloaded(
    tiny_sd1: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test that offloading draws the same images; the CPU stands in for a GPU of some memory."""
    PartialState()  # chooses the CPU
    monkeypatch.setattr(sampling, "drawing_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(sampling, "sampling_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    components = loading.load_model(tiny_sd1).pipeline.components.values()
    modules = [module for module in components if isinstance(module, torch.nn.Module)]
    size = sum(weight.nbytes for m in modules for weight in m.state_dict().values()) // 2
    drawn = []
    # The second is as after training: torch's allocator keeps the memory, though it is unused.
    for free, reserved, hooks in (
        (2 * size + 1, 0, 0),
        (1, 2 * size, 0),
        (2 * size - 1, 0, len(modules)),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, n=reserved: n)
        family = load_source(tiny_sd1)
        assert family.denoiser.dtype is torch.bfloat16
        assert len(getattr(family.pipeline, "_all_hooks", [])) == hooks
        drawn.append(pixels(sample(family, ["a dog", "a cat"], seeds=[0], **QUICK)))
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])
