"""Compare the forward processes with diffusers' schedulers and the papers' formulas."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from dreambooth_lib.families.drawing import fast_scheduler
from dreambooth_lib.families.noise_schedule import DiscreteNoise, min_snr_weights

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, rows, 4, 8, 8, generator=generator)
    return x_0, noise, torch.tensor([0, 1, 250, 500, 998, 999])[:rows]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noised_latents_and_targets_equal_the_schedulers(prediction_type):
    scheduler = DDPMScheduler(**SD, prediction_type=prediction_type)
    x_0, noise, t = batch()
    noised = DiscreteNoise.of_scheduler(scheduler)(x_0, noise, t)
    torch.testing.assert_close(noised.x_t, scheduler.add_noise(x_0, noise, t))
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x_0, noise, t)
    torch.testing.assert_close(noised.target, target)
    assert noised.weight.tolist() == [1.0] * len(t)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_schedulers_own_step_recovers_x_0_from_a_perfect_prediction(prediction_type):
    scheduler = DDIMScheduler(**SD, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    x_0, noise, t = batch()
    noised = DiscreteNoise.of_scheduler(scheduler)(x_0, noise, t)
    for row in range(len(t)):
        step = scheduler.step(noised.target[row], int(t[row]), noised.x_t[row])
        torch.testing.assert_close(step.pred_original_sample, x_0[row], atol=2e-4, rtol=1e-3)


def test_any_scheduler_of_a_base_gives_the_same_process():
    from diffusers import DPMSolverMultistepScheduler

    ddpm = DDPMScheduler(**SD)
    dpm_solver = DPMSolverMultistepScheduler.from_config(ddpm.config)
    process = DiscreteNoise.of_scheduler(dpm_solver)
    torch.testing.assert_close(process.alphas_cumprod, ddpm.alphas_cumprod)


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "LCMScheduler", "KDPM2DiscreteScheduler", "TCDScheduler",
             "DDPMScheduler"]
)  # fmt: skip
@pytest.mark.parametrize("given", [{}, {"beta_end": 0.01}])
def test_what_a_schedulers_config_lacks_is_its_own_classs_default(name, given):
    scheduler = getattr(diffusers, name).from_config(given)
    for process in (DiscreteNoise.of_scheduler(scheduler), fast_scheduler(scheduler)):
        torch.testing.assert_close(process.alphas_cumprod, scheduler.alphas_cumprod)


def test_zero_terminal_snr_of_the_base_is_preserved():
    scheduler = DDPMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    x_0, noise, t = batch()
    noised = DiscreteNoise.of_scheduler(scheduler, min_snr_gamma=5.0)(x_0, noise, t)
    torch.testing.assert_close(noised.x_t[-1], noise[-1])
    torch.testing.assert_close(noised.target[-1], -x_0[-1])
    assert noised.weight.isfinite().all()


def test_min_snr_weights_by_hand():
    snr = torch.tensor([0.5, 5.0, 20.0])
    torch.testing.assert_close(min_snr_weights(snr, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.25]))
    expected = torch.tensor([0.5 / 1.5, 5 / 6, 5 / 21])
    torch.testing.assert_close(min_snr_weights(snr, 5.0, "v_prediction"), expected)


def test_min_snr_weights_make_the_same_error_of_x_0_for_epsilon_and_v():
    # An error d of x_0 is an error d * sqrt(snr) of epsilon and d * sqrt(snr + 1) of v.
    snr = torch.logspace(-3, 3, 13)
    in_epsilon = min_snr_weights(snr, 5.0, "epsilon") * snr
    in_v = min_snr_weights(snr, 5.0, "v_prediction") * (snr + 1)
    torch.testing.assert_close(in_epsilon, in_v)
    torch.testing.assert_close(in_v, snr.clamp(max=5.0))


def test_timesteps_are_independent_uniform_and_repeatable():
    process = DiscreteNoise.of_scheduler(DDPMScheduler(**SD))
    drawn = process.sample_timesteps(20_000, torch.Generator().manual_seed(1))
    assert drawn.min() == 0 and drawn.max() == 999
    assert abs(drawn.float().mean().item() - 499.5) < 10
    again = process.sample_timesteps(20_000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    assert drawn[:10].unique().numel() > 5


def test_a_prediction_type_that_cannot_be_trained_is_named():
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        DiscreteNoise.of_scheduler(DDPMScheduler(**SD, prediction_type="sample"))
