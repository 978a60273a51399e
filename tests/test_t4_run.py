"""The minutes of a run on a T4, counted: they follow the library's defaults and the config."""

from collections import Counter
from typing import Any

import pytest

from dreambooth_lib.families.stable_diffusion import StableDiffusion
from tools import launches, t4_run
from tools.t4_run import Stage


@pytest.fixture(autouse=True)
def tiny_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count a tiny model's step; a real one takes half a minute."""
    count = launches.count
    monkeypatch.setattr(launches, "count", lambda settings: count(settings, tiny=True))
    monkeypatch.setattr(t4_run, "step_flops", lambda changes: 4e12)


def by_name(changes: dict[str, Any]) -> dict[str, Stage]:
    return {stage.name: stage for stage in t4_run.stages(changes)}


def test_the_minutes_follow_the_config() -> None:
    usual = by_name({})
    half = by_name({"class_images": 100, "steps": 500, "prior_inference_steps": 10})
    rows = t4_run.rows_drawn({})["class image"]["unet"]
    assert usual["class images"].count.startswith(f"200 x {rows} U-Net")
    assert half["class images"].count.startswith("100 x 22 U-Net")  # PNDM evaluates once more
    assert half["class images"].seconds < usual["class images"].seconds / 2
    assert half["training"].seconds == pytest.approx(usual["training"].seconds / 2)
    assert half["latents"].count == "105 images"
    assert half["checkpoints"].seconds < usual["checkpoints"].seconds
    total = t4_run.minutes([*usual.values()])
    assert total < sum(stage.seconds for stage in usual.values()) / 60  # some are beside
    table = t4_run.markdown([*usual.values()])
    assert f"| {total:.1f} |" in table and "| network | 0.047 GB/s |" in table


def test_own_class_images_are_not_drawn() -> None:
    own = by_name({"class_folder": "class"})
    assert own["class images"].seconds == 0


def test_rows_follow_the_bases_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = t4_run.rows_drawn({})["validation"]["unet"]
    own = StableDiffusion.default_inference
    fewer = type(own)(**vars(own) | {"fast_validation_steps": own.fast_validation_steps // 2})
    monkeypatch.setattr(StableDiffusion, "default_inference", fewer)
    assert t4_run.rows_drawn({})["validation"]["unet"] < before


def test_flops_are_those_of_the_published_models() -> None:
    assert t4_run.flops("unet") == pytest.approx(0.8e12, rel=0.1)
    assert t4_run.flops("decode") == pytest.approx(2.5e12, rel=0.1)


def test_rows_are_told() -> None:
    assert t4_run.told(Counter(unet=52, decode=1)) == "52 U-Net, 1 decoded in float16"
