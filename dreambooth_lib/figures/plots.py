"""Plot loss curves, validation curves, and a sweep's heat map and Pareto front.

Every function returns a matplotlib Figure outside pyplot's state; with a ``path`` it also writes
the figure there as a PNG.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dreambooth_lib.core.errors import InputError, printable
from dreambooth_lib.core.files import replacing_file
from dreambooth_lib.figures.labels import NAMES, RATIOS, name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dreambooth_lib.training.validation_record import ValidationResult

_BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # a legend to the right of its axes


def losses(
    log: list[dict[str, Any]],
    path: str | Path | None = None,
    keep_class: float | None = None,
    last: int | None = None,
) -> "Figure":
    """Plot instance and prior loss over the training steps, with their running means.

    ``log`` rows have ``step``, ``instance_loss`` and ``prior_loss`` (mean squared errors). Without
    any prior loss there is one panel. The running mean spans a twentieth of the rows, at least 5.
    Where λ adapted, a panel has it and the class loss ratio, with its target ``keep_class``.
    The axis of steps ends at ``last``, by default at the log's own last step.
    Raises ``InputError`` for an empty log or a row without a step or an instance loss.
    """
    if not log:
        raise InputError("the log has no rows; train for a step or more before plotting.")
    for index, row in enumerate(log):
        if row.get("step") is None or row.get("instance_loss") is None:
            raise InputError(f"row {index} of the log lacks 'step' or 'instance_loss'; log both.")
    series = [("instance loss", "instance_loss", "tab:blue")]
    if any(row.get("prior_loss") is not None for row in log):
        series.append(("prior loss", "prior_loss", "tab:orange"))
    moves = [row for row in log if {"prior_weight", "class_kept"} <= row.keys()]
    count = len(series) + bool(moves)
    figure, panels = _figure(8, 2.6 * count + 0.6, count)
    window = max(5, len(log) // 20)
    for axes, (title, key, colour) in zip(panels, series, strict=False):
        points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
        steps, values = zip(*points, strict=True)
        mean = [np.mean(values[max(0, i - window) : i]) for i in range(1, len(values) + 1)]
        axes.plot(steps, values, ".", color=colour, alpha=0.3, markersize=4, label="logged value")
        label = f"running mean of {window} logged values"
        axes.plot(steps, mean, color=colour, linewidth=2, label=label)
        axes.set_title(title, loc="left")
        axes.set(ylabel="mean squared error", ylim=(0, None))
        _style(axes, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    if moves:
        _plot_prior_weight(panels[-1], moves, keep_class)
    _label_steps(panels[-1], last or log[-1]["step"])
    return _save(figure, path)


def _plot_prior_weight(axes: "Axes", rows: list[dict[str, Any]], keep_class: float | None) -> None:
    """Plot the class loss ratio on the left axis, and λ, by powers of two, on the right."""
    steps, right = [row["step"] for row in rows], axes.twinx()
    kept = [100 * row["class_kept"] for row in rows]
    axes.plot(steps, kept, color="tab:green", linewidth=2, label="class loss ratio")
    if keep_class is not None:
        label = f"target: {keep_class:.0%}"
        axes.axhline(100 * keep_class, color="tab:green", linestyle="--", label=label)
    weights = [row["prior_weight"] for row in rows]
    axes.plot([], [], color="tab:purple", label="λ (right)")  # for the legend
    right.plot(steps, weights, color="tab:purple", drawstyle="steps-post")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_ylabel("λ")
    axes.set_title("class loss ratio and λ", loc="left")
    axes.set_ylabel("class loss ratio, %")
    _style(axes, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    right.spines["top"].set_visible(False)


def validation_curves(
    rows: "Sequence[ValidationResult]", path: str | Path | None = None, last: int | None = None
) -> "Figure":
    """Plot the ratios behind the score and the held-out losses over a run's validations.

    The ratios are those of :class:`best_checkpoint.Ratios`, each in [0, 1]. Losses are means over
    the timestep bins, relative to the frozen base's: above 1 is worse than before training. Of a
    kind that is held out since a later step only, they are relative to that step's, and the legend
    says so. The best step is marked, if the model learnt anything. The axis of steps ends at
    ``last``, by default at the last validation. Raises ``InputError`` without a validation.
    """
    from dreambooth_lib.training.best_checkpoint import ratios_of, select_best

    if not rows:
        raise InputError("there are no validations to plot; train with validate_every above 0.")
    steps = [row.step for row in rows]
    figure, (upper, lower) = _figure(8, 5.8, 2)
    ratios = [ratios_of(row, rows[0]) for row in rows]
    for number, (field, label) in enumerate(RATIOS.items()):
        size = 7.5 - 1.5 * number  # equal points show below each other
        upper.plot(steps, [getattr(r, field) for r in ratios], "o-", markersize=size, label=label)
    upper.set(ylabel="ratio, 0 to 1", ylim=(0, 1.03))
    for number, kind in enumerate(dict.fromkeys(kind for row in rows for kind in row.held_out)):
        own = [row for row in rows if kind in row.held_out]  # not all, where a resumed run changed
        means = [np.mean(row.held_out[kind]) for row in own]
        relative = [mean / means[0] for mean in means]
        label = kind if own[0] is rows[0] else f"{kind} (1 = step {own[0].step})"
        at = [row.step for row in own]
        lower.plot(at, relative, "o-", markersize=7.5 - 3 * number, label=label)
    lower.set(ylabel="relative loss")
    if len(rows) > 1 and (selection := select_best(rows)).better_than_base:
        best = selection.step
        upper.axvline(best, color="black", linestyle=":", label=f"best: step {best}")
        lower.axvline(best, color="black", linestyle=":")
    titles = {
        upper: "What the score is made of (1 is best)",
        lower: "Loss on held-out photos and images (1 = before training)",
    }
    for axes, title in titles.items():
        axes.set_title(title, loc="left", fontsize=10)
        _style(axes, **_BESIDE)
    _label_steps(lower, last or steps[-1])
    return _save(figure, path)


def heat_map(
    rows: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    value: str = "score",
    path: str | Path | None = None,
    best: Literal["max", "min"] = "max",
) -> "Figure":
    """Draw a sweep's table as a heat map of mean ``value`` for each (x, y), the best one framed.

    The best is the brightest: the highest, or with ``best="min"`` the lowest. ``rows`` are those
    of :func:`sweep_table.table`. Raises ``InputError`` for none.
    """
    from matplotlib.patches import Rectangle

    across, down = _distinct(rows, x), _distinct(rows, y)
    means = np.full((len(down), len(across)), np.nan)
    for i, j in np.ndindex(means.shape):
        values = [row[value] for row in rows if (row[y], row[x]) == (down[i], across[j])]
        means[i, j] = np.mean(values) if values else np.nan
    figure, (axes,) = _figure(2.6 + 0.95 * len(across), 1.6 + 0.6 * len(down))
    colours, argbest = {"max": ("viridis", np.nanargmax), "min": ("viridis_r", np.nanargmin)}[best]
    image = axes.imshow(means, cmap=colours, aspect="auto")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for i, j in np.argwhere(~np.isnan(means)):  # a sweep may lack some
        mean = means[i, j]
        colour = "white" if (mean < middle) == (best == "max") else "black"
        axes.text(j, i, f"{mean:.3f}", ha="center", va="center", color=colour)
    i, j = np.unravel_index(argbest(means), means.shape)
    frame = Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5)
    axes.add_patch(frame)
    axes.set_xticks(range(len(across)), map(_short, across))
    axes.set_yticks(range(len(down)), map(_short, down))
    axes.set(xlabel=_plain(name(x)), ylabel=_plain(name(y)))
    if len(name(y)) == 1:  # a letter need not lie on its side
        axes.set_ylabel(_plain(name(y)), rotation=0, labelpad=12)
    figure.colorbar(image, label=_plain(name(value)))
    return _save(figure, path)


def front(rows: Sequence[Mapping[str, Any]], by: str, path: str | Path | None = None) -> "Figure":
    """Plot likeness to the photos against class drift, coloured by ``by``, with the Pareto front.

    The front's points have their training step beside them. ``rows`` are those of
    :func:`sweep_table.table`. Raises ``InputError`` for none.
    """
    kinds = _distinct(rows, by)
    figure, (axes,) = _figure(7, 4.6)
    points = [(row["prior_drift"], row["subject_fidelity"]) for row in rows]
    best = [
        (drift, fidelity)
        for drift, fidelity in sorted(set(points))
        if not any(a <= drift and b >= fidelity and (a, b) != (drift, fidelity) for a, b in points)
    ]
    axes.plot(
        *zip(*best, strict=True),
        color="black",
        linewidth=1,
        label="front (training steps)",
        zorder=0,
    )
    for point in best:
        at_point = [row for at, row in zip(points, rows, strict=True) if at == point]
        steps = sorted({row["step"] for row in at_point if "step" in row})
        text = ", ".join(f"{step}" for step in steps)
        axes.annotate(text, point, (-4, 3), textcoords="offset points", ha="right", fontsize=8)
    for kind in kinds:
        own = [point for point, row in zip(points, rows, strict=True) if row[by] == kind]
        axes.plot(
            *zip(*own, strict=True), "o", alpha=0.8, label=f"{_plain(name(by))} {_short(kind)}"
        )
    axes.set_xlabel(f"{NAMES['prior_drift']} (lower is better)")
    axes.set_ylabel(f"{NAMES['subject_fidelity']}, a cosine (higher is better)")
    _style(axes, **_BESIDE)
    return _save(figure, path)


def _distinct(rows: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    if not rows:
        raise InputError("the table has no rows; run a sweep first.")
    values = {row[column] for row in rows}
    return sorted(values, key=lambda value: (value is not None, value))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _plain(str(value))


def _plain(text: str) -> str:
    """Return a text such that matplotlib shows it as it is, on one line, without formulas."""
    return printable(text).replace("$", r"\$")


def _figure(width: float, height: float, panels: int = 1) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]


def _style(axes: "Axes", **legend: Any) -> None:
    axes.grid(color="#d0d0d0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, **legend)


def _label_steps(axes: "Axes", last: int) -> None:
    """Show steps from 0 to at least 10, with ticks at whole steps."""
    span = max(10, last)
    axes.set(xlabel=NAMES["step"], xlim=(-0.02 * span, 1.02 * span))
    axes.locator_params(axis="x", integer=True, nbins=6)  # alike in figures side by side


def _save(figure: "Figure", path: str | Path | None) -> "Figure":
    if path is not None:
        with replacing_file(path) as partial:
            figure.savefig(partial, format="png")
    return figure
