"""Test how the best checkpoint is selected: ratios, noise, ties, the verdict; early stopping."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.training import best_checkpoint, runs
from dreambooth_lib.training.best_checkpoint import (
    Ratios,
    difference,
    leakage,
    ratios,
    ratios_of,
    rising_likeness,
    select_best,
)
from dreambooth_lib.training.early_stopping import should_stop_early
from dreambooth_lib.training.runs import RunError
from dreambooth_lib.training.validation_record import ValidationResult
from dreambooth_lib.training.verdict import verdict


def row(
    step: int, fidelity: float, adherence: float = 0.5, drift: float = 0.0, **changes: Any
) -> ValidationResult:
    fields = {
        "step": step, "subject_fidelity": fidelity, "reference_fidelity": 0.8,
        "prompt_adherence": adherence, "class_diversity": 0.5, "prior_drift": drift,
        "unrelated_drift": drift, "pres": 0.3, "held_out": {}, "seconds": 1.0,
    }  # fmt: skip
    return ValidationResult(**(fields | changes))


def noisy(step: int, fidelity: list[float], drift: list[float]) -> ValidationResult:
    """Make a row of four images of the subject and some of unrelated prompts."""
    by_image = {"subject_fidelity": fidelity, "prompt_adherence": [0.5] * 4,
                "prior_drift": [0.1] * 4, "unrelated_drift": drift}  # fmt: skip
    return row(step, float(np.mean(fidelity)), drift=0.1, by_image=by_image,
               unrelated_drift=float(np.mean(drift)))  # fmt: skip


BASE = row(0, 0.4)
OVERFIT = [
    BASE, row(100, 0.60), row(200, 0.72, 0.49, 0.05), row(300, 0.76, 0.47, 0.10),
    row(400, 0.77, 0.42, 0.25), row(500, 0.77, 0.36, 0.40),
]  # fmt: skip


def test_likeness_goes_from_the_base_to_the_photos() -> None:
    found = ratios(0.6, 0.4, 0.8, 0.4, 0.5, 0.3, 0.1)
    assert (found.likeness, found.adherence) == pytest.approx((0.5, 0.8))
    assert (found.class_kept, found.others_kept) == pytest.approx((0.7, 0.9))
    assert ratios(0.9, 0.4, 0.8, 0.6, 0.5, -0.1, 0) == Ratios(1, 1, 1, 1), "a ratio is at most 1"
    assert ratios(0.3, 0.4, 0.8, -0.1, 0.5, 1.3, 1.1) == Ratios(0, 0, 0, 0)
    assert ratios(0.9, 0.8, 0.8, 0.5, 0.0, 0, 0).likeness == 1, "the base draws the subject already"


def test_the_score_is_the_geometric_mean_of_likeness_adherence_and_what_is_kept() -> None:
    assert Ratios(0.75, 0.8, 0.6, 0.8).score == pytest.approx((0.75 * 0.8 * 0.7) ** (1 / 3))
    assert Ratios(1, 1, 0, 0).score == 0, "nothing makes up for a class that is lost"


def test_the_best_step_has_the_highest_score_and_the_reason_says_why() -> None:
    best = select_best(OVERFIT)
    scores = {r.step: ratios_of(r, BASE).score for r in OVERFIT[1:]}
    assert best.step == max(scores, key=lambda step: scores[step]) == 300
    assert best.score == scores[300] and best.better_than_base
    assert best.reason == (
        "Step 300: likeness to the photos 90% (0% is the base, 100% as alike as the photos are), "
        "prompt adherence 94% (100% is the base), class kept 90%, other prompts kept 90%. Step "
        "500, compared with it: likeness +3, prompt adherence -22, class kept -30, other prompts "
        "kept -30 percentage points."
    )


def test_of_one_photo_the_ceiling_is_called_the_photo_itself() -> None:
    rows = [dataclasses.replace(row, reference_fidelity=1.0) for row in OVERFIT]
    best = select_best(rows)
    assert "60% (0% is the base, 100% a copy of the photo), prompt" in best.reason
    assert "100% would be an exact copy" in best.verdict.text
    assert "exact copy" not in select_best(OVERFIT).verdict.text


def test_a_step_no_better_than_the_base_is_said_to_be_none() -> None:
    best = select_best([BASE, row(100, 0.39), row(200, 0.38)])
    assert not best.better_than_base and best.verdict.learnt == "no"
    assert best.reason == (
        "No step is better than the base: at step 100 the images are no more like the photos than "
        "before training."
    )


def test_the_error_of_a_difference_is_that_of_paired_images() -> None:
    """The same by resampling: the spread of the difference over many draws of images."""
    generator = np.random.default_rng(0)
    scenes = generator.normal(0.6, 0.1, 400)  # one image of each step shares a scene
    one, two = (scenes + generator.normal(0, 0.03, 400) for _ in range(2))
    drifts = [generator.uniform(0, 0.4, 400) for _ in range(2)]
    gains, errors = [], []
    for at in range(0, 400, 8):
        part = slice(at, at + 8)
        pair = [noisy(1 + i, f[part].tolist(), d[part].tolist())
                for i, (f, d) in enumerate(zip((one, two), drifts, strict=True))]  # fmt: skip
        gain, error = difference(*pair, BASE)
        gains.append(gain)
        errors.append(error)
    assert np.std(gains) == pytest.approx(np.mean(errors), rel=0.25)
    assert abs(np.mean(gains)) < 3 * np.std(gains) / 50**0.5


def test_one_odd_picture_of_an_unrelated_prompt_decides_nothing() -> None:
    """A car that turns blue by chance outweighs nothing; ten pictures that change do."""
    learnt = noisy(100, [0.70, 0.72, 0.71, 0.69], [0.05] * 10)
    better = [0.72, 0.73, 0.72, 0.70]
    one_odd = noisy(200, better, [0.05] * 9 + [0.95])
    assert ratios_of(one_odd, BASE).score < ratios_of(learnt, BASE).score
    assert select_best([BASE, learnt, one_odd]).step == 200
    assert select_best([BASE, learnt, noisy(200, better, [0.35] * 10)]).step == 100


def test_of_steps_that_do_not_differ_the_last_is_selected() -> None:
    """It shows the subject more clearly, even if four images chance to be a little less like it."""
    kept = [0.1] * 10
    early = noisy(100, [0.70, 0.66, 0.64, 0.60], kept)
    late = noisy(200, [0.62, 0.68, 0.60, 0.66], kept)
    assert late.subject_fidelity < early.subject_fidelity
    assert select_best([BASE, early, late]).step == 200
    assert select_best([row(0, 0.3), row(100, 0.6), row(200, 0.6)]).step == 200
    with pytest.raises(ValueError, match="no step was validated"):
        select_best([BASE])


def test_a_step_that_is_clearly_less_like_the_photos_is_not_selected() -> None:
    kept = [0.1] * 10
    early = noisy(100, [0.70, 0.71, 0.72, 0.71], kept)
    lost = noisy(200, [0.62, 0.64, 0.63, 0.63], kept)
    assert select_best([BASE, early, lost]).step == 100
    again = noisy(300, [0.69, 0.72, 0.71, 0.71], kept)
    assert select_best([BASE, early, lost, again]).step == 300


def test_a_detail_that_the_scores_do_not_see_comes_with_the_last_step() -> None:
    """The likeness of a cat's images in notebook 01: it grows its whiskers from step 150 on."""
    images = {
        50: [0.789, 0.797, 0.828, 0.835], 100: [0.826, 0.824, 0.819, 0.870],
        150: [0.746, 0.832, 0.804, 0.840], 200: [0.782, 0.795, 0.825, 0.845],
        250: [0.728, 0.688, 0.823, 0.859], 300: [0.814, 0.824, 0.831, 0.851],
    }  # fmt: skip
    rows = [dataclasses.replace(each, reference_fidelity=0.901) for each in (
        row(0, 0.705), *(noisy(step, own, [0.1] * 10) for step, own in images.items())
    )]  # fmt: skip
    assert max(rows[1:], key=lambda each: each.subject_fidelity).step == 100
    assert select_best(rows).step == 300


