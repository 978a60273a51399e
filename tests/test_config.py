"""Configs: round trips, defaults by base, and messages that name the field that is wrong."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject

DOG = Subject("photos", "dog")

#: A value for every field that differs from its default.
ALL_FIELDS: dict[str, Any] = {
    "base": "owner/model",
    "revision": "main",
    "variant": "fp16",
    "prediction_type": "v_prediction",
    "clip_skip": 2,
    "prior_weight": 0.5,
    "keep_class": 0.9,
    "min_snr_gamma": 5.0,
    "timestep_bias": -0.5,
    "prompt_dropout": 0.2,
    "class_images": 7,
    "class_folder": "/class",
    "prior_inference_steps": 9,
    "prior_guidance_scale": 2.5,
    "steps": 11,
    "batch_size": 6,
    "gradient_accumulation": 3,
    "learning_rate": 2e-6,
    "lr_schedule": "cosine",
    "warmup_steps": 5,
    "optimizer": "adamw8bit",
    "weight_decay": 0.02,
    "max_grad_norm": 0.5,
    "dropout": 0.2,
    "ema_decay": 0.99,
    "guidance_scale": 7.5,
    "validation_inference_steps": 21,
    "train_text_encoder": True,
    "text_encoder_learning_rate": 1e-6,
    "text_encoder_steps": 6,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "resolution": 256,
    "crop": "random",
    "background_weight": 0.25,
    "background_prior": True,
    "flip": True,
    "seed": 12,
    "checkpoint_every": 13,
    "checkpoints_kept": 4,
    "validate_every": 7,
    "validation_share": 0.2,
    "hold_out": False,
    "scorer": "some/clip",
    "image_scorer": "some/dino",
    "prompt_chunks": 3,
    "early_stop": True,
    "prior": "distilled",
    "prior_prompts": ("", "a car"),
    "anchor_weight": 0.5,
    "method": "lora",
    "lora_rank": 3,
    "lora_min_rank": 2,
    "lora_alpha": 6,
    "lora_dropout": 0.3,
    "lora_layers": "attention",
    "quantize": "nf4",
    "draw_base": "owner/few-steps",
    "train_token": True,
}
#: Refused beside others of these; tests/test_methods.py and tests/test_adapters.py have them.
ALONE = {"memory", "adapter", "adapter_settings", "dora"}


def full() -> TrainConfig:
    subject = Subject('/p/"odd" é', "back pack", "zwx", "bag", "object", ("b.jpg", "c é.png"))
    return TrainConfig(subject=subject, **ALL_FIELDS)


def test_the_full_config_sets_every_field() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)} - {"subject"}
    assert ALL_FIELDS.keys() == names - ALONE
    default = TrainConfig(subject=DOG)
    assert all(getattr(default, name) != value for name, value in ALL_FIELDS.items())


@pytest.mark.parametrize("make", [full, lambda: TrainConfig(subject=DOG)], ids=["full", "default"])
def test_a_config_comes_back_from_dict_and_toml(
    make: Callable[[], TrainConfig], tmp_path: Path
) -> None:
    config = make()
    assert TrainConfig.from_dict(config.to_dict()) == config
    absolute = config.replace(
        subject=dataclasses.replace(config.subject, photos=str(tmp_path / "p"), name="n")
    )
    (tmp_path / "config.toml").write_text(absolute.to_toml())
    assert TrainConfig.from_toml(tmp_path / "config.toml") == absolute


def test_a_dict_given_is_not_changed() -> None:
    fields = full().to_dict()
    before = {**fields, "subject": dict(fields["subject"])}
    TrainConfig.from_dict(fields)
    assert fields == before


def test_fields_left_out_take_the_bases_defaults_and_given_ones_stay() -> None:
    toybox, other = TrainConfig(subject=DOG), TrainConfig(subject=DOG, base="owner/model")
    assert (other.steps, other.batch_size, other.class_images) == (1000, 1, 200)
    assert other.learning_rate == 5e-6
    assert toybox.batch_size > 1 and toybox.class_images < 200
    assert toybox.learning_rate > other.learning_rate
    assert (toybox.prior_guidance_scale, other.prior_guidance_scale) == (1.0, None)
    assert (toybox.prior_inference_steps, other.prior_inference_steps) == (None, None)
    assert (toybox.guidance_scale, other.guidance_scale) == (3.25, None)
    assert (toybox.ema_decay, other.ema_decay) == (0.98, None)
    given = TrainConfig(subject=DOG, steps=3, batch_size=5, class_images=0, prior_weight=0.0)
    assert (given.steps, given.batch_size, given.class_images) == (3, 5, 0)


def test_photos_and_class_folder_are_relative_to_the_toml_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "config.toml"
    file.write_text(
        'class_folder = "../class"\n[subject]\nphotos = "../photos"\nclass_noun = "dog"\n'
    )
    config = TrainConfig.from_toml(file)
    assert config.subject.photos == str(tmp_path / "photos")
    assert config.class_folder == str(tmp_path / "class")
    absolute = tmp_path / "elsewhere"
    file.write_text(f'[subject]\nphotos = "{absolute}"\nclass_noun = "dog"\n')
    assert TrainConfig.from_toml(file).subject.photos == str(absolute)


def test_a_base_folder_beside_the_toml_file_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "config.toml"
    table = '[subject]\nphotos = "photos"\nclass_noun = "dog"\n'
    for written, read in (("mine", str(tmp_path / "mine")), ("org/name", "org/name")):
        names = {"base": "base", "draw_base": "method = 'lora'\ndraw_base", "scorer": "scorer",
                 "image_scorer": "image_scorer"}  # fmt: skip
        for name, key in names.items():
            file.write_text(f'{key} = "{written}"\n{table}')
            assert getattr(TrainConfig.from_toml(file), name) == read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'.*'bf16'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'.*'adamw'"),
        ({"lr_schedule": "step"}, "lr_schedule is 'step'.*'cosine'"),
        ({"crop": "left"}, "crop is 'left'.*'center'"),
        ({"background_weight": 2}, "background_weight is 2.*from 0 to 1"),
        ({"background_prior": True}, "background_prior is set but background_weight"),
        ({"steps": 0}, "steps is 0.*1 or more"),
        ({"batch_size": 0}, "batch_size is 0.*1 or more"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0.*1 or more"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0.*1 or more"),
        ({"checkpoints_kept": 0}, "checkpoints_kept is 0.*1 or more"),
        ({"prior_inference_steps": 0}, "prior_inference_steps is 0.*1 or more"),
        ({"prior_weight": -1.0}, "prior_weight is -1.0.*0 or more"),
        ({"class_images": -1}, "class_images is -1.*0 or more"),
        ({"warmup_steps": -1}, "warmup_steps is -1.*0 or more"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1.*0 or more"),
        ({"seed": -1}, "seed is -1.*0 or more"),
        ({"prior_guidance_scale": -1.0}, "prior_guidance_scale is -1.0.*0 or more"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0.*0 or more"),
        ({"prompt_dropout": 1.0}, "prompt_dropout is 1.0.*below 1"),
        ({"dropout": -0.1}, "dropout is -0.1.*at least 0"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5.*below 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0.*above 0"),
        ({"class_images": 0}, "prior_weight is 1.0 but class_images is 0.*class_folder"),
        (
            {"batch_size": 3, "gradient_accumulation": 2},
            "batch_size 3 does not split into gradient_accumulation 2.*multiple",
        ),
        ({"resolution": 100}, "resolution is 100.*multiple of 8"),
        ({"resolution": 0}, "resolution is 0.*8 or more"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma is 0.0.*above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0.*above 0"),
        ({"prior_weight": float("nan")}, "prior_weight is nan.*finite"),
        ({"learning_rate": float("inf")}, "learning_rate is inf.*finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_value_that_cannot_be_right_is_named_with_what_to_write(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(subject=DOG, **changes)
    with pytest.raises(ConfigError, match=message):
        TrainConfig(subject=DOG).replace(**changes)
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict({"subject": {"photos": "p", "class_noun": "dog"}, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"class_images": 0, "class_folder": "mine"},
        {"class_images": 0, "prior_weight": 0.0},
        {"batch_size": 4, "gradient_accumulation": 2},
        {"ema_decay": 0.0, "prompt_dropout": 0.99},
    ],
)
def test_values_at_the_edge_of_what_can_be_right_are_taken(changes: dict[str, Any]) -> None:
    config = TrainConfig(subject=DOG, **changes)
    assert {name: getattr(config, name) for name in changes} == changes


@pytest.mark.parametrize("field", ["class_noun", "identifier"])
def test_a_subject_without_words_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"subject\.{field} is empty"):
        Subject(**({"photos": "p", "class_noun": "dog"} | {field: "  "}))


def test_an_identifier_that_stands_for_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"subject\.identifier has \{\}"):
        Subject("p", "dog", identifier="{}")


def test_a_config_without_a_subject_is_refused() -> None:
    with pytest.raises(ConfigError, match="subject is missing"):
        TrainConfig(subject="photos")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no \[subject\] table"):
        TrainConfig.from_dict({"steps": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepz": 3}, r"unknown field 'stepz'; did you mean 'steps'\?$"),
        ({"foo": 3}, r"unknown field 'foo'; the fields are subject, base, .*timestep_bias"),
        ({"class_noun": 3}, r"unknown field 'class_noun'; did you mean 'subject\.class_noun'\?$"),
        ({"lora_alpha": "a"}, r"lora_alpha is 'a'; it must be a whole number, or left out\.$"),
        ({"lora_rank": "a"}, r"lora_rank is 'a'; it must be a whole number\.$"),
        ({"steps": "3"}, "steps is '3'; it must be a whole number, or left out"),
        ({"steps": 3.5}, "steps is 3.5; it must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"flip": 1}, "flip is 1; it must be true or false"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"base": ["a"]}, "base is .*; it must be text"),
        ({"class_folder": 3}, "class_folder is 3; it must be text, or left out"),
        ({"ema_decay": "no"}, "ema_decay is 'no'; it must be a number, or left out"),
    ],
)
def test_an_unknown_field_or_wrong_type_in_a_config_is_named(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict({"subject": {"photos": "p", "class_noun": "dog"}, **fields})


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ({"photos": "p"}, "subject.class_noun is missing"),
        ({"class_noun": "dog"}, "subject.photos is missing"),
        (
            {"photos": "p", "class_noun": "dog", "klass": "x"},
            r"unknown field 'subject\.klass'; the fields are subject\.photos, ",
        ),
        (
            {"photos": "p", "class_noun": "dog", "stepz": 4},
            r"unknown field 'subject\.stepz'; did you mean 'steps'\?$",
        ),
        ({"photos": "p", "class_noun": 3}, "subject.class_noun is 3; it must be text"),
    ],
)
def test_a_wrong_subject_table_is_named(subject: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict({"subject": subject})


def test_whole_numbers_serve_where_fractions_are_meant() -> None:
    fields = {"subject": {"photos": "p", "class_noun": "dog"}}
    config = TrainConfig.from_dict({**fields, "prior_weight": 2, "min_snr_gamma": 5})
    assert type(config.prior_weight) is float and type(config.min_snr_gamma) is float
    assert (config.prior_weight, config.min_snr_gamma) == (2.0, 5.0)


def test_a_missing_or_broken_toml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*nothing\.toml"):
        TrainConfig.from_toml(tmp_path / "nothing.toml")
    (tmp_path / "broken.toml").write_text("steps = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        TrainConfig.from_toml(tmp_path / "broken.toml")


def test_the_prompts_are_the_papers() -> None:
    subject = Subject("photos/rex", "dog", identifier="zwx")
    assert subject.instance_prompt == "a zwx dog"
    assert subject.class_prompt == "a dog"
    assert subject.token == "zwx dog"
    assert subject.name == "rex"


def test_auto_lets_validation_choose_the_step() -> None:
    config = TrainConfig.auto(DOG, seed=4)
    assert (config.prior_weight, config.steps, config.early_stop, config.seed) == (1, 750, True, 4)
    assert TrainConfig.auto(DOG, "some/base").steps == 1500
    assert TrainConfig.auto(DOG, steps=90).steps == 90


def test_a_finished_run_as_a_base_has_the_defaults_of_its_own_base(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, base in ((first, "toybox"), (second, str(first))):
        folder.mkdir()
        (folder / "config.toml").write_text(TrainConfig(subject=DOG, base=base).to_toml())
    assert TrainConfig(subject=DOG, base=str(second)).learning_rate == 3e-4
    assert TrainConfig(subject=DOG, base=str(tmp_path)).learning_rate == 5e-6


def test_validations_are_rarer_where_they_cost_more_beside_a_step() -> None:
    assert TrainConfig(DOG).validate_every == 125
    assert TrainConfig(DOG, method="lora").validate_every == 250
    assert TrainConfig(DOG, base="owner/model", method="lora").validate_every == 400
    assert TrainConfig(DOG, validate_every=7).validate_every == 7


def test_lora_has_a_learning_rate_of_its_own() -> None:
    assert TrainConfig(DOG, method="lora").learning_rate == 4e-3
    assert TrainConfig(DOG, "owner/model", method="lora").learning_rate == 1e-4
    assert TrainConfig(DOG, "owner/model").learning_rate == 5e-6
    assert TrainConfig(DOG, method="lora", learning_rate=2e-4).learning_rate == 2e-4


def test_another_base_or_method_brings_its_own_defaults(photos: str) -> None:
    subject = Subject(photos, "dog")
    toybox, real = TrainConfig(subject), "some/model"
    assert toybox.replace(base=real) == TrainConfig(subject, real)
    assert toybox.replace(base=real).replace(base="toybox") == toybox
    lora = TrainConfig(subject, method="lora")
    assert toybox.replace(method="lora") == lora and lora.replace(method="full") == toybox
    assert toybox.replace(base=real, method="lora") == TrainConfig(subject, real, method="lora")
    ours = toybox.replace(learning_rate=2e-3, scorer="my/clip", steps=9)
    moved = ours.replace(base=real, steps=70)
    assert (moved.learning_rate, moved.scorer, moved.steps) == (2e-3, "my/clip", 70)
    assert moved.image_scorer == "my/clip" and moved.batch_size == 1


def test_a_prior_that_is_set_again_has_a_weight(photos: str) -> None:
    none = TrainConfig(Subject(photos, "dog"), prior="none")
    assert none.replace(prior="generated").prior_weight == 1.0
    assert none.replace(prior="generated", prior_weight=0.5).prior_weight == 0.5
    assert none.replace(steps=3).prior_weight == 0.0
