"""Watching a run: what is drawn and written, that training does not notice, and what is kept."""

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_lib import best_checkpoint
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import ConfigError
from dreambooth_lib.data.images import Photo, captioned, read_pictures
from dreambooth_lib.data.preprocessing import to_tensor
from dreambooth_lib.data.quality_checks import hold_out, near_groups
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import MAX_BATCH_SIZE, Family
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training import runs, setup, validation, validation_record
from dreambooth_lib.training.held_out_loss import BINS, ROWS, HeldOutLoss
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.sampling import load_source, sample
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.trainable import Trainable
from dreambooth_lib.training.validation_record import ValidationResult, history

Make = Callable[..., TrainConfig]
VIEW = validation.ValidationPlan(class_images=2, inference_steps=2)


@pytest.fixture
def started(
    tmp_path: Path, photos: str, make_config: Make, tiny_sd2: str, clip_folder: Path
) -> Callable[..., Run]:
    """Start a validation run in a folder of its own, with few and quick pictures a look."""

    def start(name: str, **changes: Any) -> Run:
        fields = {"validate_every": 2, "scorer": str(clip_folder), "ema_decay": 0.5} | changes
        run = runs.start(make_config(tiny_sd2, photos, **fields), tmp_path / name)
        (run.folder / "validation").mkdir()
        (run.folder / "validation" / "plan.json").write_text(json.dumps(asdict(VIEW)))
        return run

    return start


def test_training_does_not_notice_that_it_is_watched(started: Callable[..., Run]) -> None:
    plain = [step.loss for step in train(started("plain", validate_every=0, dropout=0.2))]
    seen = list(train(started("seen", validate_every=1, hold_out=False, dropout=0.2)))
    assert [step.loss for step in seen] == plain
    assert [step.validation.step for step in seen if step.validation] == [1, 2, 3, 4]


def test_what_a_look_writes_and_measures(started: Callable[..., Run], clip_folder: Path) -> None:
    run = started("run")
    list(train(run))
    base, *_, last = history(run)
    assert [row.step for row in history(run)] == [0, 2, 4]
    assert base.prior_drift == pytest.approx(0, abs=1e-6) and last.prior_drift > 1e-4
    assert all(len(row.held_out["subject"]) == BINS for row in history(run))
    assert "class" not in last.held_out, "of four class images none can be spared"
    folder = validation_record.images_folder(run, 4)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["class-0.png", "class-1.png", *(f"subject-{i}.png" for i in range(4)),
                     "unrelated-0.png"]  # fmt: skip
    # The same figures from the files and the public measures, and the same files from a sample.
    encoder = Encoder(clip_folder)
    photos = [photo.image for photo in read_pictures(run.config.subject.pictures)]
    seen = [Image.open(folder / f"subject-{i}.png") for i in range(4)]
    fidelity = clip_scores.subject_fidelity(encoder.images(seen), encoder.images(photos))
    assert last.subject_fidelity == pytest.approx(fidelity, abs=1e-6)
    prompts = [p.replace("{noun}", "dog") for p in validation.PROMPTS]
    again = sample(run, prompts, [0], at=4, steps=2, guidance_scale=VIEW.guidance_scale)
    for one, other in zip(seen, again, strict=True):
        difference = np.abs(np.asarray(one, int) - np.asarray(other.image, int))
        assert difference.max() <= 1  # another batch size may round a level otherwise


def test_a_checkpoint_draws_with_the_averaged_weights(started: Callable[..., Run]) -> None:
    run = started("run", validate_every=0)
    list(train(run))
    end, at = load_source(run), load_source(run, 4)
    for one, other in zip(end.denoiser.parameters(), at.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RunError, match="no checkpoint of step 3; it has 4"):
        load_source(run, 3)


def test_a_stopped_run_looks_as_one_that_was_not(started: Callable[..., Run]) -> None:
    whole, stopped = started("whole", validate_every=1), started("stopped", validate_every=1)
    list(train(whole))
    for _ in islice(train(stopped), 3):
        pass
    list(train(runs.resume(stopped.folder)))
    for one, other in zip(history(whole), history(stopped), strict=True):
        assert {**one.__dict__, "seconds": 0} == {**other.__dict__, "seconds": 0}


