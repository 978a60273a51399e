"""Training, validation: progress, curves, and the same pictures look by look."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from IPython.display import display
from ipywidgets import HTML, Image
from PIL import Image as Pictures

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.figures import image_grids, plots
from dreambooth_lib.notebook.widgets.parts import Panel, blank, in_a_row, show
from dreambooth_lib.notebook.widgets.playground import release
from dreambooth_lib.training.loop import Objective, Step, prior_preservation, train
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.validation_record import history, load_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARE = 0.05  # of the time, that may go into drawing curves


class Interrupted(KeyboardInterrupt):
    """An interrupt that a notebook shows as its one sentence, without the frames it fell into."""

    def _render_traceback_(self) -> list[str]:  # what IPython asks an exception for
        return [str(self)]


def monitor(run: Run, objective: Objective = prior_preservation) -> Iterator[Step]:
    """Train a run as :func:`train` does, shown below the cell.

    The cell owns the loop: ``for step in monitor(run): ...``. When it is interrupted, the run is
    saved, a sentence says where, and :class:`Interrupted` ends the cell; running it again goes on.
    Raises as ``train`` does.
    """
    from tqdm.auto import tqdm

    release()
    view, begun = _Training(run), _reached(run)
    try:
        # With miniters 1 tqdm's own thread, whose updates Colab does not show, has nothing to do.
        with (
            closing(train(run, objective)) as steps,
            tqdm(total=run.config.steps, initial=begun, unit="step", miniters=1) as bar,
        ):
            display(view)
            for step in steps:
                bar.update(step.step - bar.n)
                view.show(step)
                yield step
    except (KeyboardInterrupt, GeneratorExit) as stop:
        gpu_memory.clear_frames(stop)
        text = f"interrupted at step {_reached(run)}; run this cell again to go on"
        view.status.value = f"{text.capitalize()}."
        if isinstance(stop, GeneratorExit):
            raise
        raise Interrupted(text) from None
    except Exception as error:
        view.fail(error)
        raise
    view.draw()
    view.status.value = f"Finished at step {_reached(run)}."


def _reached(run: Run) -> int:
    return max(run.checkpoints(), default=0)


class _Training(Panel):
    """What :func:`monitor` shows of a run, all read from its folder."""

    def __init__(self, run: Run):
        self.run, self._drawn_at, self._cost, self._looks = run, 0.0, 0.0, 0
        self.status = HTML("Loading the base; class images and a first look come before step 1.")
        self.losses, self.validation, self.looks = blank(), blank(), blank()
        super().__init__(self.status, in_a_row([self.losses, self.validation]), self.looks)
        for curves in (self.losses, self.validation):
            curves.layout.width, curves.layout.min_width = "49%", "400px"

    def show(self, step: Step) -> None:
        """Show one more step; curves follow as often as their share of the time allows."""
        prior = "" if step.prior_loss is None else f", prior loss {step.prior_loss:.3f}"
        self.status.value = f"Step {step.step}: subject loss {step.instance_loss:.3f}{prior}."
        if step.validation or (time.monotonic() - self._drawn_at) * _SHARE > self._cost:
            self.draw()

    def draw(self) -> None:
        """Draw curves and looks as they are on disk now."""
        began = time.monotonic()
        log, looks = self.run.log(), history(self.run)
        if log:
            _show_curves(self.losses, plots.losses(log))
        if len(looks) != self._looks:
            _show_curves(self.validation, plots.validation_curves(looks))
            show(self.looks, validation_sheet(self.run).save)
        self._looks, self._drawn_at = len(looks), time.monotonic()
        self._cost = self._drawn_at - began


def _show_curves(place: Image, figure: "Figure") -> None:
    """Show a figure at half the width of a page, so that its text stays readable."""
    figure.set_size_inches(6, 4.6)
    show(place, figure.savefig)


def validation_sheet(run: Run) -> Pictures.Image:
    """Make a page of all looks at a run, a row each: subject, class and unrelated pictures.

    Raises ``ValueError`` where there was none.
    """
    looks = {row.step: load_images(run, row.step) for row in history(run)}
    rows = [f"step {step}" if step else "the base" for step in looks]
    cells = [[seen.subject, seen.class_images, seen.unrelated] for seen in looks.values()]
    subject = run.config.subject
    columns = [f"the subject: {subject.token}", f"its class: {subject.class_prompt}", "unrelated"]
    return image_grids.matrix(rows, columns, cells)
