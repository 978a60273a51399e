"""Train a LoRA on a base, and generate with a model distilled from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families import loading
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import inference_settings, sample
from dreambooth_lib.training.validation_record import history, load_images, plan_of

Start = Callable[..., Run]


@pytest.fixture(scope="module")
def distilled(tiny_bases: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a tiny klein, with other weights than the tiny klein-base."""
    folder = tmp_path_factory.mktemp("distilled") / "klein"
    pipeline = Flux2KleinPipeline.from_pretrained(tiny_bases("flux_2_klein"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipeline.register_to_config(is_distilled=True)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def started(start_run: Start, clip_folder: Path) -> Start:
    def start(name: str, **changes: Any) -> Run:
        fields: dict[str, Any] = {"method": "lora", "memory": "low", "lora_rank": 2}
        fields |= {"prior": "none", "hold_out": False, "validation_inference_steps": None}
        fields |= {"validate_every": 2, "scorer": str(clip_folder), "learning_rate": 0.1}
        return start_run(name, "flux_2_klein", **(fields | changes))

    return start


def test_images_are_the_distilled_models_with_the_lora_and_training_is_the_bases(
    started: Start, distilled: str
) -> None:
    run = started("drawn", draw_base=distilled)
    list(train(run))
    plan, subject = plan_of(run), run.config.subject
    assert (plan.inference_steps, plan.guidance_scale) == (4, 1.0)
    own = inference_settings(run)
    assert (own.steps, own.guidance_scale, own.distilled) == (4, 1.0, True)
    assert [row.step for row in history(run)] == [0, 2]

    plain = Flux2KleinPipeline.from_pretrained(distilled)
    plain.set_progress_bar_config(disable=True)
    prompt, seed = plan.prompts_and_seeds(subject)[0][0]

    def drawn() -> Any:
        generator = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16}
        return plain(prompt=prompt, generator=generator, **settings).images[0]

    def difference(image: Any, other: Any) -> int:
        pixels = (torch.tensor([*picture.tobytes()]).int() for picture in (image, other))
        first, second = pixels
        return int((first - second).abs().max())

    before = drawn()
    assert difference(before, load_images(run, 0).subject[0]) <= 1
    plain.load_lora_weights(run.pipeline)
    after = drawn()
    assert difference(after, load_images(run, 2).subject[0]) <= 1
    assert difference(before, after) > 5
    for at in (None, 2):
        (found,) = sample(run, [prompt], [seed], at=at)
        assert difference(after, found.image) <= 1

    alone = started("alone")
    list(train(alone))
    weights, others = (load_state(one.checkpoints()[2])["model"] for one in (run, alone))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert inference_settings(alone).steps == 50


def test_a_base_that_the_lora_does_not_fit_is_refused(
    started: Start, distilled: str, tiny_bases: Callable[[str], str], tmp_path: Path
) -> None:
    other = started("family", draw_base=tiny_bases("sd3"))
    with pytest.raises(ConfigError, match=r"does not fit draw_base '.*sd3'; choose a base"):
        next(train(other))
    wider = Path(shutil.copytree(distilled, tmp_path / "wider"))
    pipeline = Flux2KleinPipeline.from_pretrained(distilled)
    config = dict(pipeline.transformer.config) | {"num_layers": 1, "mlp_ratio": 2.0}
    type(pipeline.transformer).from_config(config).save_pretrained(wider / "transformer")
    with pytest.raises(ConfigError, match=r"does not fit draw_base '.*wider'"):
        next(train(started("shape", draw_base=str(wider))))
    assert json.loads((wider / "model_index.json").read_text())["is_distilled"]


def test_only_a_lora_is_put_on_a_distilled_model() -> None:
    with pytest.raises(ConfigError, match=r"draw_base is set but method is 'full'"):
        TrainConfig(Subject("photos", "dog"), "owner/base", draw_base="owner/few-steps")


def test_the_distilled_models_weights_are_counted_where_it_generates(
    started: Start, distilled: str, tiny_bases: Callable[[str], str]
) -> None:
    config = started("counted", draw_base=distilled).config
    base = loading.load_model(tiny_bases("flux_2_klein"))
    size = sum(p.nbytes for p in base.denoiser.parameters())
    more = estimate(config, "no").weights - estimate(config.replace(draw_base=None), "no").weights
    assert size <= more < 1.2 * size
    undrawn = config.replace(validate_every=0)
    assert estimate(undrawn, "no").weights == estimate(config.replace(draw_base=None), "no").weights
    assert runs.resume(started("kept", draw_base=distilled).folder).config.draw_base == distilled
