"""What the panels share: errors that are shown and kept, controls with hints, pictures."""

import html
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipywidgets import HTML, Button, HBox, Image, Layout, VBox

from dreambooth_lib.core import gpu_memory

#: Jupyter's own red, in its dark theme too; the classic Notebook has none. Lines may be long.
_RED = "color: var(--jp-error-color1, #c62828); line-height: 1.4; white-space: normal"


class Panel(VBox):
    """A column of widgets whose callbacks show an error on top, as a red sentence, and keep it.

    What one callback failed at stays until that one succeeds, whatever other fields do meanwhile.
    """

    def __init__(self, *children: Any):
        self.errors: dict[Any, Exception] = {}  #: by the callback that failed
        self.note = HTML(layout=Layout(display="none"))
        super().__init__([self.note, *children])

    def check(self) -> None:
        """Raise the first error that stands, if there is one."""
        for error in self.errors.values():
            raise error

    def fail(self, error: Exception, act: Any = None) -> None:
        """Show an error and keep it, as that of ``act``."""
        gpu_memory.clear_frames(error)
        self.errors[act] = error
        self._tell()

    def mend(self, *acts: Any) -> None:
        """Drop the errors of these callbacks, without any those of all."""
        for act in acts or list(self.errors):
            self.errors.pop(act, None)
        self._tell()

    def _tell(self) -> None:
        errors = dict.fromkeys(self.errors.values())  # two callbacks may have failed at one
        texts = [f"<b>⚠ {html.escape(sentence(error))}</b>" for error in errors]
        self.note.value = f'<div style="{_RED}">{"<br>".join(texts)}</div>' if texts else ""
        self.note.layout.display = "" if texts else "none"

    def callback(self, act: Callable[[], Any]) -> Callable[[Any], None]:
        """Wrap ``act`` for a widget, which would hide its error or show a traceback."""

        def call(_event: Any) -> None:
            self.mend(act)
            try:
                act()
            except Exception as error:  # whatever it is, check() raises it
                self.fail(error, act)

        return call

    def on_change(self, act: Callable[[], Any], *fields: Any) -> None:
        """Call ``act`` whenever one of the fields has another value."""
        for field in fields:
            field.observe(self.callback(act), "value")


def sentence(error: Exception) -> str:
    """Return what a reader is told of an error; those that are not the kit's with their kind."""
    known = type(error) is ValueError or type(error).__module__.startswith("dreambooth_lib.")
    return str(error) if known else f"{type(error).__name__}: {error}"


def control(kind: type, description: str, **traits: Any) -> Any:
    """Make a labelled control; a slider and a text report when they are let go of."""
    if "continuous_update" in kind.class_trait_names():  # type: ignore[attr-defined]
        traits["continuous_update"] = False
    style = {"description_width": "9em"}
    return kind(description=description, style=style, layout=Layout(width="32em"), **traits)


def hinted(controls: Mapping[Any, str]) -> VBox:
    """Lay out controls below each other, each beside one line that says what to do when."""
    row = Layout(flex_flow="row wrap", align_items="center")
    hints = [HTML(f"<small>{html.escape(hint)}</small>") for hint in controls.values()]
    return VBox([HBox(pair, layout=row) for pair in zip(controls, hints, strict=True)])


@contextmanager
def busy(button: Button) -> Iterator[None]:
    """Keep a button from being pressed again meanwhile."""
    button.disabled = True
    try:
        yield
    finally:
        button.disabled = False


def from_here(path: str | Path) -> str:
    """Return a path as it is said to the reader: what lies in this folder is named from here."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _png(save: Callable[..., Any]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, format="png")
    return buffer.getvalue()


def blank() -> Image:
    """Make a place for a page or a figure, hidden until :func:`show` fills it."""
    layout = Layout(max_width="100%", align_self="flex-start", display="none")
    return Image(format="png", layout=layout)


def show(place: Image, save: Callable[..., Any]) -> None:
    """Show what a PIL picture's ``save`` or a figure's ``savefig`` writes."""
    place.value = _png(save)
    place.layout.display = ""


def captioned(picture: Any, caption: str, least: int, most: int) -> VBox:
    """Lay out a PIL picture, as wide as it is within these pixels, over a line of text."""
    width = max(least, min(most, picture.width))
    shown = Image(value=_png(picture.save), format="png", width=width)
    shown.layout.margin = "0"
    text = HTML(f'<div style="line-height: 1.3"><small>{html.escape(caption)}</small></div>')
    return VBox([shown, text], layout=Layout(width=f"{width}px", margin="0 8px 8px 0"))


def in_a_row(boxes: list[Any]) -> HBox:
    """Lay out boxes in a row, on more lines where the page is narrow."""
    return HBox(boxes, layout=Layout(flex_flow="row wrap"))
