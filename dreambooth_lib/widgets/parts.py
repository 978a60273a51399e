"""What the views share: errors that are shown and kept, hints, pictures."""

import html
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ipywidgets import HTML, HBox, Image, Layout, VBox

from dreambooth_lib import memory

#: For a control's ``style`` and ``layout``: labels and controls in columns.
STYLE = {"description_width": "9em"}
WIDE = "32em"
#: Jupyter's own red, in its dark theme too; the classic Notebook has none. Lines may be long.
_RED = "color: var(--jp-error-color1, #c62828); line-height: 1.4; white-space: normal"


class View(VBox):
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
        memory.forget(error)
        self.errors[act] = error
        self._tell()

    def mend(self, *acts: Any) -> None:
        """Drop the errors of these callbacks: what they failed at is well by now."""
        for act in acts:
            self.errors.pop(act, None)
        self._tell()

    def _tell(self) -> None:
        errors = dict.fromkeys(self.errors.values())  # two callbacks may have failed at one
        texts = [f"<b>⚠ {html.escape(sentence(error))}</b>" for error in errors]
        self.note.value = f'<div style="{_RED}">{"<br>".join(texts)}</div>' if texts else ""
        self.note.layout.display = "" if texts else "none"

    def callback(self, act: Callable[[], Any]) -> Callable[[Any], None]:
        """``act`` for a widget to call, which would hide an error or show a traceback."""

        def call(_event: Any) -> None:
            self.mend(act)
            try:
                act()
            except Exception as error:  # whatever it is, check() raises it
                self.fail(error, act)

        return call


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


def from_here(path: str | Path) -> str:
    """Return a path as it is said to the reader: what lies in this folder is named from here."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


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


def on_page(picture: Any, least: int, most: int) -> int:
    """How many pixels wide a picture stands on the page: as many as it has, within bounds."""
    return max(least, min(most, picture.width))


def captioned(picture: Any, caption: str, width: int) -> VBox:
    """One PIL picture of ``width`` pixels with a line of text under it."""
    shown = Image(value=png(picture.save), format="png", width=width)
    shown.layout.margin = "0"
    text = HTML(f'<div style="line-height: 1.3"><small>{html.escape(caption)}</small></div>')
    return VBox([shown, text], layout=Layout(width=f"{width}px", margin="0 8px 8px 0"))


def in_a_row(boxes: list[Any]) -> HBox:
    """Boxes in a row, on more lines where the page is narrow."""
    return HBox(boxes, layout=Layout(flex_flow="row wrap"))