def test_an_interrupted_look_is_made_after_resuming(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = started("run"), started("whole")
    real = Family.generate

    def interrupted(family: Any, *rest: Any) -> Any:
        if len(history(run)) == 1:
            raise KeyboardInterrupt
        return real(family, *rest)

    monkeypatch.setattr(Family, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(train(run))
    assert list(run.checkpoints()) == [2] and [row.step for row in history(run)] == [0]
    monkeypatch.setattr(Family, "generate", real)
    losses = [step.loss for step in train(runs.resume(run.folder))]
    assert [row.step for row in history(run)] == [0, 2, 4]
    assert losses == [step.loss for step in train(whole)][2:]


def test_the_best_checkpoint_is_kept_beside_the_newest(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started("run", validate_every=1, steps=6, checkpoints_kept=1)
    best = {1: 0.9, 2: 0.5, 3: 0.1, 4: 0.0, 5: 0.0, 6: 0.0}
    monkeypatch.setattr(setup, "best_of", lambda rows: choice_of(rows))

    def choice_of(rows: Any) -> Any:
        class Found:
            step = max((row.step for row in rows[1:]), key=lambda step: best[step])
            reason = ""

        return Found

    list(train(run))
    assert list(run.checkpoints()) == [1, 6]


def test_an_early_stop_ends_with_the_best_weights(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started("run", validate_every=1, steps=9, early_stop=True, learning_rate=0.1)
    monkeypatch.setattr(setup, "has_peaked", lambda rows: len(rows) > 4)
    steps = [step.step for step in train(run)]
    assert steps == [1, 2, 3, 4]
    best = best_checkpoint(run)
    one, other = load_source(run), load_source(run, best.step)
    for a, b in zip(one.denoiser.parameters(), other.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_judge_that_cannot_judge_is_named_before_anything_is_trained(
    started: Callable[..., Run], dino_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="does not read prompts; give a CLIP"):
        list(train(started("dino", scorer=str(dino_folder))))
    with pytest.raises(ConfigError, match=r"cannot be read; .* validate_every to 0"):
        list(train(started("run", scorer="no/such-folder/clip")))
    with pytest.raises(ConfigError, match="validate_every"):
        started("other", validate_every=0, early_stop=True)


# Held-out pictures


def photo(name: str, seed: int) -> Photo:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Photo(name, Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST))


def test_near_duplicates_are_held_out_together_or_not_at_all() -> None:
    four = [photo(str(i), i) for i in range(4)]
    assert near_groups(four) == [[0], [1], [2], [3]]
    assert hold_out(four) == (four[:3], four[3:])
    assert hold_out(four[:3]) == (four[:3], [])
    twin = Photo("twin", four[3].image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert near_groups([*four, twin]) == [[0], [1], [2], [3, 4]]
    trained, held = hold_out([*four, twin])
    assert [p.name for p in held] == ["2"] and len(trained) == 4
    pairs = [four[0], four[0], four[1], four[1]]
    assert hold_out(pairs) == (pairs, []), "two photos would be too few to train on"


def test_near_groups_join_what_is_alike_by_a_third() -> None:
    assert near_groups([photo("a", 1), photo("b", 2), photo("a", 1), photo("a", 1)]) == [
        [0, 2, 3], [1],
    ]  # fmt: skip


def test_the_held_out_photo_is_not_trained_on(started: Callable[..., Run]) -> None:
    assert len(Trainer(started("some")).batches.kinds[0][0]) == 3
    assert len(Trainer(started("all", hold_out=False)).batches.kinds[0][0]) == 4
    class_images = Trainer(started("more", class_images=8)).batches.kinds[1][0]
    assert len(class_images) == 7


def test_only_what_is_asked_is_known_where_text_encoders_are_let_go_of(
    started: Callable[..., Run],
) -> None:
    known = Trainer(started("run", memory="low", validate_every=1)).family.prompt_cache
    assert known is not None
    assert {"a ohwx dog", "a dog", "a ohwx dog in space"} <= known.row.keys()


def test_a_row_that_an_earlier_version_wrote_is_read(started: Callable[..., Run]) -> None:
    run, row = started("run"), ValidationResult(0, 0.5, 0.9, 0.3, 0.5, 0.0, 0.1, 0.0, {}, 1.0)
    run.append("validation", asdict(row) | {"fidelity": {}, "bleeding": {}})
    assert history(run) == [row]


def test_held_out_losses_are_those_of_a_plain_computation(
    tiny_sd2: str, photos: str, make_config: Make
) -> None:
    config, family = make_config(tiny_sd2, photos), loading.load_model(tiny_sd2)
    (held, *_) = captioned(read_pictures(photos), config.subject.instance_prompt)
    rows = HeldOutLoss(config, family, {"subject": [held], "class": []})
    model = Trainable(family, False).eval()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    found = rows.losses(model)
    assert found == rows.losses(model), "the same each time"
    assert torch.equal(state, torch.random.get_rng_state())

    pipeline = family.pipeline
    with torch.no_grad():
        mean = pipeline.vae.encode(to_tensor(held.image, 16)[None]).latent_dist.mode() * 0.7
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
    assert found["subject"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert MAX_BATCH_SIZE < BINS * ROWS, "more than one batch was needed"
