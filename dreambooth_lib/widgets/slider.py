"""A slider through what a run looked like on its way, its best checkpoint marked."""

from ipywidgets import HTML, SelectionSlider

from dreambooth_lib import choice, watch
from dreambooth_lib.runs import Run
from dreambooth_lib.widgets.parts import View, captioned, control, hinted, in_a_row

_HINT = "early steps lack the subject, late ones draw it alone: take one that shows both"


class CheckpointSlider(View):
    """The looks at a run, one at a time; ``step`` is the one that is shown, the best at first.

    Of a look whose checkpoint is not kept, and of the base's, there are pictures only: ``step`` is
    the best one's then, and the panel says so. Raises ``RunError`` where the run has no look at a
    tuned model.
    """

    def __init__(self, run: Run):
        self.run, self.best = run, choice.best_checkpoint(run)
        self._rows = {row.step: row for row in watch.history(run)}
        # Short labels: beside a slider there is little room.
        marks = {0: "base", self.best.step: f"{self.best.step} ★"}
        options = [(marks.get(step, str(step)), step) for step in self._rows]
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

    def _show(self) -> None:
        shown = self.slider.value
        seen = watch.drawn(self.run, shown)
        fidelity, adherence, kept = choice.shares_of(self._rows[shown], self._rows[0])
        weights = "Its weights are kept."
        if shown != self.step:
            weights = f"It can only be looked at; what follows takes ★, step {self.best.step}."
        name = f"Step {shown}" if shown else "The base"
        self.figures.value = (
            f"<b>{name}</b>: {fidelity:.0%} as close to the photos as those to each other, follows "
            f"prompts {adherence:.0%} as well as the base, leaves {kept:.0%} of the rest as it "
            f"was. {weights}"
        )
        captions = [*seen.prompts, *[self.run.config.subject.class_prompt] * len(seen.of_class)]
        captions += ["something else"] * len(seen.unrelated)
        pictures = seen.subject + seen.of_class + seen.unrelated
        self.pictures.children = [
            captioned(picture, caption, 200)
            for picture, caption in zip(pictures, captions, strict=True)
        ]
