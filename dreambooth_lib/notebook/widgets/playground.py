"""Draw prompts by two models side by side: base and tuned, or any two."""

import html
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipywidgets import (
    HTML,
    Button,
    Dropdown,
    FloatSlider,
    HBox,
    IntProgress,
    IntSlider,
    IntText,
    Layout,
    Text,
    VBox,
)

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import replacing_file
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.user_text import short_path
from dreambooth_lib.figures import png_text
from dreambooth_lib.notebook.widgets.loaded_models import (
    LOADED,
    Source,
    load,
    load_together,
    release_models,
)
from dreambooth_lib.notebook.widgets.parts import (
    Panel,
    busy,
    captioned,
    control,
    refill,
    with_hints,
)
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import Sample, fill, inference_settings, sample
from dreambooth_lib.training.trainable import drawing_config

_WIDTHS = 256, 480  # smallest and largest width of an image on the page, in pixels
_SEEDS = 2**31  # that are drawn at random are below this
#: Fields that a new playground takes over from the one before it.
_KEPT = "prompt", "negative_prompt", "seed", "count"


@dataclass(frozen=True)
class GalleryEntry:
    """A prompt with its settings, and the images that each model drew, seed by seed."""

    prompt: str
    negative_prompt: str
    guidance_scale: float
    inference_steps: int
    images: dict[str, list[Sample]]  #: by the source's name, the left one first
    samplers: dict[str, str] = field(default_factory=dict)  #: A1111's names of them, by the source

    def text(self, name: str, drawn: Sample) -> str:
        """Return how an image was generated, as A1111 reads it from a PNG."""
        return png_text.generation_text(
            self.prompt,
            self.negative_prompt,
            seed=drawn.seed,
            steps=self.inference_steps,
            guidance_scale=self.guidance_scale,
            size=drawn.image.size,
            sampler=self.samplers.get(name, "unknown"),
            model=name,
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write the images as PNGs that hold their settings; return their paths, left one first.

        No file is overwritten. Raises ``DiskError`` where the folder cannot be written.
        """
        folder = Path(folder)
        number = 1 + max(
            (int(p.stem[:4]) for p in folder.glob("[0-9][0-9][0-9][0-9]-*")), default=0
        )
        paths = []
        for name, samples in self.images.items():
            short = re.sub(r"[^\w-]+", "-", name).strip("-")
            for drawn in samples:
                paths.append(folder / f"{number:04d}-{short}-seed{drawn.seed}.png")
                info = png_text.png_info(self.text(name, drawn))
                with replacing_file(paths[-1]) as partial:
                    drawn.image.save(partial, "PNG", pnginfo=info)
        return paths


class Playground(Panel):
    """Two models that draw the same prompt with the same seeds; ``gallery`` keeps every entry.

    Only the two chosen sources are in memory. Inference steps and guidance scale begin at those of
    the first source, as :func:`sampling.inference_settings` returns them. A playground made from an
    ``earlier`` one takes over its gallery and fields, but those two only on the same base. Images
    are saved in ``folder``.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        subject: Subject,
        prompt: str = "",
        earlier: "Playground | None" = None,
        folder: str | Path = "images",
    ):
        release_models()
        self._sources, self._subject, self._folder = dict(sources), subject, Path(folder)
        self.gallery: list[GalleryEntry] = []
        names, first = list(sources), next(iter(sources.values()))
        drawn = first[0] if isinstance(first, tuple) else first
        defaults, self._base = inference_settings(drawn), _base_of(drawn)
        self.left = control(Dropdown, "left", options=names, value=names[0])
        self.right = control(Dropdown, "right", options=names, value=names[-1])
        self.prompt = control(Text, "prompt", value=prompt or f"a {{}} {subject.class_noun}")
        self.negative_prompt = control(Text, "negative prompt", value="")
        for wide in (self.prompt, self.negative_prompt):
            wide.layout.width = "46em"
        self.seed = control(IntText, "seed", value=0)
        self.count = control(IntSlider, "images", value=1, min=1, max=8)
        self.guidance = control(FloatSlider, "guidance scale", value=defaults.guidance_scale,
                                min=0, max=15, step=0.25)  # fmt: skip
        self.steps = control(IntSlider, "inference steps", value=defaults.steps, min=1, max=100)
        self.button = Button(description="Generate", button_style="primary")
        self.new_seed = Button(description="Generate with a new seed", icon="random")
        self.new_seed.layout.width = "auto"
        self.progress, self.progress_text = IntProgress(min=0), HTML()
        self._drawing = HBox([self.progress, self.progress_text])
        self._drawing.layout.display = "none"
        self.advice, self.entries = HTML(), VBox([])
        hints = {
            self.left: "the model on the left",
            self.right: "the model on the right, with the same seeds",
            self.prompt: "write {} for your subject's identifier, e.g. "
            f"a {{}} {subject.class_noun} in the snow",
            self.negative_prompt: "what the image should not show; may be empty; ignored by "
            "Flux.1, by some distilled models and when guidance is off",
            self.seed: "the same seed gives the same image again",
            self.count: "one for each seed, counting up from the seed above",
            self.guidance: "raise it if images ignore the prompt; lower it if they look harsh",
            self.steps: f"more give finer images but take longer; {defaults.fewest_steps} are "
            "enough",
        }
        buttons = HBox([self.button, self.new_seed, HTML(
            "<small>images appear below, the newest first</small>")],
            layout=Layout(flex_flow="row wrap", align_items="center"))  # fmt: skip
        super().__init__(with_hints(hints), buttons, self._drawing, self.advice, self.entries)
        self.button.on_click(self.callback(self.draw))
        self.new_seed.on_click(self.callback(self._draw_anew))
        self.on_change(self._advise, self.prompt)
        if earlier is not None:
            self._go_on_from(earlier)
        self._advise()

    def _go_on_from(self, earlier: "Playground") -> None:
        """Take over what an earlier playground of the same subject shows and has drawn."""
        if earlier._subject != self._subject:
            return
        settings = ("guidance", "steps") if earlier._base == self._base else ()
        for name in _KEPT + settings:
            getattr(self, name).value = getattr(earlier, name).value
        for entry in earlier.gallery:
            self._keep(entry)
        refill(earlier.entries)

    def _advise(self) -> None:
        prompt, subject = self.prompt.value, self._subject
        named = "{}" in prompt or subject.identifier in prompt.split()
        example = html.escape(f"a {{}} {subject.class_noun} in the snow")
        text = f"This prompt does not name your subject: write <code>{example}</code>."
        self.advice.value = "" if named else text

    def _draw_anew(self) -> None:
        self.seed.value = secrets.randbelow(_SEEDS)
        self.draw()

    def draw(self) -> GalleryEntry:
        """Draw what the fields ask for; show and keep it. Raises as ``sample`` does."""
        sources = {name: self._sources[name] for name in (self.left.value, self.right.value)}
        prompt, first = fill(self.prompt.value, self._subject), self.seed.value
        seeds = list(range(first, first + self.count.value))
        steps, scale, negative = self.steps.value, self.guidance.value, self.negative_prompt.value
        how: dict[str, Any] = {"steps": steps, "guidance_scale": scale}
        images: dict[str, list[Sample]] = {name: [] for name in sources}
        with busy(self.button), busy(self.new_seed), self._progress(len(seeds) * len(sources)):
            load_together(sources.values(), [prompt, negative])
            samplers, read = dict[str, str](), False
            for name, source in sources.items():
                load(source, [prompt, negative])
                batch = LOADED[source].default_batch_size
                for start in range(0, len(seeds), batch):
                    part = seeds[start : start + batch]
                    images[name] += sample(
                        LOADED[source], [prompt], part, negative_prompt=negative, **how
                    )
                    self._count(len(part))
                samplers[name] = png_text.sampler_name(LOADED[source].scheduler())
                read |= LOADED[source].reads_negative(scale)
        entry = GalleryEntry(prompt, negative if read else "", scale, steps, images, samplers)
        self._keep(entry)
        return entry

    @contextmanager
    def _progress(self, images: int) -> Iterator[None]:
        """Show a bar of this many images meanwhile."""
        self.progress.max, self.progress.value = images, 0
        self.progress_text.value, self._drawing.layout.display = "Loading the models…", ""
        try:
            yield
        finally:
            self._drawing.layout.display = "none"

    def _count(self, images: int) -> None:
        self.progress.value += images
        self.progress_text.value = f"{self.progress.value} of {self.progress.max} images"

    def _keep(self, entry: GalleryEntry) -> None:
        self.gallery.append(entry)
        save = Button(description="Save these images", icon="save", layout=Layout(width="auto"))
        saved = HTML()

        def write() -> None:
            names = ", ".join(html.escape(path.name) for path in entry.save(self._folder))
            place = html.escape(short_path(self._folder))
            saved.value = f"<small>Saved in {place}: {names}.</small>"

        save.on_click(self.callback(write))
        shown = _show_entry(entry)
        shown.children = [*shown.children, HBox([save, saved])]
        self.entries.children = [shown, *self.entries.children]