def test_rising_likeness_is_the_least_squares_fit_that_never_falls() -> None:
    """The same by another formula: the highest of the lowest means of all stretches around."""
    generator = np.random.default_rng(2)
    for count in (1, 2, 3, 7, 12):
        values = generator.uniform(0.3, 0.8, count)
        rows = [row(step, value) for step, value in enumerate(values, 1)]
        expected = [
            max(min(values[i : k + 1].mean() for k in range(at, count)) for i in range(at + 1))
            for at in range(count)
        ]
        found = rising_likeness(rows)
        assert [each.subject_fidelity for each in found] == pytest.approx(expected)
        assert [each.step for each in found] == [each.step for each in rows]


def test_the_word_for_what_was_learnt_follows_the_curve_and_not_one_lucky_step() -> None:
    kept = [0.1] * 10
    lucky = noisy(200, [0.65, 0.62, 0.64, 0.63], kept)  # 59% of the way to the photos
    dip = noisy(300, [0.53, 0.51, 0.53, 0.52], kept)
    forgot = noisy(400, [0.60, 0.66, 0.58, 0.64], [0.95] * 10)
    best = select_best([BASE, row(100, 0.52, drift=0.1), lucky, dip, forgot])
    assert best.step == 200 and best.verdict.learnt == "partly"
    assert "partly learnt (59%)" in best.verdict.text


