"""Upload photos by a button that survives uploads too large for Jupyter's server.

All files come in one message. If it is larger than the server accepts, the server closes the
connection: nothing reaches this kernel, and the button never works again. So the page adds up the
file sizes first, and sends a note instead of files that are too large.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from IPython.display import Javascript
from ipywidgets import HTML, FileUpload, HBox, Layout

from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.disk import format_bytes
from dreambooth_lib.data.images import DataError

#: The environment variable with the bytes that this server accepts in a message, if not 10 MiB.
LIMIT = "DREAMBOOTH_UPLOAD_LIMIT"
_DEFAULT = 10 * 2**20  # Jupyter's own
_OVERHEAD = 2**16  # bytes of a message besides the files: their names and what Jupyter adds
_NOTE = "too large for dreambooth_lib.json"
_CLASS = "dreambooth-upload"
#: Some browsers take neither HEIC for an image nor any caption.
_ACCEPTED = "image/*,.heic,.heif,.avif,.zip,.txt,.caption,.json,.jsonl,.csv"

#: Shown where photos are uploaded.
CONSENT = "Use photos of people only with their consent."

_OTHER_WAY = (
    "drag them into a folder in Jupyter's file browser (on the left in JupyterLab) and type the "
    "folder's name below"
)

# The widget keeps its file input off the page, so that only its own click() gives it away.
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


def size_limit() -> int:
    """Return how many bytes can be uploaded at once. Raises ``ConfigError`` for no number."""
    value = os.environ.get(LIMIT, str(_DEFAULT))
    if not value.isdecimal() or int(value) <= _OVERHEAD:
        raise ConfigError(f"{LIMIT} is {value!r}; set it to the bytes that the server accepts.")
    return int(value) - _OVERHEAD


def upload_button() -> FileUpload:
    """Make the button; display :func:`guard` with it."""
    button = FileUpload(accept=_ACCEPTED, multiple=True, description="Upload photos")
    button.layout.width = "auto"
    return button.add_class(_CLASS)


def upload_row(button: FileUpload) -> HBox:
    """Lay out the button beside a line on how much it accepts."""
    line = HTML(
        '<div style="line-height: 1.4">Three to six photos, with their captions if they have any, '
        "or one zip, at most "
        f"<b>{format_bytes(size_limit())}</b> in all. For more, {_OTHER_WAY}. The page may freeze "
        f"for a minute while it uploads large photos. {CONSENT}</div>"
    )
    return HBox([button, line], layout=Layout(flex_flow="row wrap", align_items="center"))


def guard() -> Javascript:
    """Return the script that adds up file sizes in the page before it sends the files."""
    settings = json.dumps({"bytes": size_limit(), "note": _NOTE, "button": _CLASS})
    return Javascript(_GUARD % settings)


def take_files(button: FileUpload) -> dict[str, bytes]:
    """Return the button's files by name, and empty it.

    Raises :class:`DataError` if the page has sent a note that they are too large.
    """
    files = uploaded_files(button.value)
    _empty(button)
    if files.keys() == {_NOTE} and (note := _read_note(files[_NOTE])):
        what = f"{note['files']} photos" if note["files"] > 1 else "a file"
        start = "" if LIMIT in os.environ else ", or start Jupyter with 'make lab'"
        raise DataError(
            f"{what} of {format_bytes(note['bytes'])} in all did not arrive: this Jupyter server "
            f"accepts {format_bytes(size_limit())} at once; {_OTHER_WAY}{start}."
        )
    return files


def _read_note(content: bytes) -> dict[str, int] | None:
    """Return the page's note, or None for a file of the user's that has its name."""
    try:
        match json.loads(content):
            case {"files": int(), "bytes": int()} as note:
                return note
    except (ValueError, RecursionError):
        return None
    return None


def uploaded_files(value: Any) -> dict[str, bytes]:
    """Return files by name from the value of a ``FileUpload``, in ipywidgets 7 or 8."""
    if isinstance(value, Mapping):
        return {name: bytes(file["content"]) for name, file in value.items()}
    return {file["name"]: bytes(file["content"]) for file in value}


def _empty(button: FileUpload) -> None:
    """Forget the files here and in the page, so that they can be chosen again."""
    if isinstance(button.value, Mapping):  # ipywidgets 7, whose page adds to the count
        button.metadata, button.data, button._counter = [], [], 0
    else:
        button.value = ()
