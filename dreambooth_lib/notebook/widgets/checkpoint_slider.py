"""Slide through the validations of a run, with the best checkpoint marked."""

import html

from ipywidgets import HTML, SelectionSlider

from dreambooth_lib.notebook.widgets.parts import Panel, captioned, control, row, with_hints
from dreambooth_lib.training import best_checkpoint
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.validation_record import history, load_images, plan_of

_HINT = "early steps lack the subject, late ones ignore the prompt: choose one that shows both"
_WIDTHS = 200, 256  # smallest and largest width of an image on the page, in pixels


class CheckpointSlider(Panel):
    """The validation images of a run, one step at a time, beginning with the best.

    ``step`` is the step shown if its weights are saved, else the best. Raises ``RunError`` if the
    run has no validation of a trained model.
    """

    def __init__(self, run: Run):
        self.run, self.best = run, best_checkpoint.best_checkpoint(run)
        self._results = {result.step: result for result in history(run)}
        labels = [(self._label(step), step) for step in self._results]
        self.slider = control(SelectionSlider, "checkpoint", options=labels, value=self.best.step)
        self.scores, self.images = HTML(), row([])
        reason = HTML(f"<b>Chosen ★:</b> {html.escape(self.best.reason)}")
        super().__init__(reason, with_hints({self.slider: _HINT}), self.scores, self.images)
        self.on_change(self._show, self.slider)
        self._show()

    @property
    def step(self) -> int:
        shown = self.slider.value
        return shown if shown in self.run.checkpoints() else self.best.step

    def _label(self, step: int) -> str:
        # There is little room beside a slider.
        if step == self.best.step:
            return f"{step} ★"
        if step == 0:
            return "base"
        return str(step) if step in self.run.checkpoints() else f"{step}, view only"

    def _show(self) -> None:
        step = self.slider.value
        like, follows, rest = best_checkpoint.ratios_of(self._results[step], self._results[0])
        used = "The cells below use this step."
        if step != self.step:
            used = f"<i>View only</i>: the cells below use step {self.step} ★."
        self.scores.value = (
            f"<b>{f'Step {step}' if step else 'The base'}</b>: likeness to the photos {like:.0%}, "
            f"follows the prompt {follows:.0%}, the rest unchanged {rest:.0%}. {used}"
        )
        validation = load_images(self.run, step)
        images = validation.subject + validation.class_images + validation.unrelated
        prompts = plan_of(self.run).prompts(self.run.config.subject)
        self.images.children = [
            captioned(image, prompt, *_WIDTHS)
            for image, prompt in zip(images, prompts, strict=True)
        ]
