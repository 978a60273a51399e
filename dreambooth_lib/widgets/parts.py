"""What the views share: errors that are shown and kept, hints, pictures."""

import html
import io
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from ipywidgets import HTML, HBox, Image, Layout, VBox

#: For a control's ``style`` and ``layout``: labels and controls in columns.
STYLE = {"description_width": "9em"}
WIDE = "32em"


def quiet() -> None:
    """Keep what diffusers and transformers say and show of themselves out of the notebook.

    Their errors, and downloads from the Hub, still show.
    """
    for library in ("diffusers", "transformers"):
        logging = import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


class View(VBox):
    """A column of widgets whose callbacks show an error as a sentence and keep it."""

    def __init__(self, *children: Any):
        self._errors: dict[Any, Exception] = {}
        self.note = HTML()
        super().__init__([*children, self.note])

    @property
    def error(self) -> Exception | None:
        """Of a callback that failed and was not called again since, the first of several."""
        return next(iter(self._errors.values()), None)

    def check(self) -> None:
        """Raise that error, if there is one."""
        if self.error is not None:
            raise self.error

    def fail(self, error: Exception, act: Any = None) -> None:
        """Show an error and keep it, without what its frames hold, until ``act`` succeeds."""
        let_go(error)
        self._errors[act] = error
        self._tell()

    def forgive(self) -> None:
        """Forget all errors: what they were of is no more."""
        self._errors.clear()
        self._tell()

    def _tell(self) -> None:
        self.note.value = f"⚠ {html.escape(sentence(self.error))}" if self.error else ""

    def callback(self, act: Callable[[], Any]) -> Callable[[Any], None]:
        """``act`` for a widget to call, which would hide an error or show a traceback."""

        def call(_event: Any) -> None:
            self._errors.pop(act, None)
            try:
                act()
            except Exception as error:  # whatever it is, check() raises it
                self.fail(error, act)
            self._tell()

        return call


def let_go(error: BaseException | None) -> None:
    """Clear the frames that an error has come through, which may hold a model on the GPU."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def sentence(error: Exception) -> str:
    """An error as a reader wants it: ours say what is wrong, others need their kind."""
    known = type(error) is ValueError or type(error).__module__.startswith("dreambooth_lib.")
    return str(error) if known else f"{type(error).__name__}: {error}"


def control(kind: type, description: str, **traits: Any) -> Any:
    """A control with its label; a slider and a text report when they are let go of."""
    if "continuous_update" in kind.class_trait_names():  # type: ignore[attr-defined]
        traits = {"continuous_update": False} | traits
    return kind(description=description, style=STYLE, layout=Layout(width=WIDE), **traits)


def hinted(controls: Mapping[Any, str]) -> VBox:
    """Controls below each other, each beside one line that says what to do when."""
    row = Layout(flex_flow="row wrap", align_items="center")
    lines = [HBox([one, HTML(f"<small>{html.escape(hint)}</small>")], layout=row)
             for one, hint in controls.items()]  # fmt: skip
    return VBox(lines)


def png(save: Callable[..., Any]) -> bytes:
    """What a PIL picture's ``save`` or a figure's ``savefig`` writes."""
    buffer = io.BytesIO()
    save(buffer, format="png")
    return buffer.getvalue()


def blank() -> Image:
    """A place for a page or a figure, hidden until ``show`` fills it."""
    layout = Layout(max_width="100%", align_self="flex-start", display="none")
    return Image(format="png", layout=layout)


def show(place: Image, save: Callable[..., Any]) -> None:
    place.value = png(save)
    place.layout.display = ""


def captioned(picture: Any, caption: str, width: int) -> VBox:
    """One PIL picture of ``width`` pixels with a line of text under it."""
    shown = Image(value=png(picture.save), format="png", width=width)
    shown.layout.margin = "0"
    text = HTML(f'<div style="line-height: 1.3"><small>{html.escape(caption)}</small></div>')
    return VBox([shown, text], layout=Layout(width=f"{width}px", margin="0 8px 8px 0"))


def in_a_row(boxes: list[Any]) -> HBox:
    """Boxes in a row, on more lines where the page is narrow."""
    return HBox(boxes, layout=Layout(flex_flow="row wrap"))