def test_a_collapse_after_the_best_step_does_not_change_what_was_learnt() -> None:
    kept = [0.1] * 10
    rows = [BASE, noisy(100, [0.50, 0.52, 0.48, 0.50], kept),
            noisy(200, [0.76, 0.75, 0.77, 0.76], kept)]  # fmt: skip
    for step in range(300, 800, 100):
        rows.append(noisy(step, [0.44, 0.45, 0.43, 0.44], kept))
        best = select_best(rows)
        assert best.step == 200 and best.verdict.learnt == "yes", "by all, 59%, 48%, ..."


def test_a_slow_fall_is_no_noise_either() -> None:
    """No step is clearly less like the photos than the one before it."""
    spread = np.array([0.02, -0.02, 0.01, -0.01])
    rows = [BASE]
    for number in range(15):
        images = 0.76 - 0.012 * number + np.roll(spread, number)
        rows.append(noisy(100 * (number + 1), images.tolist(), [0.1] * 10))
    assert select_best(rows).step <= 300


def test_a_step_no_more_like_the_photos_than_the_base_never_follows_one_that_is() -> None:
    kept = [0.1] * 10
    some, none = (
        noisy(100, [0.60, 0.30, 0.55, 0.40], kept),
        noisy(200, [0.39, 0.30, 0.50, 0.40], kept),
    )
    best = select_best([BASE, some, none])
    assert best.step == 100 and best.better_than_base


def test_later_validations_never_bring_back_an_earlier_step() -> None:
    """Guarantee that a run may delete all checkpoints but the best so far."""
    generator = np.random.default_rng(1)
    for _ in range(50):
        rows = [BASE]
        for step in range(1, 12):
            drift = generator.uniform(0, 0.5, 10).tolist()
            rows.append(noisy(step, generator.uniform(0.4, 0.8, 4).tolist(), drift))
        bests = [select_best(rows[:end]).step for end in range(2, len(rows) + 1)]
        assert bests == sorted(bests)


def test_a_base_that_is_as_like_the_photos_as_they_are_to_each_other_can_be_compared() -> None:
    """All its likeness is 1, so that only prompts and what is kept count."""
    base = row(0, 0.8)
    kept, lost = noisy(100, [0.8] * 4, [0.1] * 10), noisy(200, [0.9, 0.7] * 2, [0.5] * 10)
    gain, error = difference(kept, lost, base)
    assert gain > 0 and error == 0
    assert select_best([base, kept, lost]).step == 100


