"""Draw prompts by two models side by side: base and tuned, or any two."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipywidgets import HTML, Button, Dropdown, FloatSlider, IntSlider, IntText, Text, VBox

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.notebook.widgets.parts import Panel, busy, captioned, control, row, with_hints
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import Sample, fill, inference_settings, load_source, sample

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

_WIDTHS = 256, 480  # smallest and largest width of an image on the page, in pixels

#: What draws: a run, a base, a config for its base, or a run with the step of a checkpoint.
Source = Run | TrainConfig | str | tuple[Run, int]

#: The models of the last playground that drew. A notebook keeps every playground that a cell ever
#: made, so that models held by each would stay in memory.
_LOADED: "dict[Source, Family]" = {}


def release_models() -> None:
    """Free the models that playgrounds have loaded."""
    _LOADED.clear()
    gpu_memory.free_memory()


@dataclass(frozen=True)
class GalleryEntry:
    """A prompt with its settings, and the images that each model drew, seed by seed."""

    prompt: str
    negative_prompt: str
    guidance_scale: float
    inference_steps: int
    images: dict[str, list[Sample]]  #: by the source's name, the left one first


class Playground(Panel):
    """Two models that draw the same prompt with the same seeds; ``gallery`` keeps every entry.

    Only the two chosen sources are in memory. Inference steps and guidance scale begin at those of
    the first source, as :func:`sampling.inference_settings` returns them.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        subject: Subject,
        prompt: str = "",
        guidance_scale: float | None = None,
    ):
        release_models()
        self._sources, self._subject = dict(sources), subject
        self.gallery: list[GalleryEntry] = []
        names, first = list(sources), next(iter(sources.values()))
        defaults = inference_settings(first[0] if isinstance(first, tuple) else first)
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        self.left = control(Dropdown, "left", options=names, value=names[0])
        self.right = control(Dropdown, "right", options=names, value=names[-1])
        self.prompt = control(Text, "prompt", value=prompt or f"a {{}} {subject.class_noun}")
        self.negative_prompt = control(Text, "negative prompt", value="")
        self.seed = control(IntText, "seed", value=0)
        self.count = control(IntSlider, "images", value=1, min=1, max=8)
        self.guidance = control(FloatSlider, "guidance scale", value=scale, min=0, max=15,
                                step=0.25)  # fmt: skip
        self.steps = control(IntSlider, "inference steps", value=defaults.steps, min=1, max=100)
        self.button = Button(description="Draw", button_style="primary")
        self.advice, self.entries = HTML(), VBox([])
        hints = {
            self.left: "the model on the left",
            self.right: "the model on the right, with the same seeds",
            self.prompt: "write {} for your subject's identifier, e.g. "
            f"a {{}} {subject.class_noun} in the snow",
            self.negative_prompt: "what the image should not show; may be empty",
            self.seed: "the same seed draws the same image again",
            self.count: "one for each seed, counting up from the seed above",
            self.guidance: "raise it if images ignore the prompt; lower it if they look harsh",
            self.steps: f"more give finer images but take longer; {defaults.fewest_steps} are "
            "enough",
            self.button: "images appear below, the newest first",
        }
        super().__init__(with_hints(hints), self.advice, self.entries)
        self.button.on_click(self.callback(self.draw))
        self.on_change(self._advise, self.prompt)
        self._advise()

    def _advise(self) -> None:
        prompt, subject = self.prompt.value, self._subject
        named = "{}" in prompt or subject.identifier in prompt.split()
        example = html.escape(f"a {{}} {subject.class_noun} ...")
        text = f"This prompt does not name your subject: write <code>{example}</code>."
        self.advice.value = "" if named else text

    def draw(self) -> GalleryEntry:
        """Draw what the fields ask for; show and keep it. Raises as ``sample`` does."""
        sources = {name: self._sources[name] for name in (self.left.value, self.right.value)}
        prompt, first = fill(self.prompt.value, self._subject), self.seed.value
        seeds = list(range(first, first + self.count.value))
        steps, scale, negative = self.steps.value, self.guidance.value, self.negative_prompt.value
        options: dict[str, Any] = {"steps": steps, "guidance_scale": scale,
                                   "negative_prompt": negative}  # fmt: skip
        with busy(self.button):
            _load(list(sources.values()))
            images = {
                name: sample(_LOADED[source], [prompt], seeds, **options)
                for name, source in sources.items()
            }
        entry = GalleryEntry(prompt, negative, scale, steps, images)
        self.gallery.append(entry)
        self.entries.children = [_show_entry(entry), *self.entries.children]
        return entry


def compare_with_base(run: Run, step: int | None = None) -> Playground:
    """Make a playground of the base and a run, at its end or at the checkpoint of ``step``.

    For other pairs, such as checkpoints or the runs of a study, make a :class:`Playground`.
    """
    sources: dict[str, Source] = {"base": run.config, "tuned": run if step is None else (run, step)}
    subject = run.config.subject
    return Playground(sources, subject, f"a {{}} {subject.class_noun} on the beach")


def _load(sources: list[Source]) -> None:
    """Load what is not loaded yet, after freeing everything else."""
    for source in set(_LOADED) - set(sources):
        del _LOADED[source]
    gpu_memory.free_memory()
    for source in sources:
        if source not in _LOADED:
            _LOADED[source] = load_source(*(source if isinstance(source, tuple) else (source,)))


def _show_entry(entry: GalleryEntry) -> VBox:
    without = f", without “{entry.negative_prompt}”" if entry.negative_prompt else ""
    prompt = html.escape(f"“{entry.prompt}”{without}")
    settings = f"guidance scale {entry.guidance_scale:g}, {entry.inference_steps} inference steps"
    images = [
        captioned(drawn.image, f"{name}, seed {drawn.seed}", *_WIDTHS)
        for pair in zip(*entry.images.values(), strict=True)
        for name, drawn in zip(entry.images, pair, strict=True)
    ]
    return VBox([HTML(f"<b>{prompt}</b> <small>{settings}</small>"), row(images)])
