"""Adaptive λ: its rule, its pool, its checkpoints, and what it does to real runs."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hostile.bench import nursery
from launching import TWO, launched

from dreambooth_lib import __main__ as command
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation.demo import bundled_subjects
from dreambooth_lib.export.model_card import _prior
from dreambooth_lib.figures import plots
from dreambooth_lib.training import prior_weight, runs
from dreambooth_lib.training.batches import Batch
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.held_out_loss import BINS
from dreambooth_lib.training.loop import prior_preservation, train
from dreambooth_lib.training.losses import Loss
from dreambooth_lib.training.optimizer_step import NonFiniteStep
from dreambooth_lib.training.prior_weight import (
    IMAGES,
    INTERVAL,
    ClassLoss,
    PriorWeight,
    class_shortfall,
    rows_at,
)
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer

DOG = Subject("/photos", "dog")
Make = Callable[..., TrainConfig]


def simulated(losses: np.ndarray, base: np.ndarray, keep: float, start: float) -> np.ndarray:
    """Return λ after each measurement, by numpy alone: losses of the model and the base [N]."""
    share = 0.3 * 0.7 ** np.arange(len(losses))[::-1]
    log_multiplier, weights = np.log(start), []
    for n in range(1, len(losses) + 1):
        mean = share[-n:].copy()
        mean[0] = 0.7 ** (n - 1)  # the first measurement has the weight of all before it
        ratio = (mean * losses[:n]).sum() / (mean * base[:n]).sum()
        excess = np.clip((ratio - 1) / (1 / keep - 1) - 1, -1, 1)
        log_multiplier = np.clip(
            log_multiplier + prior_weight.INTEGRAL * excess, np.log(0.05), np.log(8)
        )
        moved = log_multiplier + prior_weight.PROPORTIONAL * excess
        weights.append(np.exp(np.clip(moved, np.log(0.05), np.log(8))))
    return np.array(weights)


@pytest.mark.parametrize(("keep", "start"), [(0.95, 1.0), (0.83, 0.25), (0.9, 8.0)])
def test_lambda_follows_the_rule_as_numpy_computes_it(keep: float, start: float) -> None:
    random = np.random.default_rng(0)
    base = random.uniform(0.1, 0.4, 80)
    losses = base * (1 + 0.2 * np.sin(np.arange(80) / 9) ** 2 + random.normal(0, 0.02, 80))
    pairs = iter(zip(losses, base, strict=True))
    config = TrainConfig(DOG, keep_class=keep, prior_weight=start)
    controller = PriorWeight(config, lambda rows: tuple(map(float, next(pairs))))
    weights = [controller.config_at(step).prior_weight for step in range(81 * INTERVAL)]
    assert weights[:INTERVAL] == [start] * INTERVAL
    assert weights[INTERVAL::INTERVAL] == pytest.approx(simulated(losses, base, keep, start))
    assert min(weights) < start or start < 1
    for first in range(0, len(weights), INTERVAL):
        assert len(set(weights[first : first + INTERVAL])) == 1, "constant between measurements"


@pytest.mark.parametrize(("ratio", "limit"), [(1.0, 0.05), (3.0, 8.0)])
def test_lambda_stays_within_its_bounds_and_comes_back(ratio: float, limit: float) -> None:
    ratios = iter([ratio] * 60 + [1 / 0.95] * 40 + [4 - ratio] * 60)
    config = TrainConfig(DOG, keep_class=0.95)
    controller = PriorWeight(config, lambda rows: (next(ratios), 1.0))
    weights = [controller.config_at(n * INTERVAL).prior_weight for n in range(161)]
    assert min(weights) >= 0.05 and max(weights) <= 8
    assert weights[60] == pytest.approx(limit)
    assert weights[160] == pytest.approx(0.4 / limit)


def test_the_loop_settles_where_the_class_is_kept_as_asked() -> None:
    """A class whose loss falls with λ, and lags behind it as the EMA does."""
    config, excess = TrainConfig(DOG, keep_class=0.95), 0.0
    random, controller = np.random.default_rng(1), None
    controller = PriorWeight(config, lambda rows: (1 + excess + random.normal(0, 0.005), 1.0))
    kept = []
    for step in range(0, 3000, INTERVAL):
        weight = controller.config_at(step).prior_weight
        excess += 0.18 * (0.045 / weight**0.6 - excess)
        kept.append(1 / (1 + excess))
    assert np.mean(kept[100:]) == pytest.approx(0.95, abs=0.005)
    assert np.abs(np.array(kept[100:]) - 0.95).max() < 0.02


def test_a_measurement_that_is_interrupted_or_repeated_counts_once() -> None:
    calls: list[int] = []

    def measure(rows: Sequence[int]) -> tuple[float, float]:
        calls.append(len(rows))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return 1.2, 1.0

    config = TrainConfig(DOG, keep_class=0.95, batch_size=3)
    controller = PriorWeight(config, measure)
    assert controller.config_at(0) is config and not calls, "the base keeps all of the class"
    with pytest.raises(KeyboardInterrupt):
        controller.config_at(INTERVAL)
    assert controller.state_dict()["prior_weight"]["step"] == 0
    weight = controller.config_at(INTERVAL).prior_weight
    assert controller.config_at(INTERVAL).prior_weight == weight > 1
    assert calls == [6, 6]
    again = PriorWeight(config, measure)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert again.config_at(INTERVAL).prior_weight == weight and calls == [6, 6]
    assert again.row(INTERVAL) == controller.row(INTERVAL)
    assert again.row(INTERVAL)["class_kept"] == 1 / 1.2
    assert again.row(INTERVAL + 1) == {}


def test_a_measure_that_is_not_finite_never_becomes_lambda() -> None:
    controller = PriorWeight(TrainConfig(DOG, keep_class=0.95), lambda rows: (math.nan, 1.0))
    with pytest.raises(NonFiniteStep, match="loss on held-out class images is nan"):
        controller.config_at(INTERVAL)
    assert controller.state_dict()["prior_weight"]["weight"] == 1


def test_processes_with_parts_of_different_sizes_measure_the_mean_of_all_rows() -> None:
    """Three processes: their parts of the 64 rows are of 22, 21 and 21."""
    pool = torch.arange(float(BINS * IMAGES))
    found = []
    for rank in range(3):
        part = object.__new__(ClassLoss)
        part.base, part._errors = pool, lambda _, rows: 2 * pool[list(rows)]  # type: ignore
        part.accelerator = SimpleNamespace(  # type: ignore[assignment]
            process_index=rank, num_processes=3, autocast=nullcontext, reduce=lambda own, how: own
        )
        found.append(part(None, range(len(pool))))  # type: ignore[arg-type]
    sums = [sum(values) for values in zip(*found, strict=True)]
    assert sums == pytest.approx([63.0, 31.5])


@pytest.mark.parametrize("count", [2, 4, 6, 16])
def test_measurements_take_all_images_and_timesteps_in_turn(count: int) -> None:
    pool = BINS * IMAGES
    rows = [row for number in range(pool) for row in rows_at(number, count)]
    assert sorted(rows[:pool]) == sorted(rows[pool : 2 * pool]) == list(range(pool))
    for number in range(20):
        own = rows_at(number, count)
        assert len({row // IMAGES for row in own}) == min(count, BINS), "from all bins"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"keep_class": 1.0}, "keep_class is 1.0; it must be above 0 and below 1"),
        ({"keep_class": 95}, "keep_class is 95.0; it must be above 0 and below 1"),
        ({"keep_class": 0.9, "prior": "none"}, "keep_class is set but prior is 'none'"),
        ({"keep_class": 0.9, "prior_weight": 0.0}, "prior_weight, where lambda starts from, is 0"),
        ({"keep_class": 0.9, "prior_weight": 9.0}, "set it between 0.05 and 8"),
    ],
)
def test_a_config_that_cannot_keep_the_class_is_refused(
    fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TrainConfig(DOG, **fields)


@pytest.fixture
def started(tmp_path: Path, photos: str, make_config: Make, tiny_sd1: str) -> Callable[..., Run]:
    """Start runs that share their class images, in a folder of that name."""

    def start(name: str, **changes: Any) -> Run:
        fields = {"keep_class": 0.95, "steps": 3 * INTERVAL, "ema_decay": 0.9, "dropout": 0.1}
        config = make_config(tiny_sd1, photos, **(fields | changes))
        return runs.start(config, tmp_path / name / "run")

    return start


def moves(run: Run) -> list[tuple[int, float, float]]:
    """Return the step, λ and class kept of each row of the log that has them."""
    return [
        (row["step"], row["prior_weight"], row["class_kept"])
        for row in run.log()
        if "prior_weight" in row
    ]


def same_weights(first: Run, second: Run) -> bool:
    states = [load_state(list(run.checkpoints().values())[-1]) for run in (first, second)]
    assert states[0]["prior_weight"] == states[1]["prior_weight"]
    model, other = (state["model"] for state in states)
    assert model.keys() == other.keys()
    return all(torch.equal(model[name], other[name]) for name in model)


def test_a_destroyed_class_raises_lambda_and_an_untouched_one_lowers_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = bundled_subjects()[0]
    fields = {"keep_class": 0.95, "steps": 3 * INTERVAL, "class_images": 8, "validate_every": 0}

    def trained(name: str, learning_rate: float) -> Run:
        config = TrainConfig(subject, learning_rate=learning_rate, **fields)
        run = runs.start(config, tmp_path / name)
        list(train(run))
        assert [step for step, _, _ in moves(run)] == [INTERVAL + 1, 2 * INTERVAL + 1]
        return run

    destroyed, untouched = trained("destroyed", 1e-2), trained("untouched", 1e-9)
    assert moves(destroyed)[-1][1] > 1.2 and moves(destroyed)[-1][2] < 0.8
    assert moves(untouched)[-1][1] < 0.8 and moves(untouched)[-1][2] == pytest.approx(1, abs=1e-3)
    assert class_shortfall(untouched) is None
    sentence = class_shortfall(destroyed)
    assert sentence is not None and "below the target of 95%: train for fewer steps" in sentence
    goal = json.loads((destroyed.pipeline / "trained.json").read_text())
    assert f"ratio ended at {goal['class_kept']:.0%}, below" in sentence and destroyed.finished
    said = []
    for run in (destroyed, untouched):
        command.run_training(run)
        said.append(sentence in capsys.readouterr().out)
    assert said == [True, False], "the command line tells it, too"


def test_the_loss_of_each_step_has_its_own_lambda(started: Callable[..., Run]) -> None:
    seen = []

    def objective(prediction: torch.Tensor, batch: Batch, config: TrainConfig) -> Loss:
        seen.append(config.prior_weight)
        return prior_preservation(prediction, batch, config)

    run = started("a", learning_rate=1e-2, gradient_accumulation=2)
    steps = list(train(run, objective))
    by_step = dict((step, weight) for step, weight, _ in moves(run))
    weight = 1.0
    for number, step in enumerate(steps):
        weight = by_step.get(step.step, weight)
        assert seen[2 * number : 2 * number + 2] == [weight] * 2
        assert step.loss == pytest.approx(step.instance_loss + weight * step.prior_loss, rel=1e-5)
    assert len(set(seen)) == 3


def test_measured_images_are_drawn_apart_and_never_trained_on(
    started: Callable[..., Run],
) -> None:
    run = started("a", class_images=16, validate_every=0)
    trainer = Trainer(run)
    trained = {photo.traits.digest for photo in trainer.batches.by_shape[16, 16][1][0].photos}
    sets = [path for path in (run.folder.parent / "class_images").iterdir()]
    assert sorted(len(list(folder.glob("*.png"))) for folder in sets) == [16, IMAGES]
    assert len(trained) == 16
    class_loss = trainer.prior_weight.measure.func  # type: ignore[union-attr]
    assert class_loss.base.shape == (BINS * IMAGES,)
    seeds = [json.loads((folder / "manifest.json").read_text())["seeds"] for folder in sets]
    assert sorted(seeds) == ["0 + picture number", f"{prior_weight.SEED} + picture number"]


def test_ones_own_class_images_are_split_and_too_few_are_refused(
    started: Callable[..., Run], photos: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="put 16 or more there, or leave keep_class out"):
        Trainer(started("a", class_folder=photos))
    many = tmp_path / "many"
    many.mkdir()
    for number in range(20):
        image = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        from PIL import Image

        Image.fromarray(image).save(many / f"{number:02d}.png")
    trainer = Trainer(started("b", class_folder=str(many)))
    assert len(trainer.batches.by_shape[16, 16][1][0]) == 15
    assert not (tmp_path / "b" / "class_images").exists()


def resume(folder: Path, steps: int | None) -> None:
    """Train for some steps, or to the end, in a process of its own."""
    torch.set_num_threads(1)
    training = train(runs.resume(folder))
    list(islice(training, steps))
    training.close()


def test_a_run_resumed_in_other_processes_is_the_same_bit_for_bit(
    started: Callable[..., Run],
) -> None:
    whole, parts = started("a", learning_rate=1e-2), started("b", learning_rate=1e-2)
    list(train(whole))
    for steps in (9, 1, 1, 10, None):  # before, at and after a measurement
        process = nursery().Process(target=resume, args=(parts.folder, steps))
        process.start()
        process.join(240)
        assert process.exitcode == 0
    assert moves(parts) == moves(whole) and len(moves(whole)) == 2
    assert same_weights(whole, parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora", "learning_rate": 1e-2},
        {"train_text_encoder": True},
        {"memory": "low", "ema_decay": None},
        {"mixed_precision": "bf16"},
        {"prior": "distilled"},
        {"gradient_accumulation": 2, "min_snr_gamma": 5.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_way_to_train_has_a_lambda_that_resumes(
    started: Callable[..., Run], changes: dict[str, Any]
) -> None:
    fields = {"learning_rate": 3e-3} | changes
    whole, parts = started("a", **fields), started("b", **fields)
    list(train(whole))
    list(islice(train(parts), INTERVAL + 2))
    list(train(runs.resume(parts.folder)))
    assert moves(parts) == moves(whole) and same_weights(whole, parts)
    assert whole.log()[0].keys() == {
        "step", "loss", "instance_loss", "prior_loss", "lr", "seconds", "memory_mb",
    }  # fmt: skip


def test_training_is_not_touched_by_being_measured(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a λ held at 1 a run has the weights of one that is not measured."""
    monkeypatch.setattr(prior_weight, "PRIOR_WEIGHTS", (1.0, 1.0))
    held, plain = started("a"), started("b", keep_class=None)
    list(train(held))
    list(train(plain))
    assert moves(held) and not moves(plain)
    states = [load_state(run.checkpoints()[30])["model"] for run in (held, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert "prior_weight" not in load_state(plain.checkpoints()[30])


def test_a_run_can_begin_to_keep_its_class_later(started: Callable[..., Run]) -> None:
    run = started("a", keep_class=None, steps=INTERVAL + 5)
    list(train(run))
    list(train(runs.resume(run.folder, keep_class=0.9, steps=3 * INTERVAL)))
    assert [step for step, _, _ in moves(run)] == [2 * INTERVAL + 1]


JOB = """
import sys
from dreambooth_lib.training import loop, runs
from dreambooth_lib.core.processes import join_group
state = join_group()
seen = []
def objective(prediction, batch, config):
    seen.append(config.prior_weight)
    return loop.prior_preservation(prediction, batch, config)
list(loop.train(runs.resume(sys.argv[1]), objective))
open(f"{sys.argv[1]}/seen{state.process_index}", "w").write(repr(seen))
state.destroy_process_group()
"""


def test_two_processes_have_one_lambda_and_train_as_one_does(
    started: Callable[..., Run], tmp_path: Path
) -> None:
    one, two = started("a", dropout=0.0), started("b", dropout=0.0)
    list(train(one))
    script = tmp_path / "job.py"
    script.write_text(JOB)
    done = launched(*TWO, str(script), str(two.folder), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-2000:]
    seen = [(two.folder / f"seen{rank}").read_text() for rank in (0, 1)]
    assert seen[0] == seen[1]
    for own, others in zip(moves(one), moves(two), strict=True):
        assert own == pytest.approx(others, rel=1e-3)


def test_the_losses_figure_has_a_panel_for_lambda_only_where_it_moved() -> None:
    log = [
        {"step": n, "instance_loss": 0.3, "prior_loss": 0.2}
        | ({"prior_weight": 1 + n / 50, "class_kept": 0.97 - n / 2000} if n % 10 == 1 else {})
        for n in range(11, 100)
    ]
    figure = plots.losses(log, keep_class=0.95)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "instance loss", "prior loss", "class loss ratio and λ", "",
    ]  # fmt: skip
    kept, right = figure.axes[2], figure.axes[3]
    assert kept.lines[0].get_ydata()[0] == pytest.approx(97 - 0.55)
    assert right.lines[0].get_ydata()[-1] == pytest.approx(1 + 91 / 50)
    plain = [
        {k: v for k, v in row.items() if k not in ("prior_weight", "class_kept")} for row in log
    ]
    assert len(plots.losses(plain).axes) == 2


def test_a_model_card_says_what_was_asked_for() -> None:
    assert "an adaptive λ (target class loss ratio 90%) on " in _prior(
        TrainConfig(DOG, keep_class=0.9)
    )
    assert "with λ 1 " in _prior(TrainConfig(DOG))