def test_a_row_without_its_images_own_values_has_no_noise() -> None:
    assert difference(OVERFIT[2], OVERFIT[1], BASE)[1] == 0
    mixed = noisy(300, [0.7] * 4, [0.1] * 10)
    assert difference(mixed, OVERFIT[1], BASE)[1] == 0


@pytest.mark.parametrize(
    ("own", "leaks", "last", "text", "advice"),
    [
        (Ratios(0.9, 0.95, 0.85, 0.9), 0.0, True,
         "learnt (90%), class kept (85%), other prompts kept (90%).", "Scores can miss shapes"),
        (Ratios(0.1, 1, 0.9, 0.95), 0.0, True,
         "not learnt (10%), class kept (90%), other prompts kept (95%).", "Train for more steps"),
        (Ratios(0.5, 1, 0.9, 0.95), 0.0, False,
         "partly learnt (50%), class kept (90%), other prompts kept (95%).",
         "a higher learning rate"),
        (Ratios(0.95, 0.9, 0.75, 0.9), 0.8, True,
         "learnt (95%), class forgotten (it came to look like your subject), other prompts kept "
         "(90%).", "Raise λ"),
        (Ratios(0.95, 0.9, 0.4, 0.9), -0.2, True,
         "learnt (95%), class forgotten (40%), other prompts kept (90%).", "Raise λ"),
        (Ratios(0.95, 0.9, 0.9, 0.3), -0.2, True,
         "learnt (95%), class kept (90%), other prompts not kept (30%).",
         "Lower the learning rate"),
        (Ratios(0.95, 0.5, 0.9, 0.9), 0.0, False,
         "learnt (95%), class kept (90%), other prompts kept (90%).",
         "only if the images miss the scenes"),
        (Ratios(0.95, 0.95, 0.6, 0.9), 0.0, True,
         "learnt (95%), class partly kept (60%), other prompts kept (90%).",
         "Raise λ if images of the class have"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_was_learnt_what_was_kept_and_what_to_do(
    own: Ratios, leaks: float, last: bool, text: str, advice: str
) -> None:
    judged = verdict(own, leaks, last)
    assert judged.text == f"According to the scores: subject {text}" and advice in judged.advice
    assert judged.good == (not re.search("forgotten|not kept", text) and text.startswith("learnt"))
    assert ("compare the images" in judged.advice) == (
        judged.good and "Train" not in judged.advice
    ), "an image that scores as learnt may lack a pattern"


def test_a_run_that_was_still_learning_is_told_to_go_on() -> None:
    """Whether its last validation or the one before was the best, is chance."""
    rows = [BASE, row(100, 0.45), row(200, 0.48), row(300, 0.50), row(400, 0.499)]
    assert "more steps" in select_best(rows).verdict.advice
    assert "more steps" in select_best(rows[:-1]).verdict.advice
    early = [BASE, row(100, 0.50), row(200, 0.49), row(300, 0.48), row(400, 0.47)]
    assert "learning rate" in select_best(early).verdict.advice
    plateau = [BASE, *(row(100 * number, 0.56) for number in range(1, 9))]
    assert should_stop_early(plateau) and "learning rate" in select_best(plateau).verdict.advice


def test_leakage_is_how_much_the_class_became_the_subject() -> None:
    base = row(0, 0.4, pres=0.3)
    assert leakage(base, base) == 0
    assert leakage(row(1, 0.4, pres=0.55), base) == pytest.approx(0.5)
    assert leakage(row(1, 0.4, pres=0.2), base) < 0


def test_a_run_stops_early_after_patience_validations_without_a_better_score() -> None:
    assert not should_stop_early(OVERFIT, patience=3)
    assert should_stop_early(OVERFIT, patience=2)
    assert not should_stop_early(OVERFIT[:5], patience=2)
    assert not should_stop_early([BASE], patience=1)


def test_a_run_without_validation_has_no_best_checkpoint(tmp_path: Path, photos: str) -> None:
    run = runs.start(TrainConfig(subject=Subject(photos, "dog")), tmp_path / "run")
    with pytest.raises(RunError, match="first validation comes at step 125"):
        best_checkpoint.best_checkpoint(run)
