"""Test validation: what it draws and writes, that training stays the same, and what is held out."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_lib import best_checkpoint
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import Photo, captioned, read_photos
from dreambooth_lib.data.preprocessing import to_tensor
from dreambooth_lib.data.quality_checks import hold_out, near_duplicate_groups
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import MAX_BATCH_SIZE, Family
from dreambooth_lib.families.precision import NonFinite
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training import runs, setup, validation, validation_pace, validation_record
from dreambooth_lib.training.held_out_loss import BINS, ROWS, HeldOutLoss
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.sampling import load_source, sample
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.trainable import Trainable
from dreambooth_lib.training.validation import ValidationPlan
from dreambooth_lib.training.validation_record import ValidationResult, history

Make = Callable[..., TrainConfig]
PLAN = validation.ValidationPlan(class_images=2, unrelated=1, inference_steps=2)


@pytest.fixture
def started(
    tmp_path: Path, photos: str, make_config: Make, tiny_sd2: str, clip_folder: Path
) -> Callable[..., Run]:
    """Start runs in folders of their own, with few and quick validation images."""

    def start(name: str, **changes: Any) -> Run:
        fields = {"validate_every": 2, "scorer": str(clip_folder), "ema_decay": 0.5} | changes
        run = runs.start(make_config(tiny_sd2, photos, **fields), tmp_path / name)
        (run.folder / "validation").mkdir()
        (run.folder / "validation" / "plan.json").write_text(json.dumps(asdict(PLAN)))
        return run

    return start


def test_validation_does_not_change_training(started: Callable[..., Run]) -> None:
    plain = [step.loss for step in train(started("plain", validate_every=0, dropout=0.2))]
    run = started("validated", validate_every=1, hold_out=False, dropout=0.2)
    steps = list(train(run))
    assert [step.loss for step in steps] == plain
    assert [step.validation.step for step in steps if step.validation] == [1, 2, 3, 4]


def test_a_validation_writes_images_and_scores(
    started: Callable[..., Run], clip_folder: Path
) -> None:
    run = started("run")
    list(train(run))
    base, *_, last = history(run)
    assert [row.step for row in history(run)] == [0, 2, 4]
    assert base.prior_drift == pytest.approx(0, abs=1e-6) and last.prior_drift > 1e-4
    assert all(len(row.held_out["subject"]) == BINS for row in history(run))
    assert "class" not in last.held_out, "of four class images none can be spared"
    folder = validation_record.images_folder(run, 4)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["class-0.png", "class-1.png", "digests.json",
                     *(f"subject-{i}.png" for i in range(4)), "unrelated-0.png"]  # fmt: skip
    # The files and the public metrics give the same scores, and sampling gives the same images.
    encoder = Encoder(clip_folder)
    photos = [photo.image for photo in read_photos(run.config.subject.photos)]
    images = [Image.open(folder / f"subject-{i}.png") for i in range(4)]
    fidelity = clip_scores.subject_fidelity(
        encoder.embed_images(images), encoder.embed_images(photos)
    )
    assert last.subject_fidelity == pytest.approx(fidelity, abs=1e-6)
    prompts = [p.replace("{noun}", "dog") for p in validation.PROMPTS]
    again = sample(run, prompts, [0], at=4, steps=2, guidance_scale=PLAN.guidance_scale)
    for image, sampled in zip(images, again, strict=True):
        difference = np.abs(np.asarray(image, int) - np.asarray(sampled.image, int))
        assert difference.max() <= 1  # another batch size may round a level differently


@pytest.mark.parametrize(
    "few", [{"unrelated": 0}, {"class_images": 1}, {"seeds": 0}], ids=lambda few: next(iter(few))
)
def test_a_plan_that_cannot_be_scored_is_refused_before_an_image_is_drawn(
    few: dict[str, int], started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started("run")
    (run.folder / "validation" / "plan.json").write_text(json.dumps(asdict(PLAN) | few))
    monkeypatch.setattr(validation_record, "draw_images", lambda *_: pytest.fail("it draws"))
    ((name, count),) = few.items()
    with pytest.raises(ValueError, match=f"plan's {name} is {count}; give {count + 1} or more"):
        list(train(run))


def test_images_and_prompts_can_be_scored_by_two_encoders(
    started: Callable[..., Run], clip_folder: Path, dino_folder: Path
) -> None:
    one, two = started("one"), started("two", image_scorer=str(dino_folder))
    list(train(one))
    list(train(two))
    by_clip, by_dino = history(one)[-1], history(two)[-1]
    assert by_clip.prompt_adherence == by_dino.prompt_adherence
    assert by_clip.by_image["prompt_adherence"] == by_dino.by_image["prompt_adherence"]
    dino = Encoder(dino_folder)
    photos = dino.embed_images([p.image for p in read_photos(two.config.subject.photos)])
    drawn = validation_record.load_images(two, 4)
    classes, before = (
        dino.embed_images(images.class_images)
        for images in (drawn, validation_record.load_images(two, 0))
    )
    expected = {
        "subject_fidelity": clip_scores.subject_fidelity(dino.embed_images(drawn.subject), photos),
        "reference_fidelity": clip_scores.reference_fidelity(photos),
        "class_diversity": clip_scores.diversity(classes),
        "prior_drift": clip_scores.prior_drift(before, classes),
        "pres": clip_scores.subject_fidelity(classes, photos),
    }
    other = two.config.replace(scorer="x")
    assert other.image_scorer == "x", "as where a config is made"
    assert {name: getattr(by_dino, name) for name in expected} == pytest.approx(expected, abs=1e-6)
    with pytest.raises(RunError, match="image_scorer"):
        runs.resume(two.folder, image_scorer=str(clip_folder))


def test_a_checkpoint_draws_with_the_ema_weights(started: Callable[..., Run]) -> None:
    run = started("run", validate_every=0)
    list(train(run))
    end, at = load_source(run), load_source(run, 4)
    for a, b in zip(end.denoiser.parameters(), at.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RunError, match="no checkpoint of step 3; it has 4"):
        load_source(run, 3)


def test_a_resumed_run_validates_as_an_uninterrupted_one(started: Callable[..., Run]) -> None:
    run, resumed = started("run", validate_every=1), started("resumed", validate_every=1)
    list(train(run))
    for _ in islice(train(resumed), 3):
        pass
    list(train(runs.resume(resumed.folder)))
    for a, b in zip(history(run), history(resumed), strict=True):
        assert {**a.__dict__, "seconds": 0} == {**b.__dict__, "seconds": 0}


def test_at_another_resolution_the_base_is_validated_again(started: Callable[..., Run]) -> None:
    run = started("run", checkpoint_every=2)
    for step in train(run):
        if step.step == 2:
            break
    before = validation_record.load_images(run, 0).subject[0].size
    smaller = runs.resume(run.folder, resolution=before[0] // 2)
    with pytest.warns(UserWarning, match=r"now 8 x 8 pixels, .* moved to validation_16x16.js"):
        list(train(smaller))
    assert [row.step for row in history(run)] == [0, 2, 4], "that of step 2 again, too"
    aside = (run.folder / "validation_16x16.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [0, 2]
    assert {validation_record.load_images(run, n).subject[0].size for n in (0, 2, 4)} == {(8, 8)}
    assert history(run)[0].prior_drift == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["prompt_adherence", "class_diversity"])
def test_with_a_scorer_that_scores_otherwise_the_base_is_validated_again(
    name: str, started: Callable[..., Run]
) -> None:
    """As where a scorer's weights have changed under the same name."""
    run = started("run", checkpoint_every=2)
    for step in train(run):
        if step.step == 2:
            break
    file = run.folder / "validation.jsonl"
    first, *_ = rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    for row in rows:
        del row["crc32"]
        run.append("validation", row | {name: row[name] + 0.02})
    with pytest.warns(UserWarning, match=r"different scores .* moved to validation_16x16.jsonl"):
        list(train(runs.resume(run.folder)))
    assert [row.step for row in history(run)] == [0, 2, 4]
    assert getattr(history(run)[0], name) == pytest.approx(first[name])


