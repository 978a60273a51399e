"""Train in a notebook cell: progress, curves, and the validation images step by step."""

import html
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from statistics import median
from typing import TYPE_CHECKING

from IPython.display import display
from ipywidgets import HTML, Image, IntProgress, Layout
from PIL import Image as PIL_Image

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.errors import OneSentence
from dreambooth_lib.figures import image_grids, plots
from dreambooth_lib.notebook.timing import in_words
from dreambooth_lib.notebook.widgets.checkpoint_slider import verdict_html
from dreambooth_lib.notebook.widgets.in_force import settings_in_force
from dreambooth_lib.notebook.widgets.loaded_models import release_models
from dreambooth_lib.notebook.widgets.parts import Panel, empty_image, row, show_image
from dreambooth_lib.training.best_checkpoint import best_checkpoint
from dreambooth_lib.training.loop import Objective, Step, prior_preservation, train
from dreambooth_lib.training.prior_weight import class_shortfall
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.validation_pace import count_validations, due_steps
from dreambooth_lib.training.validation_record import history, load_all_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLOT_TIME = 0.05  # of the training time, at most, goes into drawing curves
_RECENT = 50  # steps whose time tells that of those to come


class Interrupted(OneSentence, KeyboardInterrupt):
    """An interrupt of a training, with the step that it reached."""


def monitor(run: Run, objective: Objective = prior_preservation) -> Iterator[Step]:
    """Train a run as :func:`train` does, and show its progress below the cell.

    The cell owns the loop: ``for step in monitor(run): ...``. An interrupt saves the run, says at
    which step, and ends the cell with :class:`Interrupted`; running the cell again resumes. Raises
    as ``train`` does.
    """
    release_models()
    panel = _TrainingPanel(run)
    try:
        with closing(train(run, objective)) as steps:
            display(panel)
            for step in steps:
                panel.show(step)
                yield step
    except (KeyboardInterrupt, GeneratorExit) as stop:
        gpu_memory.clear_frames(stop)
        reached = _last_step(run)
        with suppress(KeyboardInterrupt):  # interrupted again, in a hurry
            panel.draw()
        panel.status.value = f"The run is saved at step {reached}."
        if isinstance(stop, GeneratorExit):
            panel.status.value += " Run this cell again to resume."
            raise
        raise Interrupted(f"interrupted at step {reached}; run this cell again to resume") from None
    except Exception as error:
        panel.report(error)
        raise
    panel.draw()
    judged = verdict_html(best_checkpoint(run)) if len(history(run)) > 1 else ""
    told = f"Finished at step {_last_step(run)}. {class_shortfall(run) or ''}"
    panel.status.value = f"{told}<br>{judged}"


def _last_step(run: Run) -> int:
    return max(run.checkpoints(), default=0)


class _TrainingPanel(Panel):
    """The progress of a run, read from its folder."""

    def __init__(self, run: Run):
        self.run, self._drawn_at, self._seconds, self._validations = run, 0.0, 0.0, 0
        self._results = history(run)
        self._kept = ""  # the newest λ and class loss ratio, where λ adapts
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.bar = IntProgress(
            _last_step(run), 0, run.config.steps, bar_style="info", layout=Layout(width="100%")
        )
        self.status = HTML("Loading the base; class images and validation come before step 1.")
        self.settings = HTML(f"<small>Settings: {html.escape(settings_in_force(run))}</small>")
        self.losses, self.curves, self.images = empty_image(), empty_image(), empty_image()
        curves = row([self.losses, self.curves])
        super().__init__(self.bar, self.status, self.settings, curves, self.images)
        for figure in (self.losses, self.curves):
            figure.layout.width, figure.layout.min_width = "49%", "400px"

    def show(self, step: Step) -> None:
        """Show a step's losses, and draw the curves if there is time for them."""
        self.bar.value = step.step
        prior = "" if step.prior_loss is None else f", prior loss {step.prior_loss:.3f}"
        if step.class_kept is not None:
            self._kept = f", λ {step.prior_weight:.2g}, class loss ratio {step.class_kept:.0%}"
        self.status.value = (
            f"<b>Step {step.step} of {self.run.config.steps}, {self._time_left(step)} left.</b> "
            f"Instance loss {step.instance_loss:.3f}{prior}{self._kept}."
        )
        config = self.run.config
        if config.validate_every and due_steps(config, step.step, step.step + 1):
            self.status.value += " The next step may also generate validation images."
        if step.validation or (time.monotonic() - self._drawn_at) * _PLOT_TIME > self._seconds:
            self.draw()

    def _time_left(self, step: Step) -> str:
        """Return the time of the steps to come, and of their validations, in words."""
        self._recent.append(step.seconds)
        config, one = self.run.config, median(self._recent)
        seconds = (config.steps - step.step) * one
        if self._results:
            validation = self._results[-1].seconds
            wanted = count_validations(config, one, validation) - len(self._results)
            due = due_steps(config, step.step, config.steps) if config.validate_every else 0
            seconds += max(0, min(due, wanted)) * validation
        return in_words(seconds)

    def draw(self) -> None:
        """Draw curves and validation images from what is on disk."""
        start = time.monotonic()
        log, results, config = self.run.log(), history(self.run), self.run.config
        self._results = results
        if log:
            figure = plots.losses(log, keep_class=config.keep_class, last=config.steps)
            _show_figure(self.losses, figure)
        self._seconds = time.monotonic() - start  # validations draw the rest
        if len(results) != self._validations:
            _show_figure(self.curves, plots.validation_curves(results, last=config.steps))
            show_image(self.images, validation_sheet(self.run).save)
        self._validations, self._drawn_at = len(results), time.monotonic()


def _show_figure(widget: Image, figure: "Figure") -> None:
    """Show a figure at half the width of a page, with readable text."""
    figure.set_size_inches(6, max(4.6, 0.8 * figure.get_figheight()))
    show_image(widget, figure.savefig)


def validation_sheet(run: Run) -> PIL_Image.Image:
    """Return a page of all validation images, a row for each step: subject, class and unrelated.

    Raises ``ValueError`` if there are none.
    """
    steps = load_all_images(run)
    rows = [f"step {step}" if step else "the base" for step in steps]
    cells = [[images.subject, images.class_images, images.unrelated] for images in steps.values()]
    subject = run.config.subject
    columns = [f"the subject: {subject.token}", f"its class: {subject.class_prompt}",
               "other prompts"]  # fmt: skip
    return image_grids.matrix(rows, columns, cells)
