"""A slider through what a run looked like on its way, its best checkpoint marked."""

from ipywidgets import HTML, SelectionSlider

from dreambooth_lib import choice, watch
from dreambooth_lib.runs import Run
from dreambooth_lib.widgets.parts import View, captioned, control, hinted, in_a_row, on_page

_HINT = "early steps lack the subject, late ones draw it alone: take one that shows both"

_WIDTHS = 200, 256  # pixels on the page, of the smallest pictures and of the largest


class CheckpointSlider(View):
    """The looks at a run, one at a time, the best at first.

    ``step`` is the one that is shown where its weights are kept, else the best. Raises ``RunError``
    where the run has no look at a tuned model.
    """

    def __init__(self, run: Run):
        self.run, self.best = run, choice.best_checkpoint(run)
        self._rows = {row.step: row for row in watch.history(run)}
        options = [(self._label(step), step) for step in self._rows]
        self.slider = control(SelectionSlider, "checkpoint", options=options, value=self.best.step)
        self.figures, self.pictures = HTML(), in_a_row([])
        reason = HTML(f"<b>Chosen ★:</b> {self.best.reason}")
        super().__init__(reason, hinted({self.slider: _HINT}), self.figures, self.pictures)
        self.slider.observe(self.callback(self._show), "value")
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
        seen = watch.drawn(self.run, at)
        fidelity, adherence, kept = choice.shares_of(self._rows[at], self._rows[0])
        use = "The cells below use this one."
        if self.step != at:
            use = f"<i>View only</i>: the cells below use step {self.step} ★."
        self.figures.value = (
            f"<b>{f'Step {at}' if at else 'The base'}</b>: subject fidelity {fidelity:.0%} of the "
            f"photos' own, prompt adherence {adherence:.0%} of the base's, class kept {kept:.0%}. "
            f"{use}"
        )
        captions = [*seen.prompts, *[self.run.config.subject.class_prompt] * len(seen.of_class)]
        captions += ["something else"] * len(seen.unrelated)
        pictures = seen.subject + seen.of_class + seen.unrelated
        self.pictures.children = [
            captioned(picture, caption, on_page(picture, *_WIDTHS))
            for picture, caption in zip(pictures, captions, strict=True)
        ]
