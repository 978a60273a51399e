"""Which timesteps training draws, and which of a LoRA's ranks it trains at them."""

from collections.abc import Callable
from itertools import islice

import pytest
import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer

Start = Callable[..., Run]


@pytest.mark.parametrize("family", ["sd1", "flux", "flux_2_klein"])
def test_a_bias_moves_the_timesteps_and_none_is_as_the_base_was_trained(
    family: str, start_run: Start
) -> None:
    trainer = Trainer(start_run("run", family, prior="none"))
    means = []
    for bias in (-3.0, -1.0, None, 0.0, 1.0, 3.0):
        trainer.batches.config = trainer.config.replace(timestep_bias=bias)
        drawn = trainer.batches._sample_timesteps(4000, torch.Generator().manual_seed(0)).double()
        assert drawn.min() >= 0 and drawn.max() <= (999 if family == "sd1" else 1000)
        means.append(drawn.mean().item())
    *rising, least, same, more, most = means
    assert [*rising, same, more, most] == sorted(means[:2] + means[3:])
    assert same == pytest.approx(least, rel=0.05)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux", "flux_2_klein", "z_image"])
def test_fewer_ranks_are_trained_the_more_noise_there_is(family: str, start_run: Start) -> None:
    settings = {"method": "lora", "lora_rank": 4, "lora_min_rank": 1, "prior": "none"}
    trainer = Trainer(start_run("run", family, **settings))
    for name, weight in trainer.trainable.trained_weights().items():
        if "lora_B" in name:  # where it is 0, A has no gradients
            torch.nn.init.normal_(weight, std=0.1)

    def trained_ranks(timestep: float) -> set[int]:
        batch = next(trainer.micro_batches())
        t = torch.full_like(batch.noised.t, timestep)
        prediction = trainer.model(batch.noised.x_t, t, batch.cond, batch.prompts)
        for parameter in trainer.optimizer.parameters:
            parameter.grad = None
        prediction.square().sum().backward()
        names = trainer.trainable.trained_weights().items()
        of_a = [w.grad.flatten(1).abs().amax(1) for n, w in names
                if "lora_A" in n and w.grad is not None]  # fmt: skip
        return {rank for rank in range(4) if any(rows[rank] > 0 for rows in of_a)}

    ranks = [trained_ranks(t) for t in (999, 600, 0)]
    assert ranks == [{0}, {0, 1}, {0, 1, 2, 3}]


@pytest.mark.parametrize("memory", ["standard", "low"])
def test_a_run_resumes_bit_for_bit(memory: str, start_run: Start) -> None:
    settings = {"method": "lora", "lora_min_rank": 1, "timestep_bias": 0.5, "memory": memory}
    complete, interrupted = (start_run(name, "sd1", **settings) for name in "ab")
    list(train(complete))
    list(islice(train(interrupted), 1))
    list(train(runs.resume(interrupted.folder)))
    first, second = (load_state(run.checkpoints()[2])["model"] for run in (complete, interrupted))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"timestep_bias": 4}, "timestep_bias is 4.0; it must be from -3 to 3"),
        ({"lora_min_rank": 17}, "lora_min_rank is 17, above lora_rank 16; lower it"),
        ({"lora_min_rank": 1, "dora": True}, "lora_min_rank and dora are both set"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TrainConfig(Subject("p", "dog"), **changes)  # type: ignore[arg-type]