def test_a_run_keeps_the_ceiling_that_it_began_with(started: Callable[..., Run]) -> None:
    run = started("run", checkpoint_every=2)
    for step in train(run):
        if step.step == 2:
            break
    file = run.folder / "validation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    for row in rows:
        del row["crc32"]
        run.append("validation", row | {"reference_fidelity": 0.99})
    list(train(runs.resume(run.folder)))
    assert [row.reference_fidelity for row in history(run)] == [0.99] * 3


def test_another_base_to_draw_with_would_not_compare(started: Callable[..., Run]) -> None:
    run = started("run", method="lora", steps=2)
    list(train(run))
    with pytest.raises(RunError, match=r"without draw_base, but .* have 'owner/few-steps'"):
        runs.resume(run.folder, draw_base="owner/few-steps")


def test_a_black_validation_image_does_not_end_training(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = started("run", dropout=0.5), Family.generate

    def black(family: Any, *rest: Any, **how: Any) -> Any:
        if len(run.log()) == 2:
            raise NonFinite("the autoencoder gave black images.")
        return real(family, *rest, **how)

    monkeypatch.setattr(Family, "generate", black)
    with pytest.warns(UserWarning, match="step 2 is not validated: the autoencoder gave black"):
        steps = train(run)
        losses = [step.loss for step in islice(steps, 2)]
        monkeypatch.setattr(Family, "generate", real)
        losses += [step.loss for step in steps]
    assert [row.step for row in history(run)] == [0, 4] and run.finished
    sound = [step.loss for step in train(started("sound", dropout=0.5))]
    assert losses == sound, "with dropout as before"
    assert validation_pace.skipped_steps(run) == [], "it was not for want of time"


def test_an_interrupted_validation_is_repeated_on_resuming(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, uninterrupted = started("run"), started("uninterrupted")
    real = Family.generate

    def interrupted(family: Any, *rest: Any, **how: Any) -> Any:
        if len(history(run)) == 1:
            raise KeyboardInterrupt
        return real(family, *rest, **how)

    monkeypatch.setattr(Family, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(train(run))
    assert list(run.checkpoints()) == [2] and [row.step for row in history(run)] == [0]
    monkeypatch.setattr(Family, "generate", real)
    losses = [step.loss for step in train(runs.resume(run.folder))]
    assert [row.step for row in history(run)] == [0, 2, 4]
    assert losses == [step.loss for step in train(uninterrupted)][2:]


def test_the_best_checkpoint_is_kept_beside_the_newest(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started("run", validate_every=1, steps=6, checkpoints_kept=1)
    scores = {1: 0.9, 2: 0.5, 3: 0.1, 4: 0.0, 5: 0.0, 6: 0.0}

    def select_best(rows: Any) -> Any:
        step = max((row.step for row in rows[1:]), key=lambda step: scores[step])
        return SimpleNamespace(step=step, reason="")

    monkeypatch.setattr(setup, "select_best", select_best)
    list(train(run))
    assert list(run.checkpoints()) == [1, 6]


def test_an_early_stop_ends_with_the_best_weights(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started("run", validate_every=1, steps=9, early_stop=True, learning_rate=0.1)
    monkeypatch.setattr(setup, "should_stop_early", lambda rows: len(rows) > 4)
    steps = [step.step for step in train(run)]
    assert steps == [1, 2, 3, 4]
    end, best = load_source(run), load_source(run, best_checkpoint(run).step)
    for a, b in zip(end.denoiser.parameters(), best.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_unusable_scorer_is_refused_before_training(
    started: Callable[..., Run], dino_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="does not read prompts; give a CLIP"):
        list(train(started("dino", scorer=str(dino_folder))))
    with pytest.raises(
        ConfigError, match=r"cannot be read \(OSError: .*\); .* validate_every to 0"
    ):
        list(train(started("run", scorer="no/such-folder/clip")))
    with pytest.raises(ConfigError, match="validate_every"):
        started("early", validate_every=0, early_stop=True)


# Held-out photos


def photo(name: str, seed: int) -> Photo:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Photo(name, Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST))


def test_copies_of_a_photo_do_not_raise_the_ceiling(
    started: Callable[..., Run], tmp_path: Path, photos: str
) -> None:
    copies = shutil.copytree(photos, tmp_path / "copies")
    for number in range(3):
        shutil.copy(copies / "0.png", copies / f"copy-{number}.png")
    ceilings = []
    for name, pictures in (("once", photos), ("copied", str(copies))):
        run = started(name, subject=Subject(pictures, "dog"), steps=2)
        list(train(run))
        ceilings.append(history(run)[0].reference_fidelity)
    alone, copied = ceilings
    count = len(list(Path(photos).glob("*.png")))
    rows = Encoder(run.config.scorer).embed_images([p.image for p in read_photos(photos)])
    others = float((rows[1:] @ rows[0]).mean())
    pairs = count * (count - 1) / 2
    weighed = (alone * pairs + 3 * others * (count - 1)) / (pairs + 3 * (count - 1))
    assert copied == pytest.approx(weighed, abs=1e-5), "without the pairs of a photo and its copy"


def test_near_duplicates_are_held_out_together_or_not_at_all() -> None:
    four = [photo(str(i), i) for i in range(4)]
    assert near_duplicate_groups(four) == [[0], [1], [2], [3]]
    assert hold_out(four) == (four[:3], four[3:])
    assert hold_out(four[:3]) == (four[:3], [])
    twin = Photo("twin", four[3].image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert near_duplicate_groups([*four, twin]) == [[0], [1], [2], [3, 4]]
    trained, held_out = hold_out([*four, twin])
    assert [p.name for p in held_out] == ["2"] and len(trained) == 4
    pairs = [four[0], four[0], four[1], four[1]]
    assert hold_out(pairs) == (pairs, []), "two photos would be too few to train on"


def test_near_groups_join_photos_that_are_alike_by_a_third() -> None:
    assert near_duplicate_groups([photo("a", 1), photo("b", 2), photo("a", 1), photo("a", 1)]) == [
        [0, 2, 3], [1],
    ]  # fmt: skip


def test_the_held_out_photo_is_not_trained_on(started: Callable[..., Run]) -> None:
    assert len(Trainer(started("some")).batches.by_shape[16, 16][0][0]) == 3
    assert len(Trainer(started("all", hold_out=False)).batches.by_shape[16, 16][0][0]) == 4
    class_images = Trainer(started("more", class_images=8)).batches.by_shape[16, 16][1][0]
    assert len(class_images) == 7


def test_prompts_are_encoded_before_text_encoders_are_offloaded(
    started: Callable[..., Run],
) -> None:
    cache = Trainer(started("run", memory="low", validate_every=1)).family.prompt_cache
    assert cache is not None
    assert {"a ohwx dog", "a dog", "a ohwx dog in space"} <= cache.row.keys()


def test_validation_images_are_drawn_fast_unless_the_config_or_an_old_plan_says_how(
    started: Callable[..., Run], tiny_sd2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = started("run").config.replace(validation_inference_steps=None)
    plan = validation.plan_for(config)
    assert (plan.inference_steps, plan.fast) == (12, True)
    assert not validation.plan_for(config.replace(validation_inference_steps=25)).fast
    toybox = validation.plan_for(config.replace(base="toybox"))
    assert (toybox.inference_steps, toybox.fast) == (7, True)
    fields = asdict(plan)
    del fields["fast"]
    run = started("old", validation_inference_steps=None)
    validation_record.plan_file(run.folder).write_text(json.dumps(fields))
    assert validation_record.plan_of(run) == ValidationPlan(**fields, fast=False)
    drawn, real = [], Family.generate

    def recorded(family: Family, *args: Any, **options: Any) -> Any:
        drawn.append(options)
        return real(family, *args, **options)

    monkeypatch.setattr(Family, "generate", recorded)
    validation.draw_images(loading.load_model(tiny_sd2), config.subject, plan)
    assert drawn == [{"fast": True}] * 3, "18 images in batches of 8"


def test_a_row_of_an_earlier_version_is_read(started: Callable[..., Run]) -> None:
    run, row = started("run"), ValidationResult(0, 0.5, 0.9, 0.3, 0.5, 0.0, 0.1, 0.0, {}, 1.0)
    run.append("validation", asdict(row) | {"fidelity": {}, "bleeding": {}})
    assert history(run) == [row]


@pytest.mark.parametrize("values", [[1e400], [float("nan")], ["0.5"], [1, 2], 3, [0.5, 1e300]])
def test_damaged_scores_of_images_are_left_out(started: Callable[..., Run], values: Any) -> None:
    run, row = started("run"), ValidationResult(0, 0.5, 0.9, 0.3, 0.5, 0.0, 0.1, 0.0, {}, 1.0)
    sound = {"prior_drift": [0.1, 0.2]}
    run.append("validation", asdict(row) | {"by_image": sound | {"subject_fidelity": values}})
    assert history(run) == [replace(row, by_image=sound)]


def test_held_out_losses_match_a_plain_computation(
    tiny_sd2: str, photos: str, make_config: Make
) -> None:
    config, family = make_config(tiny_sd2, photos), loading.load_model(tiny_sd2)
    (held_out, *_) = captioned(read_photos(photos), config.subject.instance_prompt)
    held_out_loss = HeldOutLoss(config, family, {"subject": [held_out], "class": []})
    model = Trainable(family, False).eval()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    losses = held_out_loss.losses(model)
    assert losses == held_out_loss.losses(model), "the same each time"
    assert torch.equal(state, torch.random.get_rng_state())

    pipeline = family.pipeline
    with torch.no_grad():
        mean = pipeline.vae.encode(to_tensor(held_out.image, 16)[None]).latent_dist.mode() * 0.7
        noise = torch.randn(
            (BINS * ROWS, *mean.shape[1:]), generator=torch.Generator().manual_seed(0)
        )
        tokens = pipeline.tokenizer(
            "a ohwx dog", padding="max_length", max_length=12, return_tensors="pt"
        )
        context = pipeline.text_encoder(tokens.input_ids)[0]
        errors = []
        for row in range(BINS * ROWS):
            t = int(1000 * (row + 0.5) / 16)
            abar = pipeline.scheduler.alphas_cumprod[t]
            x_t = abar.sqrt() * mean + (1 - abar).sqrt() * noise[row]
            v = abar.sqrt() * noise[row] - (1 - abar).sqrt() * mean
            errors.append((pipeline.unet(x_t, t, context).sample - v).square().mean())
    expected = torch.stack(errors).view(BINS, ROWS).mean(1)
    assert losses["subject"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert MAX_BATCH_SIZE < BINS * ROWS, "more than one batch was needed"
