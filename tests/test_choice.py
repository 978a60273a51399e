"""The rule that chooses a checkpoint: its maths, its front, and when it stops a run."""

from math import prod
from pathlib import Path

import pytest

from dreambooth_lib import choice, runs
from dreambooth_lib.choice import best_of, shares, standing
from dreambooth_lib.config import Subject, TrainConfig
from dreambooth_lib.early_stopping import has_peaked
from dreambooth_lib.runs import RunError
from dreambooth_lib.watch_record import Watched


def row(step: int, fidelity: float, adherence: float = 0.5, drift: float = 0.0) -> Watched:
    return Watched(
        step=step, subject_fidelity=fidelity, reference_fidelity=0.8, prompt_adherence=adherence,
        class_diversity=0.5, prior_drift=drift, unrelated_drift=drift, pres=0.3, held_out={},
        seconds=1.0,
    )  # fmt: skip


BASE = row(0, 0.4)
OVERFIT = [
    BASE, row(100, 0.60), row(200, 0.72, 0.49, 0.05), row(300, 0.76, 0.47, 0.10),
    row(400, 0.77, 0.42, 0.25), row(500, 0.77, 0.36, 0.40),
]  # fmt: skip


def test_shares_are_of_the_photos_of_the_base_and_of_the_rest() -> None:
    assert shares(0.6, 0.8, 0.4, 0.5, 0.3, 0.1) == pytest.approx((0.75, 0.8, 0.8))
    assert shares(0.9, 0.8, 0.6, 0.5, -0.1, 0) == (1, 1, 1), "more than the whole is the whole"
    assert shares(-0.2, 0.8, -0.1, 0.5, 1.3, 1.1) == (0, 0, 0)


def test_standing_is_the_geometric_mean() -> None:
    assert standing((0.75, 0.8, 0.7)) == pytest.approx((0.75 * 0.8 * 0.7) ** (1 / 3))
    assert standing((1.0, 1.0, 0.0)) == 0, "nothing makes up for a class that is gone"


def test_the_best_step_is_the_one_with_the_highest_standing_and_the_reason_says_why() -> None:
    found = best_of(OVERFIT)
    products = {
        r.step: prod((r.subject_fidelity / 0.8, min(1, r.prompt_adherence / 0.5),
                      1 - (r.prior_drift + r.unrelated_drift) / 2))
        for r in OVERFIT[1:]
    }  # fmt: skip
    assert found.step == max(products, key=lambda step: products[step]) == 200
    assert found.standing == pytest.approx(products[200] ** (1 / 3))
    assert found.reason == (
        "Step 200: its images are 90% as close to the photos as the photos are to each other, "
        "follow the prompt 98% as well as the base's, and leave 95% of the rest unchanged. Step "
        "500 looks 6% more like the subject but follows the prompt 26% worse and changes 35% more "
        "of the rest."
    )


def test_the_front_leaves_out_what_another_step_beats() -> None:
    assert best_of(OVERFIT).front == (100, 200, 300, 400), "500 has 400's fidelity and less else"
    assert best_of(OVERFIT).step in best_of(OVERFIT).front


def test_of_equals_the_earliest_is_chosen_and_the_base_is_not_eligible() -> None:
    assert best_of([row(0, 0.8), row(100, 0.6), row(200, 0.6)]).step == 100
    with pytest.raises(ValueError, match="no step was looked at"):
        best_of([BASE])


def test_later_rows_never_bring_back_a_step_that_lost_before() -> None:
    """So that a run may drop the checkpoints of all but the best so far."""
    bests = [best_of(OVERFIT[:end]).step for end in range(2, len(OVERFIT) + 1)]
    assert bests == sorted(bests)


def test_a_run_has_peaked_after_patience_looks_without_a_better_one() -> None:
    assert not has_peaked(OVERFIT, patience=4)
    assert has_peaked(OVERFIT, patience=3)
    assert not has_peaked(OVERFIT[:5], patience=3)
    assert not has_peaked([BASE], patience=1)


def test_a_run_that_was_not_watched_has_no_best(tmp_path: Path, photos: str) -> None:
    run = runs.start(TrainConfig(subject=Subject(photos, "dog")), tmp_path / "run")
    with pytest.raises(RunError, match="watch_every"):
        choice.best_checkpoint(run)
