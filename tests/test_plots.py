"""Check what the plots draw."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth_lib.figures import plots
from dreambooth_lib.training.validation_record import ValidationResult


def log(count: int, prior: bool = True) -> list[dict[str, Any]]:
    noise = np.random.default_rng(0).gamma(2, 0.1, (count, 2))
    return [
        {"step": 10 * (i + 1), "loss": float(a + b), "instance_loss": float(a),
         "prior_loss": float(b) if prior else None}
        for i, (a, b) in enumerate(noise)
    ]  # fmt: skip


def test_losses_draws_raw_values_and_their_running_mean_in_two_panels() -> None:
    rows = log(200)
    figure = plots.losses(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["instance loss", "prior loss"]
    for axes, key in zip(figure.axes, ("instance_loss", "prior_loss"), strict=True):
        raw, smooth = axes.get_lines()
        values = [row[key] for row in rows]
        assert list(raw.get_xdata()) == list(smooth.get_xdata()) == [row["step"] for row in rows]
        np.testing.assert_allclose(raw.get_ydata(), values)
        expected = [np.mean(values[max(0, i - 9) : i + 1]) for i in range(200)]
        np.testing.assert_allclose(smooth.get_ydata(), expected)
        assert raw.get_alpha() < 1 and smooth.get_alpha() is None
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["logged value", "running mean of 10 logged values"]
        assert axes.get_ylabel() == "mean squared error" and axes.get_ylim()[0] == 0
    assert figure.axes[-1].get_xlabel() == "training step"


def test_losses_without_a_prior_has_one_panel() -> None:
    assert len(plots.losses(log(3, prior=False)).axes) == 1
    mixed = log(3)
    mixed[1]["prior_loss"] = None
    raw = plots.losses(mixed).axes[1].get_lines()[0]
    assert list(raw.get_xdata()) == [10, 30]


def test_losses_are_written_and_leave_no_figure_open(tmp_path: Path) -> None:
    path = tmp_path / "losses.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.losses(log(1), path)
    with Image.open(path) as written:
        assert written.size[0] == 880
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_losses_names_wrong_logs() -> None:
    with pytest.raises(ValueError, match="the log has no rows"):
        plots.losses([])
    with pytest.raises(ValueError, match="row 1 of the log lacks"):
        plots.losses([*log(1), {"step": 2, "loss": 1.0}])


def result(step: int, fidelity: float, drift: float) -> ValidationResult:
    return ValidationResult(
        step=step, subject_fidelity=fidelity, reference_fidelity=0.8, prompt_adherence=0.5,
        class_diversity=0.4, prior_drift=drift, unrelated_drift=0.01, pres=0.3, seconds=1.0,
        held_out={"subject": [0.4 - step / 1000, 0.5], "class": [0.3, 0.4]},
    )  # fmt: skip


def test_validation_curves_mark_the_best_step() -> None:
    rows = [result(0, 0.3, 0.0), result(100, 0.7, 0.1), result(200, 0.72, 0.4)]
    ratios, losses = plots.validation_curves(rows).axes
    by_name = {line.get_label(): list(line.get_ydata()) for line in ratios.get_lines()}
    assert by_name["likeness to the photos"] == pytest.approx([0, 0.4 / 0.5, 0.42 / 0.5])
    assert by_name["class kept"] == pytest.approx([1.0, 0.9, 0.6])
    assert by_name["other prompts kept"] == pytest.approx([0.99, 0.99, 0.99])
    assert by_name["best: step 100"] == [0, 1]
    relative = {line.get_label(): list(line.get_ydata()) for line in losses.get_lines()}
    assert relative["subject"] == pytest.approx([1, 0.8 / 0.9, 0.7 / 0.9])
    assert relative["class"] == pytest.approx([1, 1, 1])
    assert all(axes.get_ylabel() for axes in (ratios, losses)) and losses.get_xlabel()
    titles = [axes.get_title(loc="left") for axes in (ratios, losses)]
    assert titles[0] == "What the score is made of (1 is best)"
    assert titles[1] == "Loss on held-out photos and images (1 = before training)"
    with pytest.raises(ValueError, match="no validations to plot"):
        plots.validation_curves([])


def test_validation_curves_of_a_resumed_run_show_what_each_validation_held_out() -> None:
    rows = [result(0, 0.3, 0.0), result(100, 0.7, 0.1), result(200, 0.72, 0.4)]
    ends = replace(rows[2], held_out={"subject": [0.2, 0.5]})  # resumed without class images
    _, losses = plots.validation_curves([*rows[:2], ends]).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in losses.get_lines()}
    assert (drawn["subject"], drawn["class"]) == ([0, 100, 200], [0, 100])
    begins = [replace(rows[0], held_out={"class": [0.3, 0.4]}), *rows[1:]]
    _, losses = plots.validation_curves(begins).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in losses.get_lines()}
    assert drawn["subject (1 = step 100)"] == pytest.approx([1, 0.7 / 0.8])
    assert drawn["class"] == pytest.approx([1, 1, 1])
    neither = [replace(row, held_out={}) for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.validation_curves(neither)


CELLS = [
    {"prior_weight": w, "seed": s, "step": t, "score": w / 4 + t / 1000 + s / 10,
     "subject_fidelity": 0.6 + t / 1000, "prior_drift": 0.3 - w / 10}
    for w in (0.0, 1.0) for s in (0, 1) for t in (100, 200)
]  # fmt: skip


def test_a_heat_map_has_the_mean_over_seeds_in_each_cell_and_the_best_one_marked() -> None:
    axes, *_ = plots.heat_map(CELLS, "step", "prior_weight").axes
    (image,) = axes.get_images()
    assert np.allclose(image.get_array(), [[0.15, 0.25], [0.40, 0.50]])
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["0.150", "0.250", "0.400", "0.500"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "λ")
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1"]
    (frame,) = [patch for patch in axes.patches if not patch.get_fill()]
    assert frame.get_xy() == (0.5, 0.5), "weight 1 at step 200"


def test_a_heat_map_leaves_empty_what_a_sweep_lacks() -> None:
    axes, *_ = plots.heat_map(CELLS[1:2] + CELLS[4:], "step", "prior_weight").axes
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (1, 0): "0.200", (0, 1): "0.400", (1, 1): "0.500"
    }  # fmt: skip


def test_a_heat_map_of_drift_frames_its_lowest_cell_and_draws_it_bright() -> None:
    axes, bar = plots.heat_map(CELLS, "step", "prior_weight", "prior_drift", best="min").axes
    (frame,) = [patch for patch in axes.patches if not patch.get_fill()]
    assert frame.get_xy() == (-0.5, 0.5), "weight 1, and of equals the first step"
    (image,) = axes.get_images()
    bright = image.to_rgba(np.array([[0.3, 0.2]]))[0, :, :3].mean(1)
    assert bright[0] < bright[1]
    assert [text.get_color() for text in axes.texts] == ["white"] * 2 + ["black"] * 2
    assert bar.get_ylabel() == "class drift"


def test_steps_are_drawn_from_zero_and_in_whole_numbers() -> None:
    for figure in (
        plots.validation_curves([result(0, 0.3, 0.0)]),
        plots.losses([log(1)[0] | {"step": 1}]),
    ):
        figure.canvas.draw()
        low, high = figure.axes[-1].get_xlim()
        ticks = [tick for tick in figure.axes[-1].get_xticks() if low <= tick <= high]
        assert low <= 0 and high >= 10 and all(tick == int(tick) for tick in ticks)


def test_figures_of_a_run_that_goes_on_have_the_same_axis_to_its_last_step() -> None:
    figures = (
        plots.losses(log(5), last=300),
        plots.validation_curves([result(0, 0.3, 0.0), result(5, 0.4, 0.1)], last=300),
    )
    shown = [[axes.get_xlim() for axes in figure.axes] for figure in figures]
    assert shown == [[(-6.0, 306.0)] * 2] * 2


def test_the_front_holds_the_points_that_no_other_beats_in_fidelity_and_drift() -> None:
    (axes,) = plots.front(CELLS, by="prior_weight").axes
    line = next(line for line in axes.get_lines() if line.get_label().startswith("front"))
    points = [*line.get_xdata(), *line.get_ydata()]
    assert points == pytest.approx([0.2, 0.8]), "weight 1 at step 200, both seeds alike"
    names = [line.get_label() for line in axes.get_lines()]
    assert names == ["front (training steps)", "λ 0", "λ 1"] and "class drift" in axes.get_xlabel()
    assert "likeness to the photos" in axes.get_ylabel()
    assert [text.get_text() for text in axes.texts] == ["200"], "the step of the front's point"


def test_heat_maps_and_fronts_are_saved(tmp_path: Path) -> None:
    plots.heat_map(CELLS, "step", "prior_weight", path=tmp_path / "map.png")
    plots.front(CELLS, by="prior_weight", path=tmp_path / "front.png")
    for name in ("map.png", "front.png"):
        assert Image.open(tmp_path / name).width > 400
