"""The upload button, which stays alive where Jupyter's server takes no message of that size.

The files come in one message. A server that is sent a larger one than it takes closes the
connection: nothing reaches this kernel, and the button never works again. So the page weighs the
files first, and sends a note in the place of those that are too large.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from IPython.display import Javascript
from ipywidgets import HTML, FileUpload, HBox, Layout

from dreambooth_lib.core.config_checks import ConfigError
from dreambooth_lib.data.images import DataError
from dreambooth_lib.figures.labels import format_bytes

#: The environment variable that says how many bytes this server takes in a message, if not 10 MiB.
LIMIT = "DREAMBOOTH_UPLOAD_LIMIT"
_DEFAULT = 10 * 2**20  # Jupyter's own
_HEAD = 2**16  # bytes of a message beside the files: their names, and what Jupyter adds
_NOTE = "too large for dreambooth_lib.json"
_CLASS = "dreambooth-upload"

ELSE = (  # what to do with files that are too large
    "Drag them into a folder in Jupyter's file list (in JupyterLab on the left) and type the "
    "folder's name below"
)

# The widget keeps its file input off the page, so only its own click() tells which one it is.
_GUARD = """
window.dreamboothUpload = window.dreamboothUpload || (() => {
  const guard = {};
  const weigh = ({ target }) => {
    const files = Array.from(target.files);
    const bytes = files.reduce((sum, file) => sum + file.size, 0);
    if (bytes <= guard.bytes) return;
    const note = new DataTransfer();
    note.items.add(new File([JSON.stringify({ files: files.length, bytes })], guard.note));
    target.files = note.files;
  };
  document.addEventListener("click", (event) => {
    if (!event.target.closest("." + guard.button)) return;
    const { click } = HTMLInputElement.prototype;
    const restore = () => { HTMLInputElement.prototype.click = click; };
    HTMLInputElement.prototype.click = function () {
      restore();
      this.addEventListener("change", weigh, true);  // before the widget's own listener
      this.click();
    };
    setTimeout(restore);
  }, true);
  return guard;
})();
Object.assign(window.dreamboothUpload, %s);
"""


def limit() -> int:
    """Read how many bytes can be uploaded at once. Raises ``ConfigError`` for no number."""
    said = os.environ.get(LIMIT, str(_DEFAULT))
    if not said.isdecimal() or int(said) <= _HEAD:
        raise ConfigError(f"{LIMIT} is {said!r}; set it to the bytes that the server takes.")
    return int(said) - _HEAD


def button() -> FileUpload:
    """Make the button; where it is displayed, :func:`guard` must be."""
    made = FileUpload(accept="image/*,.zip", multiple=True, description="Upload pictures")
    made.layout.width = "auto"
    return made.add_class(_CLASS)


def row(button: FileUpload) -> HBox:
    """Lay out the button with how much it takes."""
    line = HTML(
        '<div style="line-height: 1.4">three to six pictures or one zip, all together below '
        f"<b>{format_bytes(limit())}</b>. For more: {ELSE[0].lower()}{ELSE[1:]}.</div>"
    )
    return HBox([button, line], layout=Layout(flex_flow="row wrap", align_items="center"))


def guard() -> Javascript:
    """Make the script that weighs the files in the page before they are sent."""
    settings = json.dumps({"bytes": limit(), "note": _NOTE, "button": _CLASS})
    return Javascript(_GUARD % settings)


def taken(button: FileUpload) -> dict[str, bytes]:
    """Files by name that the button holds, which is empty then; none where it is already.

    Raises :class:`DataError` where the page has sent a note that they are too large.
    """
    files = uploaded(button.value)
    _empty(button)
    if files.keys() == {_NOTE}:
        found = json.loads(files[_NOTE])
        what = f"{found['files']} pictures" if found["files"] > 1 else "a file"
        otherwise = "" if LIMIT in os.environ else ", or start Jupyter by 'make lab'"
        raise DataError(
            f"{what} of {format_bytes(found['bytes'])} in all did not arrive: this Jupyter server "
            f"takes {format_bytes(limit())} at once. {ELSE}{otherwise}."
        )
    return files


def uploaded(value: Any) -> dict[str, bytes]:
    """Files by name, from what a ``FileUpload`` holds in ipywidgets 7 or 8."""
    if isinstance(value, Mapping):
        return {name: bytes(file["content"]) for name, file in value.items()}
    return {file["name"]: bytes(file["content"]) for file in value}


def _empty(button: FileUpload) -> None:
    """Forget the files here and in the page, so that the same ones can be chosen again."""
    if isinstance(button.value, Mapping):  # ipywidgets 7, whose page adds to the count
        button.metadata, button.data, button._counter = [], [], 0
    else:
        button.value = ()
