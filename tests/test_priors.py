"""Test what a prior preserves besides the class: more prompts, and the weights themselves."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.prior_prompts import generic_prompts
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families import loading
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train, training_steps
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation import UNRELATED_PROMPTS
from tools.toybox.world import CLASSES

Start = Callable[..., Run]
OTHERS = ("a car", "a clock")


@pytest.mark.parametrize(
    "changes",
    [
        {"prior": "generated", "prior_prompts": OTHERS},
        {"prior": "distilled", "prior_prompts": (*OTHERS, ""), "memory": "low"},
        {"prior": "distilled_images", "prior_prompts": OTHERS, "method": "lora", "memory": "low"},
        {"prior": "distilled_images", "method": "lora", "train_text_encoder": True},
        {"anchor_weight": 100.0},
        {"anchor_weight": 100.0, "memory": "lowest", "prior": "none"},
        {"anchor_weight": 100.0, "method": "lora", "prior_prompts": OTHERS},
    ],
)
def test_a_run_resumes_bit_for_bit(changes: dict[str, Any], start_run: Start) -> None:
    complete, interrupted = (start_run(name, "sd1", steps=3, **changes) for name in "ab")
    losses = [step.prior_loss for step in train(complete)]
    assert all((loss is None) == (changes.get("prior") == "none") for loss in losses)
    for _ in islice(train(interrupted), 2):
        pass
    list(train(runs.resume(interrupted.folder)))
    first, second = (load_state(run.checkpoints()[3])["model"] for run in (complete, interrupted))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_lora_keeps_other_prompts_by_default() -> None:
    def prior(**fields: Any) -> tuple[str, tuple[str, ...] | None]:
        config = TrainConfig(Subject("p", "dog"), **fields)
        again = TrainConfig.from_dict(config.to_dict())
        assert (again.prior, again.prior_prompts) == (config.prior, config.prior_prompts)
        return config.prior, config.prior_prompts

    generic = generic_prompts("toybox", "dog")
    assert prior() == ("generated", None)
    assert prior(method="lora") == ("distilled_images", generic)
    assert prior(method="lora", quantize="nf4", train_token=True) == ("distilled_images", generic)
    assert prior(method="lora", prior_prompts=OTHERS) == ("distilled_images", OTHERS)
    assert prior(method="lora", prior="generated") == ("generated", None)
    assert prior(method="lora", prior="none") == ("none", None)
    assert prior(method="lora", prior_weight=0.0) == ("distilled_images", None)
    assert prior(method="lora", class_folder="mine") == ("distilled_images", None)
    full = TrainConfig(Subject("p", "dog"))
    assert full.replace(method="lora", prior=None).prior_prompts == generic


def test_the_generic_prompts_of_a_loras_prior_go_with_it() -> None:
    lora = TrainConfig(Subject("p", "dog"), method="lora")
    of_photos = generic_prompts("photos", "dog")
    for changes, prompts in (
        ({"steps": 9}, lora.prior_prompts),
        ({"prior": "generated"}, None),
        ({"class_folder": "mine"}, None),
        ({"method": "full"}, None),
        ({"base": "some/base"}, of_photos),
        ({"subject": Subject("p", "cow")}, generic_prompts("toybox", "cow")),
        ({"prior_prompts": OTHERS, "prior": "generated"}, OTHERS),
    ):
        assert lora.replace(**changes).prior_prompts == prompts, changes
    own = TrainConfig(Subject("p", "dog"), method="lora", prior="generated", prior_prompts=OTHERS)
    assert own.replace(class_images=9, prior="distilled_images").prior_prompts == OTHERS


@pytest.mark.parametrize("prior", ["generated", "distilled_images", "distilled"])
def test_half_of_the_priors_rows_are_of_other_prompts(prior: str, start_run: Start) -> None:
    run = start_run("run", "sd1", prior=prior, prior_prompts=OTHERS, class_images=8)
    batches = Trainer(run).batches
    prompts = [p for step in range(8) for p in batches.at(step).prompts[2:]]  # two epochs of 8
    assert [prompts.count(p) for p in ("a dog", *OTHERS)] == [8, 4, 4]
    assert (run.folder.parent / "class_images").exists() == (prior != "distilled")


@pytest.mark.parametrize("prior", ["distilled_images", "distilled"])
def test_the_bases_prediction_for_the_rows_own_prompt_is_the_target(
    prior: str, start_run: Start, tiny_bases: Callable[[str], str]
) -> None:
    run = start_run("run", "sd1", prior=prior, prior_prompts=OTHERS, learning_rate=0.05)
    trainer = Trainer(run)
    list(islice(training_steps(trainer), 2))
    batch = next(b for b in map(trainer.batches.at, range(4)) if {*b.prompts} & {*OTHERS})
    prompts, x_t, t = batch.prompts[2:], batch.noised.x_t[2:], batch.noised.t[2:]
    base = loading.load_model(tiny_bases("sd1"))
    with torch.no_grad():
        expected = base.predict(x_t, t, base.encode_prompts(prompts))
    target = trainer.batches.split(batch, 0, 1).noised.target[2:]
    assert torch.allclose(target, expected, atol=1e-5)


def test_only_class_images_are_held_out_to_measure_the_class(
    start_run: Start, clip_folder: Any
) -> None:
    changes = {"validate_every": 2, "scorer": str(clip_folder), "class_images": 16}
    trainer = Trainer(start_run("run", "sd1", prior_prompts=OTHERS, **changes))
    assert trainer.validator is not None
    assert {*trainer.validator.held_out.prompts["class"]} == {"a dog"}
    with_others = [prompt for _, prompt in trainer.batches.by_shape[16, 16][1][1]]
    assert [with_others.count(p) for p in ("a dog", *OTHERS)] == [6, 4, 4]


@pytest.mark.parametrize("memory", ["standard", "low", "lowest"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_anchor_shrinks_the_change_of_the_weights(
    method: str, memory: str, start_run: Start
) -> None:
    def change(name: str, weight: float | None) -> float:
        options = {"method": method, "memory": memory, "learning_rate": 0.01, "weight_decay": 0.0}
        trainer = Trainer(start_run(name, "sd1", anchor_weight=weight, **options))
        before = {n: w.detach().clone() for n, w in trainer.trainable.trained_weights().items()}
        next(training_steps(trainer))
        after = trainer.trainable.trained_weights()
        return max((after[name].detach() - before[name]).abs().max().item() for name in before)

    free = change("free", None)
    # In bfloat16 rounding adds to it; 100 = 1 / learning_rate takes the weights all the way back.
    assert change("half", 50.0) == pytest.approx(free / 2, rel=0.3 if memory == "lowest" else 1e-3)
    assert change("none", 100.0) == pytest.approx(0, abs=1e-6)


def test_one_word_stands_for_prompts_of_the_base_without_the_class() -> None:
    dog, cow = (
        TrainConfig(Subject("p", noun), prior_prompts="generic")  # type: ignore[arg-type]
        for noun in ("dog", "cow")
    )
    assert dog.prior_prompts == generic_prompts("toybox", "dog")
    assert {*dog.prior_prompts} - {*cow.prior_prompts} == {"a cow at sunset"}
    assert TrainConfig.from_dict(dog.to_dict()) == dog
    assert generic_prompts("owner/model", "dog") != dog.prior_prompts
    assert TrainConfig(Subject("p", "dog"), prior_prompts=()).prior_prompts is None


def test_validation_images_and_half_of_the_world_are_not_in_the_built_in_prompts() -> None:
    named = {word for prompt in generic_prompts("toybox", "dog") for word in prompt.split()}
    seen, of_validation = named & CLASSES.keys(), {w for p in UNRELATED_PROMPTS for w in p.split()}
    assert seen.isdisjoint(of_validation) and 10 < len(seen) <= len(CLASSES) / 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prior_prompts": "a car"}, "prior_prompts is 'a car'; write a list of prompts, or"),
        ({"prior_prompts": ("a\0b",)}, r"a prompt of prior_prompts contains .* U\+0000"),
        ({"prior_prompts": ("a",) * 2000}, "has 2000 prompts; give at most 1000"),
        ({"prior_prompts": OTHERS, "class_folder": "."}, "leave class_folder out, for the base"),
        ({"anchor_weight": -1.0}, "anchor_weight is -1.0; it must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TrainConfig(Subject("p", "dog"), **changes)
