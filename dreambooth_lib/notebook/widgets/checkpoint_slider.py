"""A slider through what a run looked like on its way, its best checkpoint marked."""

from ipywidgets import HTML, SelectionSlider

from dreambooth_lib.notebook.widgets.parts import Panel, captioned, control, hinted, in_a_row
from dreambooth_lib.training import best_checkpoint
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.validation_record import history, load_images

_HINT = "early steps lack the subject, late ones draw it alone: take one that shows both"
_WIDTHS = 200, 256  # pixels on the page, of the smallest pictures and of the largest


class CheckpointSlider(Panel):
    """The looks at a run, one at a time, the best at first.

    ``step`` is the one that is shown where its weights are kept, else the best. Raises ``RunError``
    where the run has no look at a tuned model.
    """

    def __init__(self, run: Run):
        self.run, self.best = run, best_checkpoint.best_checkpoint(run)
        self._rows = {row.step: row for row in history(run)}
        labels = [(self._label(step), step) for step in self._rows]
        self.slider = control(SelectionSlider, "checkpoint", options=labels, value=self.best.step)
        self.figures, self.pictures = HTML(), in_a_row([])
        reason = HTML(f"<b>Chosen ★:</b> {self.best.reason}")
        super().__init__(reason, hinted({self.slider: _HINT}), self.figures, self.pictures)
        self.on_change(self._show, self.slider)
        self._show()

    @property
    def step(self) -> int:
        shown = self.slider.value
        return shown if shown in self.run.checkpoints() else self.best.step

    def _label(self, step: int) -> str:
        # Short: beside a slider there is little room.
        if step == self.best.step:
            return f"{step} ★"
        if step == 0:
            return "base"
        return str(step) if step in self.run.checkpoints() else f"{step}, view only"

    def _show(self) -> None:
        at = self.slider.value
        like, follows, rest = best_checkpoint.ratios_of(self._rows[at], self._rows[0])
        text = (
            f"<b>{f'Step {at}' if at else 'The base'}</b>: like your photos {like:.0%}, follows "
            f"the prompt {follows:.0%}, the rest unchanged {rest:.0%}. "
        )
        use = f"<i>View only</i>: the cells below use step {self.step} ★."
        self.figures.value = text + ("The cells below use this one." if self.step == at else use)
        seen = load_images(self.run, at)
        captions = [*seen.prompts, *[self.run.config.subject.class_prompt] * len(seen.class_images)]
        captions += ["something else"] * len(seen.unrelated)
        pictures = seen.subject + seen.class_images + seen.unrelated
        self.pictures.children = [
            captioned(picture, caption, *_WIDTHS)
            for picture, caption in zip(pictures, captions, strict=True)
        ]