def compare_with_base(
    run: Run, step: int | None = None, earlier: Playground | None = None
) -> Playground:
    """Make a playground of the base and a run, at its end or at the checkpoint of ``step``.

    It goes on with the gallery of an ``earlier`` one. For other pairs, such as checkpoints or the
    runs of a study, make a :class:`Playground`.
    """
    at = step or max(run.checkpoints(), default=None)
    # Never "base" alone, which a run may be called.
    tuned = f"{run.folder.name}, {'tuned' if at is None else f'step {at}'}"
    sources: dict[str, Source] = {"base": run.config, tuned: run if step is None else (run, step)}
    subject = run.config.subject
    folder = Path("images") / run.folder.name
    prompt = f"a {{}} {subject.class_noun} on the beach"
    return Playground(sources, subject, prompt, earlier=earlier, folder=folder)


def _base_of(source: Run | TrainConfig | str) -> str:
    """Return the base that a source draws with."""
    config = source.config if isinstance(source, Run) else source
    return config if isinstance(config, str) else drawing_config(config).base


def _show_entry(entry: GalleryEntry) -> VBox:
    away = f", negative prompt “{entry.negative_prompt}”" if entry.negative_prompt else ""
    prompt = html.escape((f"“{entry.prompt}”" if entry.prompt else "No prompt") + away)
    settings = f"guidance scale {entry.guidance_scale:g}, {entry.inference_steps} inference steps"
    pairs = []
    for samples in zip(*entry.images.values(), strict=True):  # a row for each seed
        columns = []
        for name, drawn in zip(entry.images, samples, strict=True):
            # What a browser saves of the page holds the settings, too.
            info = png_text.png_info(entry.text(name, drawn))
            caption = f"{name}, seed {drawn.seed}"
            columns.append(captioned(drawn.image, caption, *_WIDTHS, pnginfo=info))
            columns[-1].layout.min_width = "0"  # shrinks on a narrow page, and stays beside
        pairs.append(HBox(columns))
    return VBox([HTML(f"<b>{prompt}</b> <small>{settings}</small>"), *pairs])
