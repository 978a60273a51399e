"""The fast sampler: DPM-Solver++ 2M for any base whose noise is discrete."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from dreambooth_lib.families.drawing import fast_scheduler
from dreambooth_lib.families.noise_schedule import DiscreteNoise
from tools import samplers

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
#: Schedulers as bases have them: class and config.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "1.x": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "2.x": ("DDIMScheduler", {"prediction_type": "v_prediction", "steps_offset": 1}),
    "XL": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "toybox": ("DDIMScheduler", {"prediction_type": "v_prediction",
                                 "timestep_spacing": "trailing"}),
    "sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++",
                                            "solver_order": 3}),
    "exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
}  # fmt: skip


def scheduler_of(base: str) -> Any:
    kind, settings = BASES[base]
    return getattr(diffusers, kind).from_config(BETAS | settings)


@pytest.mark.parametrize("base", BASES)
def test_it_keeps_the_bases_noise_and_draws_none_of_its_own(base: str) -> None:
    own = scheduler_of(base)
    fast, noise = fast_scheduler(own), DiscreteNoise.of_scheduler(own)
    assert fast.config.prediction_type == noise.prediction_type
    torch.testing.assert_close(fast.alphas_cumprod, noise.alphas_cumprod, atol=1e-7, rtol=1e-5)
    fast.set_timesteps(15)
    assert len(fast.timesteps) == 15 and int(fast.timesteps[0]) == 999
    assert float(fast.sigmas[-1]) == 0 and bool((fast.sigmas.diff() < 0).all())
    assert (fast.config.algorithm_type, fast.config.solver_order) == ("dpmsolver++", 2)


@pytest.mark.parametrize("base", BASES)
def test_fifteen_steps_draw_detail_of_every_size_as_large_as_it_should_be(base: str) -> None:
    """Within 2%; 30 steps of DDIM lose more of fine detail."""
    own = scheduler_of(base)
    ddim = diffusers.DDIMScheduler.from_config(own.config, clip_sample=False)
    for std in (0.2, 0.3, 0.5, 1.0):
        assert samplers.amplitude(fast_scheduler(own), 15, std) == pytest.approx(1, abs=0.02)
    assert samplers.amplitude(ddim, 30, 0.2) < 0.9


def test_the_study_writes_its_tables_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "PROMPTS", ("a dog",))
    monkeypatch.setattr(samplers, "STEPS", 2)
    monkeypatch.setattr(samplers, "FAST_STEPS", (2,))
    monkeypatch.setattr(samplers, "BLOCKS", ((1.0, "trailing"),))
    monkeypatch.setattr(samplers, "SPLITS", 3)
    samplers.main(["--out", str(tmp_path), "--images", "2"])
    lines = (tmp_path / "samplers.md").read_text().splitlines()
    assert [line.strip("| ").split(" | ")[:2] for line in lines[3:]] == [
        ["own", "2"], ["own", "1"], *([name, "2"] for name in (
            "DPM-Solver++ 2M", "DPM-Solver++ 2M Karras", "DPM-Solver++ 2M log-SNR"
        ))
    ]  # fmt: skip
    assert lines[2].startswith("| noise |")
    assert lines[3].endswith("(1.000) |"), "the base's own is alike itself"
    assert len((tmp_path / "amplitudes.md").read_text().splitlines()) == 2 + 2 + 3
    monkeypatch.setattr(samplers, "draw", None)
    samplers.main(["--out", str(tmp_path), "--images", "2"])
    assert (tmp_path / "samplers.md").read_text().splitlines() == lines
