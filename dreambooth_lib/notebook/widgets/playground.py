"""Pictures of one's own prompts from two models at once: base and tuned, or any two."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipywidgets import HTML, Button, Dropdown, FloatSlider, IntSlider, IntText, Text, VBox

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.notebook.widgets.parts import Panel, busy, captioned, control, hinted, in_a_row
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import Sample, fill, inference_settings, load_source, sample

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
    gpu_memory.free_memory()


@dataclass(frozen=True)
class Drawn:
    """One entry of a gallery: what was asked, and what each side made of it, seed by seed."""

    prompt: str
    negative_prompt: str
    guidance_scale: float
    steps: int
    pictures: dict[str, list[Sample]]  #: by the source's name, the left one first


class SideBySide(Panel):
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
        own = inference_settings(first[0] if isinstance(first, tuple) else first)
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
        hints = {
            self.left: "what draws on the left",
            self.right: "what draws on the right, with the same seeds",
            self.prompt: "write {} where your subject's secret word goes, e.g. "
            f"a {{}} {subject.class_noun} in the snow",
            self.negative_prompt: "what should not be seen; empty is fine",
            self.seed: "the noise to start from: the same number draws the same picture again",
            self.count: "one a seed, from this seed on",
            self.guidance: "raise it when the prompt is ignored; lower it when all looks harsh",
            self.steps: f"more give finer pictures but take longer; {own.fewest_steps} are enough",
            self.button: "pictures come below, the newest first",
        }
        super().__init__(hinted(hints), self.advice, self.entries)
        self.button.on_click(self.callback(self.draw))
        self.on_change(self._advise, self.prompt)
        self._advise()

    def _advise(self) -> None:
        prompt, subject = self.prompt.value, self._subject
        named = "{}" in prompt or subject.identifier in prompt.split()
        example = html.escape(f"a {{}} {subject.class_noun} ...")
        text = f"This prompt does not name your subject: write <code>{example}</code>."
        self.advice.value = "" if named else text

    def draw(self) -> Drawn:
        """Draw what the fields ask for, and show and keep it. Raises as ``sample`` does."""
        sources = {name: self._sources[name] for name in (self.left.value, self.right.value)}
        prompt, first = fill(self.prompt.value, self._subject), self.seed.value
        seeds = list(range(first, first + self.count.value))
        steps, scale, without = self.steps.value, self.guidance.value, self.negative_prompt.value
        how: dict[str, Any] = {"steps": steps, "guidance_scale": scale, "negative_prompt": without}
        with busy(self.button):
            _load(list(sources.values()))
            pictures = {
                name: sample(_LOADED[source], [prompt], seeds, **how)
                for name, source in sources.items()
            }
        drawn = Drawn(prompt, without, scale, steps, pictures)
        self.gallery.append(drawn)
        self.entries.children = [_entry(drawn), *self.entries.children]
        return drawn


def playground(run: Run, at: int | None = None) -> SideBySide:
    """Show the base beside a run, as it ended or as it was at a checkpoint.

    Other pairs, such as checkpoints or a study's cells, are :class:`SideBySide` of their own.
    """
    sources: dict[str, Source] = {"base": run.config, "tuned": run if at is None else (run, at)}
    subject = run.config.subject
    return SideBySide(sources, subject, f"a {{}} {subject.class_noun} on the beach")


def _load(sources: list[Source]) -> None:
    """Load what is not loaded yet, once all else is gone."""
    for source in set(_LOADED) - set(sources):
        del _LOADED[source]
    gpu_memory.free_memory()
    for source in sources:
        if source not in _LOADED:
            given = source if isinstance(source, tuple) else (source,)
            _LOADED[source] = load_source(*given)


def _entry(drawn: Drawn) -> VBox:
    without = f", without “{drawn.negative_prompt}”" if drawn.negative_prompt else ""
    asked = html.escape(f"“{drawn.prompt}”{without}")
    settings = f"guidance {drawn.guidance_scale:g}, {drawn.steps} steps"
    pairs = [
        captioned(made.image, f"{name}, seed {made.seed}", *_WIDTHS)
        for of_seed in zip(*drawn.pictures.values(), strict=True)
        for name, made in zip(drawn.pictures, of_seed, strict=True)
    ]
    return VBox([HTML(f"<b>{asked}</b> <small>{settings}</small>"), in_a_row(pairs)])
