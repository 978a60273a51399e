"""Build panels: errors shown in red, controls with hints, images with captions."""

import html
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ipywidgets import HTML, Button, HBox, Image, Layout, VBox

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.errors import one_line, printable

#: Jupyter's own red, which suits its dark theme too; the classic Notebook has none.
_RED = "color: var(--jp-error-color1, #c62828); line-height: 1.4; white-space: normal"


_LISTED = 60  # texts in a list, so that a page stays small
_ACTING = threading.RLock()  # an action may change a field that has one


class Panel(VBox):
    """A column of widgets that shows the errors of its callbacks on top, in red.

    The error of a callback stays until that callback succeeds, whatever other fields do meanwhile.
    """

    def __init__(self, *children: Any):
        self.errors: dict[Any, Exception] = {}  #: by the callback that failed
        self.note = HTML(layout=Layout(display="none"))
        super().__init__([self.note, *children])

    def check(self) -> None:
        """Raise the first error shown, if any."""
        for error in self.errors.values():
            raise error

    def report(self, error: Exception, action: Any = None) -> None:
        """Show and keep an error, as that of ``action``."""
        gpu_memory.clear_frames(error)
        self.errors[action] = error
        self._show_errors()

    def clear_errors(self, *actions: Any) -> None:
        """Drop the errors of these callbacks, or of all if none is given."""
        for action in actions or list(self.errors):
            self.errors.pop(action, None)
        self._show_errors()

    def _show_errors(self) -> None:
        errors = dict.fromkeys(self.errors.values())  # two callbacks may share an error
        lines = [f"<b>⚠ {html.escape(one_line(error))}</b>" for error in errors]
        self.note.value = f'<div style="{_RED}">{"<br>".join(lines)}</div>' if lines else ""
        self.note.layout.display = "" if lines else "none"

    def callback(self, action: Callable[[], Any]) -> Callable[[Any], None]:
        """Wrap ``action`` for a widget, which would hide its error or show a traceback.

        Actions of all panels wait for each other: a kernel may run them in threads. A button that
        is pressed again while it is :func:`busy` does nothing.
        """

        def call(event: Any) -> None:
            if isinstance(event, Button) and event.disabled:
                return
            with _ACTING:
                self.clear_errors(action)
                try:
                    action()
                except Exception as error:  # check() raises it
                    self.report(error, action)

        return call

    def on_change(self, action: Callable[[], Any], *fields: Any) -> None:
        """Call ``action`` whenever the value of a field changes."""
        for field in fields:
            field.observe(self.callback(action), "value")


def control(kind: type, description: str, **traits: Any) -> Any:
    """Make a labelled control; sliders and text fields report their value on release."""
    if "continuous_update" in kind.class_trait_names():  # type: ignore[attr-defined]
        traits["continuous_update"] = False
    style = {"description_width": "9em"}
    return kind(description=description, style=style, layout=Layout(width="32em"), **traits)


def with_hints(controls: Mapping[Any, str]) -> VBox:
    """Stack controls, each beside a line that says when to change it."""
    layout = Layout(flex_flow="row wrap", align_items="center")
    # A hint stays beside its control, on several lines, down to a narrow width.
    beside = Layout(flex="1 1 20em", margin="2px 2px 2px 12px")
    hints = [HTML(f'<div style="line-height: 1.4">{html.escape(hint)}</div>',
                  layout=beside) for hint in controls.values()]  # fmt: skip
    return VBox([HBox(pair, layout=layout) for pair in zip(controls, hints, strict=True)])


def bullets(heading: str, texts: Sequence[str], at_first: int) -> str:
    """Return texts as a list under a heading; those after the first ones unfold, up to 60."""
    items = [f"<li>{html.escape(printable(text))}</li>" for text in texts[:_LISTED]]
    told = f"<b>{heading}</b><ul>{''.join(items[:at_first])}</ul>"
    if more := items[at_first:]:
        rest = len(texts) - at_first
        told += f"<details><summary>and {rest} more</summary><ul>{''.join(more)}</ul></details>"
    return told


@contextmanager
def busy(button: Button) -> Iterator[None]:
    """Disable a button meanwhile."""
    button.disabled = True
    try:
        yield
    finally:
        button.disabled = False


def _png(save: Callable[..., Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, format="png", **options)
    return buffer.getvalue()


def empty_image() -> Image:
    """Make an image widget that stays hidden until :func:`show_image` fills it."""
    # A margin, beside the full width, would give every page a scroll bar.
    layout = Layout(max_width="100%", margin="0", align_self="flex-start", display="none")
    return Image(format="png", layout=layout)


def show_image(widget: Image, save: Callable[..., Any]) -> None:
    """Fill an image widget with what a PIL image's ``save`` or a figure's ``savefig`` writes."""
    widget.value = _png(save)
    widget.layout.display = ""


def captioned(image: Any, caption: str, min_width: int, max_width: int, **png_options: Any) -> VBox:
    """Lay out a PIL image above its caption, as wide as it is within these pixels."""
    width = max(min_width, min(max_width, image.width))
    shown = Image(value=_png(image.save, **png_options), format="png", width=width)
    shown.layout.margin = "0"
    text = HTML(f'<div style="line-height: 1.3"><small>{html.escape(caption)}</small></div>')
    return VBox([shown, text], layout=Layout(width=f"{width}px", margin="0 8px 8px 0"))


def refill(box: VBox, children: Sequence[Any] = ()) -> None:
    """Replace what is in a box, and close it: ipywidgets holds all that is open, images too."""
    before, box.children = box.children, children
    for widget in before:
        _close(widget)


def _close(widget: Any) -> None:
    own = (getattr(widget, name, None) for name in ("layout", "style"))
    for part in filter(None, (*getattr(widget, "children", ()), *own)):
        _close(part)
    widget.close()


def row(boxes: list[Any]) -> HBox:
    """Lay out boxes in a row that wraps on a narrow page."""
    return HBox(boxes, layout=Layout(flex_flow="row wrap"))
