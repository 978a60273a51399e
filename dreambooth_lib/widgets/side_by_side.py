"""Pictures of one's own prompts from two models at once: base and tuned, or any two."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ipywidgets import HTML, Button, Dropdown, FloatSlider, IntSlider, IntText, Text, VBox

from dreambooth_lib import memory
from dreambooth_lib.config import Subject, TrainConfig
from dreambooth_lib.runs import Run
from dreambooth_lib.sampling import Sample, fill, inference_of, load_source, sample
from dreambooth_lib.widgets.parts import View, captioned, control, hinted, in_a_row, on_page

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

_WIDTHS = 256, 480  # pixels on the page, of the smallest pictures and of the largest

#: What draws: a run, a base, a config for its base, or a run with the step of a checkpoint of its.
Source = Run | TrainConfig | str | tuple[Run, int]

#: What the last view to draw has loaded. A notebook keeps each view that a cell ever made, so that
#: what a view held itself would stay in memory.
_LOADED: "dict[Source, Family]" = {}


def release() -> None:
    """Let go of the models that views have loaded."""
    _LOADED.clear()
    memory.free()


@dataclass(frozen=True)
class Drawn:
    """One entry of a gallery: what was asked, and what each side made of it, seed by seed."""

    prompt: str
    negative_prompt: str
    guidance_scale: float
    steps: int
    pictures: dict[str, list[Sample]]  #: by the source's name, the left one first


class SideBySide(View):
    """Two of some sources draw the same prompts with the same seeds; all is kept in ``gallery``.

    Only the two that are chosen are held in memory. Steps and guidance are at first those of the
    first source, as :func:`sampling.inference_of` has them.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        subject: Subject,
        prompt: str = "",
        guidance_scale: float | None = None,
    ):
        release()
        self._sources, self._subject = dict(sources), subject
        self.gallery: list[Drawn] = []
        names, first = list(sources), next(iter(sources.values()))
        own = inference_of(first[0] if isinstance(first, tuple) else first)
        scale = own.guidance_scale if guidance_scale is None else guidance_scale
        self.left = control(Dropdown, "left", options=names, value=names[0])
        self.right = control(Dropdown, "right", options=names, value=names[-1])
        self.prompt = control(Text, "prompt", value=prompt or f"a {{}} {subject.class_noun}")
        self.negative_prompt = control(Text, "negative prompt", value="")
        self.seed = control(IntText, "seed", value=0)
        self.count = control(IntSlider, "pictures", value=1, min=1, max=8)
        self.guidance = control(FloatSlider, "guidance", value=scale, min=0, max=15, step=0.25)
        self.steps = control(IntSlider, "drawing steps", value=own.steps, min=1, max=100)
        self.button = Button(description="Draw", button_style="primary")
        self.advice, self.entries = HTML(), VBox([])
        super().__init__(
            hinted({
                self.left: "what draws on the left",
                self.right: "what draws on the right, with the same seeds",
                self.prompt: "write {} where your subject's secret word goes, e.g. "
                f"a {{}} {subject.class_noun} in the snow",
                self.negative_prompt: "what should not be seen; empty is fine",
                self.seed: "the noise to start from: the same number draws the same picture again",
                self.count: "one a seed, from this seed on",
                self.guidance: "raise it when the prompt is ignored; lower it when all looks harsh",
                self.steps: f"more give finer pictures but take longer; {own.enough} are enough",
                self.button: "pictures come below, the newest first",
            }),
            self.advice,
            self.entries,
        )  # fmt: skip
        self.button.on_click(self.callback(self.draw))
        self.prompt.observe(self.callback(self._advise), "value")
        self._advise()

    def _advise(self) -> None:
        prompt, subject = self.prompt.value, self._subject
        named = "{}" in prompt or subject.identifier in prompt.split()
        example = html.escape(f"a {{}} {subject.class_noun} ...")
        text = f"This prompt does not name your subject: write <code>{example}</code>."
        self.advice.value = "" if named else text

    def draw(self) -> Drawn:
        """Draw what the fields ask for, and show and keep it. Raises as ``sample`` does."""
        names = dict.fromkeys((self.left.value, self.right.value))
        prompt = fill(self.prompt.value, self._subject)
        seeds = [self.seed.value + number for number in range(self.count.value)]
        self.button.disabled = True
        try:
            loaded = self._load(list(names))
            pictures = {
                name: sample(
                    loaded[name],
                    [prompt],
                    seeds,
                    steps=self.steps.value,
                    guidance_scale=self.guidance.value,
                    negative_prompt=self.negative_prompt.value,
                )
                for name in names
            }
        finally:
            self.button.disabled = False
        drawn = Drawn(prompt, self.negative_prompt.value, self.guidance.value, self.steps.value,
                      pictures)  # fmt: skip
        self.gallery.append(drawn)
        self.entries.children = [_entry(drawn), *self.entries.children]
        return drawn

    def _load(self, names: list[str]) -> "dict[str, Family]":
        wanted = {name: self._sources[name] for name in names}
        for source in set(_LOADED) - set(wanted.values()):
            del _LOADED[source]
        memory.free()
        for source in wanted.values():
            if source not in _LOADED:
                given = source if isinstance(source, tuple) else (source,)
                _LOADED[source] = load_source(*given)
        return {name: _LOADED[source] for name, source in wanted.items()}


def playground(run: Run, at: int | None = None) -> SideBySide:
    """The base beside a run, as it ended or as it was at a checkpoint.

    Other pairs, such as checkpoints or a study's cells, are :class:`SideBySide` of their own.
    """
    config, subject = run.config, run.config.subject
    sources: dict[str, Source] = {"base": config, "tuned": run if at is None else (run, at)}
    prompt = f"a {{}} {subject.class_noun} on the beach"
    return SideBySide(sources, subject, prompt)


def _entry(drawn: Drawn) -> VBox:
    without = f", without “{drawn.negative_prompt}”" if drawn.negative_prompt else ""
    asked = f"“{drawn.prompt}”{without}"
    settings = f"guidance {drawn.guidance_scale:g}, {drawn.steps} steps"
    pairs = [
        captioned(made.image, f"{name}, seed {made.seed}", on_page(made.image, *_WIDTHS))
        for of_seed in zip(*drawn.pictures.values(), strict=True)
        for name, made in zip(drawn.pictures, of_seed, strict=True)
    ]
    title = HTML(f"<b>{html.escape(asked)}</b> <small>{settings}</small>")
    return VBox([title, in_a_row(pairs)])
