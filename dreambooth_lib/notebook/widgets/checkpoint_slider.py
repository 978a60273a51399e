"""Slide through the validations of a run, with the best checkpoint marked."""

import html

from ipywidgets import HTML, SelectionSlider, VBox
from PIL import ImageOps

from dreambooth_lib.core.checked_json import write_object
from dreambooth_lib.data.images import DataError, Images, read_photos
from dreambooth_lib.figures.labels import BAD, FAIR, RATIOS
from dreambooth_lib.notebook.widgets.parts import Panel, captioned, control, refill, row, with_hints
from dreambooth_lib.training import best_checkpoint
from dreambooth_lib.training.best_checkpoint import Selection
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.validation_record import history, load_images, plan_of

_HINT = "early steps lack the subject, late ones ignore the prompt: choose one that shows both"
#: Smallest and largest width on the page, in pixels: of the subject, its class, other prompts.
_WIDTHS = (200, 256), (200, 256), (128, 160)
_PHOTOS, _PHOTO_WIDTH = 6, 128  # how many of the photos are shown to compare with; pixels


def verdict_html(selection: Selection) -> str:
    """Write a selection's verdict in words above its numbers, coloured if something is amiss."""
    judged = selection.verdict
    words = (judged.learnt, judged.class_kept, judged.others_kept)
    # No green: a person may see faults that the scores miss.
    colour = f' style="color: {BAD if "no" in words else FAIR}"' if {*words} != {"yes"} else ""
    told = f"<b{colour}>{html.escape(judged.text)}</b> {html.escape(judged.advice)}"
    chosen = "<b>Chosen ★:</b> " if selection.better_than_base else ""
    return f"{told}<br>{chosen}{html.escape(selection.reason)}"


class CheckpointSlider(Panel):
    """The validation images of a run, one step at a time, beginning with the best.

    ``step`` is the step shown if its weights are saved, else the best. A step that was chosen
    before is shown again, until the run is trained further. Raises ``RunError`` if the run has no
    validation of a trained model.
    """

    def __init__(self, run: Run):
        self.run, self.best = run, best_checkpoint.best_checkpoint(run)
        self._results = {result.step: result for result in history(run)}
        labels = [(self._label(step), step) for step in self._results]
        chosen = best_checkpoint.chosen_step(run)
        first = chosen if chosen in self._results else self.best.step
        self.slider = control(SelectionSlider, "checkpoint", options=labels, value=first)
        self.scores, self.images = HTML(), VBox()
        judged = HTML(verdict_html(self.best))
        photos = row(_photos(run))
        super().__init__(judged, with_hints({self.slider: _HINT}), self.scores, photos, self.images)
        self.on_change(self._show, self.slider)
        self.on_change(self._remember, self.slider)
        self._show()

    @property
    def step(self) -> int:
        shown = self.slider.value
        return shown if shown in self.run.checkpoints() else self.best.step

    def _remember(self) -> None:
        chosen = {"step": self.step, "last": max(self._results)}
        write_object(self.run.folder / best_checkpoint.CHOSEN_FILE, chosen)

    def _label(self, step: int) -> str:
        # There is little room beside a slider.
        if step == self.best.step and self.best.better_than_base:
            return f"{step} ★"
        if step == 0:
            return "base"
        return str(step) if step in self.run.checkpoints() else f"{step}, view only"

    def _show(self) -> None:
        step = self.slider.value
        ratios = best_checkpoint.ratios_of(self._results[step], self._results[0])
        used = "The cells below use this step."
        if step != self.step:
            used = f"<i>View only</i>: the cells below use step {self.step}."
        shown = ", ".join(f"{name} {getattr(ratios, field):.0%}" for field, name in RATIOS.items())
        name = f"Step {step} of {html.escape(self.run.folder.name)}" if step else "The base"
        self.scores.value = f"<b>{name}</b>: {shown}. {used}"
        validation = load_images(self.run, step)
        kinds = (validation.subject, validation.class_images, validation.unrelated)
        asked = plan_of(self.run).prompts_and_seeds(self.run.config.subject)
        refill(self.images, [
            row([captioned(image, prompt, *widths)
                 for image, (prompt, _) in zip(images, pairs, strict=True)])
            for images, pairs, widths in zip(kinds, asked, _WIDTHS, strict=True)
        ])  # fmt: skip


def _photos(run: Run) -> list[VBox]:
    """Return the run's photos, to compare with; none if they are gone by now."""
    try:
        photos = read_photos(run.config.subject)[:_PHOTOS]
        small = [ImageOps.contain(image, (_PHOTO_WIDTH,) * 2) for image in Images(photos)]
    except DataError:  # a finished run needs them no more
        return []
    return [captioned(image, "your photo", _PHOTO_WIDTH, _PHOTO_WIDTH) for image in small]
