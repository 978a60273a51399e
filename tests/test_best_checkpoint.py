"""Test how the best checkpoint is selected: its maths, the Pareto front, and early stopping."""

from math import prod
from pathlib import Path

import pytest

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.training import best_checkpoint, runs
from dreambooth_lib.training.best_checkpoint import overall_score, ratios, select_best
from dreambooth_lib.training.early_stopping import should_stop_early
from dreambooth_lib.training.runs import RunError
from dreambooth_lib.training.validation_record import ValidationResult


def row(step: int, fidelity: float, adherence: float = 0.5, drift: float = 0.0) -> ValidationResult:
    return ValidationResult(
        step=step, subject_fidelity=fidelity, reference_fidelity=0.8, prompt_adherence=adherence,
        class_diversity=0.5, prior_drift=drift, unrelated_drift=drift, pres=0.3, held_out={},
        seconds=1.0,
    )  # fmt: skip


BASE = row(0, 0.4)
OVERFIT = [
    BASE, row(100, 0.60), row(200, 0.72, 0.49, 0.05), row(300, 0.76, 0.47, 0.10),
    row(400, 0.77, 0.42, 0.25), row(500, 0.77, 0.36, 0.40),
]  # fmt: skip


def test_ratios_are_to_the_photos_to_the_base_and_of_the_rest() -> None:
    assert ratios(0.6, 0.8, 0.4, 0.5, 0.3, 0.1) == pytest.approx((0.75, 0.8, 0.8))
    assert ratios(0.9, 0.8, 0.6, 0.5, -0.1, 0) == (1, 1, 1), "a ratio is at most 1"
    assert ratios(-0.2, 0.8, -0.1, 0.5, 1.3, 1.1) == (0, 0, 0)


def test_the_score_is_the_geometric_mean_of_the_ratios() -> None:
    assert overall_score((0.75, 0.8, 0.7)) == pytest.approx((0.75 * 0.8 * 0.7) ** (1 / 3))
    assert overall_score((1.0, 1.0, 0.0)) == 0, "nothing makes up for a class that is lost"


def test_the_best_step_has_the_highest_score_and_the_reason_says_why() -> None:
    best = select_best(OVERFIT)
    products = {
        r.step: prod((r.subject_fidelity / 0.8, min(1, r.prompt_adherence / 0.5),
                      1 - (r.prior_drift + r.unrelated_drift) / 2))
        for r in OVERFIT[1:]
    }  # fmt: skip
    assert best.step == max(products, key=lambda step: products[step]) == 200
    assert best.score == pytest.approx(products[200] ** (1 / 3))
    assert best.reason == (
        "Step 200: its images are 90% as close to the photos as the photos are to each other, "
        "follow the prompt 98% as well as the base's, and leave 95% of the rest unchanged. Step "
        "500 looks 6% more like the subject but follows the prompt 26% worse and changes 35% more "
        "of the rest."
    )


def test_the_front_leaves_out_steps_that_another_beats() -> None:
    best = select_best(OVERFIT)
    assert best.front == (100, 200, 300, 400), "500 has 400's fidelity and less of the rest"
    assert best.step in best.front


def test_the_earliest_of_equals_is_selected_and_never_the_base() -> None:
    assert select_best([row(0, 0.8), row(100, 0.6), row(200, 0.6)]).step == 100
    with pytest.raises(ValueError, match="no step was validated"):
        select_best([BASE])


def test_later_validations_never_bring_back_an_earlier_step() -> None:
    """Guarantee that a run may delete all checkpoints but the best so far."""
    bests = [select_best(OVERFIT[:end]).step for end in range(2, len(OVERFIT) + 1)]
    assert bests == sorted(bests)


def test_a_run_stops_early_after_patience_validations_without_a_better_score() -> None:
    assert not should_stop_early(OVERFIT, patience=4)
    assert should_stop_early(OVERFIT, patience=3)
    assert not should_stop_early(OVERFIT[:5], patience=3)
    assert not should_stop_early([BASE], patience=1)


def test_a_run_without_validation_has_no_best_checkpoint(tmp_path: Path, photos: str) -> None:
    run = runs.start(TrainConfig(subject=Subject(photos, "dog")), tmp_path / "run")
    with pytest.raises(RunError, match="validate_every"):
        best_checkpoint.best_checkpoint(run)
