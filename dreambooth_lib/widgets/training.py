"""Training, watched: progress, curves, and the same pictures look by look."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from IPython.display import display
from ipywidgets import HTML, Image
from PIL import Image as Pictures

from dreambooth_lib import memory, pages, plots, watch
from dreambooth_lib.runs import Run
from dreambooth_lib.training import Objective, Step, prior_preservation, train
from dreambooth_lib.widgets.parts import View, blank, in_a_row, show
from dreambooth_lib.widgets.side_by_side import release

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Share of the time that may go into drawing curves.
_SHARE = 0.05


class Interrupted(KeyboardInterrupt):
    """An interrupt that a notebook shows as its one sentence, without the frames it fell into."""

    def _render_traceback_(self) -> list[str]:  # what IPython asks an exception for
        return [str(self)]


def monitor(run: Run, objective: Objective = prior_preservation) -> Iterator[Step]:
    """Train a run as :func:`dreambooth_lib.training.train` does, shown below the cell.

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
        memory.forget(stop)
        text = f"interrupted at step {_reached(run)}; run this cell again to go on"
        view.say(f"{text[0].upper()}{text[1:]}.")
        if isinstance(stop, GeneratorExit):
            raise
        raise Interrupted(text) from None
    except Exception as error:
        view.fail(error)
        raise
    view.draw()
    view.say(f"Finished at step {_reached(run)}.")


def _reached(run: Run) -> int:
    return max(run.checkpoints(), default=0)


class _Training(View):
    """What :func:`monitor` shows of a run, all read from its folder."""

    def __init__(self, run: Run):
        self.run, self._drawn_at, self._cost, self._looks = run, 0.0, 0.0, 0
        self.status = HTML("Loading the base; class pictures and a first look come before step 1.")
        self.losses, self.watched, self.looks = blank(), blank(), blank()
        super().__init__(self.status, in_a_row([self.losses, self.watched]), self.looks)
        for curves in (self.losses, self.watched):
            curves.layout.width, curves.layout.min_width = "49%", "400px"

    def say(self, text: str) -> None:
        self.status.value = text

    def show(self, step: Step) -> None:
        """One more step; curves follow as often as their share of the time allows."""
        prior = "" if step.prior_loss is None else f", prior loss {step.prior_loss:.3f}"
        self.say(f"Step {step.step}: subject loss {step.instance_loss:.3f}{prior}.")
        if step.watched or (time.monotonic() - self._drawn_at) * _SHARE > self._cost:
            self.draw()

    def draw(self) -> None:
        """Curves and looks as they are on disk now."""
        began = time.monotonic()
        log, looks = self.run.log(), watch.history(self.run)
        if log:
            _show_curves(self.losses, plots.losses(log))
        if len(looks) != self._looks:
            _show_curves(self.watched, plots.watched(looks))
            show(self.looks, look_by_look(self.run).save)
        self._looks, self._drawn_at = len(looks), time.monotonic()
        self._cost = self._drawn_at - began


def _show_curves(place: Image, figure: "Figure") -> None:
    """At half the width of a page, so that its text stays readable."""
    figure.set_size_inches(6, 4.6)
    show(place, figure.savefig)


def look_by_look(run: Run) -> Pictures.Image:
    """A page of all looks at a run, a row each: subject, class and unrelated pictures.

    Raises ``ValueError`` where there was none.
    """
    steps = [row.step for row in watch.history(run)]
    cells = []
    for step in steps:
        seen = watch.drawn(run, step)
        cells.append([seen.subject, seen.of_class, seen.unrelated])
    rows = [f"step {step}" if step else "the base" for step in steps]
    subject = run.config.subject
    columns = [f"the subject: {subject.token}", f"its class: {subject.class_prompt}", "unrelated"]
    return pages.matrix(rows, columns, cells)
