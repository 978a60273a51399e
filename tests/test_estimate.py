"""What is counted before anything is loaded, against what real tensors take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dreambooth_lib import families, runs
from dreambooth_lib.config import ConfigError, TrainConfig
from dreambooth_lib.estimate import Alive, estimate, fitted, ways_out
from dreambooth_lib.families import base
from dreambooth_lib.sampling import draw
from dreambooth_lib.training import Trainer
from dreambooth_lib.weights import precisions

Make = Callable[..., TrainConfig]
FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "flux", "z_image"]


def test_alive_counts_what_is_held_and_the_most_at_once() -> None:
    with Alive() as alive:
        one = torch.zeros(1000)
        assert alive.now == 4000
        two = one + 1
        view = two[:10]
        assert alive.now == 8000
        del two
        assert alive.now == 8000  # the view holds it
        del view
        assert alive.now == 4000
        (one * 2 + 1).sum()
    assert alive.most == 12000


@pytest.fixture
def config(photos: str, make_config: Make, tiny_bases: Callable[[str], str]) -> Make:
    def make(family: str, **changes: Any) -> TrainConfig:
        return make_config(tiny_bases(family), photos, **({"resolution": 16} | changes))

    return make


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_from_the_configs_alone(
    family: str, method: str, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(family, method=method, lora_rank=1, train_text_encoder=family != "z_image")
    # Z-Image has no float16.
    half, precision = torch.float16, "fp16"
    if family == "z_image":
        half, precision = torch.bfloat16, "bf16"
    loaded = families.load(asked.base, **precisions(asked, half))
    parts = [loaded.denoiser, *loaded.text_encoders, *loaded.frozen]
    # Some layers of T5 stay in float32 whatever is asked.
    held = sum(p.nbytes for part in parts for p in part.parameters())
    trained = [
        p.numel() for part in parts[: 1 + len(loaded.text_encoders)] for p in part.parameters()
    ]
    # Not a weight may be read for it.
    monkeypatch.setattr(families, "load", None)
    found = estimate(asked, precision)
    if method == "full":
        assert found.weights == pytest.approx(held, rel=0.02)  # and buffers
        assert found.moments == pytest.approx(sum(trained) * (2 + 8 / 256), rel=0.01)
    else:
        added = found.moments / (2 + 8 / 256)
        assert 0 < added < 0.2 * sum(trained)
        assert found.weights == pytest.approx(held + 4 * added, rel=0.02)


# At low memory the room that the CPU's own convolutions take would be a third of a tiny U-Net's.
@pytest.mark.parametrize(
    ("family", "memory"), [("sd1", "standard"), ("sd3", "standard"), ("sd3", "low")]
)
def test_working_memory_and_operations_are_those_of_a_real_update(
    family: str, memory: str, config: Make, tmp_path: Any
) -> None:
    asked = config(family, memory=memory, prior="distilled", optimizer="adamw")
    trainer = Trainer(runs.start(asked.replace(prior="none"), tmp_path / "run"))
    trainer.config = asked
    batch = trainer.batches.at(0)
    rows = [0, 0, 1, 1]
    noised = type(batch.noised)(*(value[rows] for value in batch.noised))
    cond = {name: value[rows] for name, value in batch.cond.items()}
    with Alive() as alive:
        for parameter in trainer.updater.model.state_dict().values():
            alive.without(parameter)
        if trainer.updater.inside is not None:
            trainer.updater.inside.begin(torch.Generator())
            trainer.updater.inside.optimizer.step = lambda: None  # moments are counted apart
        trainer.updater.model(noised.x_t, noised.t, cond, []).square().mean().backward()
    found = estimate(asked, "no")
    # The CPU's own convolutions take some room besides.
    assert found.working == pytest.approx(alive.most, rel=0.15)
    assert found.flops == pytest.approx(alive.flops, rel=0.01)


def test_work_is_what_torchs_own_counter_counts() -> None:
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    )
    x = torch.randn(2, 3, 3, 3)
    with FlopCounterMode(display=False) as work:
        layers(x).sum().backward()
    with Alive() as alive:
        layers(x).sum().backward()
    assert alive.flops == work.get_total_flops() > 0


def test_each_level_of_memory_takes_less_than_the_one_before(config: Make) -> None:
    levels = [
        estimate(config("sd1", memory=memory, batch_size=1), "fp16").memory
        for memory in ("standard", "low", "lowest")
    ]
    assert levels == sorted(levels, reverse=True) and len(set(levels)) == 3


@pytest.mark.parametrize("large", [False, True])
def test_pictures_that_become_latents_are_counted_large_ones_one_at_a_time(
    large: bool, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PIXELS", 16 * 16 * (1 if large else 8))
    asked = config("sd1", method="lora", lora_rank=1, seed=int(large))
    family = families.load(asked.base, **precisions(asked, torch.float32))
    with Alive() as alive:
        for weight in family.pipeline.vae.state_dict().values():
            alive.without(weight)
        for pixels in torch.zeros(8, 3, 16, 16).split(1 if large else 8):
            family.encode_images(pixels)
    found = estimate(asked, "no")
    # The CPU's own convolutions take some room besides.
    assert found.encoding - found.weights == pytest.approx(alive.most, rel=0.25)


def test_drawing_for_a_look_is_counted_where_there_are_looks(config: Make) -> None:
    asked = config("sd1", memory="low", method="lora", lora_rank=1, watch_every=2)
    found = estimate(asked, "no")
    family = families.load(asked.base, **precisions(asked, torch.float32))
    with torch.no_grad(), Alive() as alive:
        for module in (family.denoiser, *family.text_encoders, family.pipeline.vae):
            for weight in module.state_dict().values():
                alive.without(weight)
        draw(family, [("a dog", seed) for seed in range(family.at_a_time)], 1, 3.0)
    # The pipeline makes its noise and its pixels of latents besides.
    assert found.looking == pytest.approx(alive.most, rel=0.25)
    assert found.memory >= found.weights + found.moments + found.looking
    assert estimate(asked.replace(watch_every=0), "no").looking == 0


def test_a_frozen_copy_for_the_distilled_prior_is_counted(config: Make) -> None:
    plain, distilled = (
        estimate(config("sd1", prior=prior), "fp16").weights for prior in ("generated", "distilled")
    )
    assert distilled > plain
    lora = [estimate(config("sd1", prior=p, method="lora"), "fp16").weights
            for p in ("generated", "distilled")]  # fmt: skip
    assert lora[0] == lora[1]


def test_auto_takes_the_first_level_that_fits(config: Make) -> None:
    asked = config("sd1")
    assert asked.memory == "auto"
    needs = {
        memory: estimate(asked.replace(memory=memory), "fp16").memory
        for memory in ("standard", "low", "lowest")
    }
    for level, need in needs.items():
        assert fitted(asked, "fp16", need).memory == level
    assert fitted(asked, "fp16", 1).memory == "lowest"
    assert fitted(asked.replace(max_grad_norm=1.0), "fp16", 1).memory == "standard"
    assert fitted(asked.replace(memory="low"), "fp16", 1 << 40).memory == "low"


@pytest.mark.parametrize("family", FAMILIES[:-1])  # Z-Image has no float16
def test_bfloat16_weights_compute_in_float16_or_are_refused(family: str, config: Make) -> None:
    asked = config(family)
    lowest = asked.replace(memory="lowest")
    assert estimate(lowest, "bf16").memory > 0
    if family == "sd3":
        with pytest.raises(ConfigError, match=r"memory is 'lowest'.* cannot compute.*float16; set"):
            estimate(lowest, "fp16")
        assert fitted(asked, "fp16", 1).memory == "low"
        assert "'lowest'" not in ways_out(asked, "fp16")
    else:
        assert estimate(lowest, "fp16").memory > 0


def test_ways_out_of_too_little_memory_are_named_with_what_they_take(config: Make) -> None:
    text = ways_out(config("sd1", memory="standard", batch_size=4, lora_rank=1), "fp16")
    assert "memory 'low' (" in text and "method 'lora' (" in text and "resolution 8 (" in text
    assert "GiB as it is" in text
