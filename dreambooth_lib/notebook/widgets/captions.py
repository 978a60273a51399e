"""Show the photos' captions, edit them, and write them beside the photos."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ipywidgets import HTML, Button, Checkbox, HBox, Layout, Textarea, VBox
from PIL import Image, ImageOps

from dreambooth_lib.core.errors import printable
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.captions import count_tokens, lacking_identifier, with_identifier
from dreambooth_lib.notebook import captioner
from dreambooth_lib.notebook.widgets import parts

if TYPE_CHECKING:
    from dreambooth_lib.data.images import Photo

_ROW = {"flex_flow": "row wrap", "align_items": "center"}
_SIDE = 96  # pixels of the photo beside its caption

# Of a photo with its saved caption, as another folder may have other photos of the same names.
_Identity = tuple[str, bytes, str | None]

_HINT = (
    "A caption says what else is in a photo, so that the model learns the subject alone. Without "
    "captions, all photos are trained with the same prompt, which suits a few photos."
)


class CaptionEditor(VBox):
    """A photo and its caption in each row, closed until the photos have captions.

    ``save`` gets new captions by the photos' names. ``callback`` wraps what a button does.
    """

    def __init__(
        self,
        save: Callable[[Mapping[str, str]], None],
        callback: Callable[[Callable[[], Any]], Callable[[Any], None]],
    ) -> None:
        self._save = save
        self._photos: Sequence[Photo] = []
        self._subject: Subject | None = None
        self.fields: dict[str, Textarea] = {}  #: by the photos' names
        self._drafts: dict[_Identity, str] = {}  # texts of fields that were not saved
        self.opened = Checkbox(description="Show and edit the captions", indent=False)
        self.write = _button("Save the captions", "save", "Write them beside the photos")
        self.insert = _button("Add the identifier", "plus", "Put {} before the class noun")
        self.describe = _button("Describe the photos", "magic", "Fill in captions to edit")
        self._rows, self._note = VBox(), HTML()
        download = HTML(
            f"<small>by {captioner.MODEL} (a download of {captioner.DOWNLOAD}, once); read what it "
            "writes, then save it</small>"
        )
        self._body = VBox([
            HTML(f"<small>{_HINT}</small>"),
            self._rows,
            HBox([self.write, self.insert, self.describe, download], layout=_ROW),
            self._note,
        ])  # fmt: skip
        super().__init__([self.opened, self._body])
        self.opened.observe(lambda _: self._open(), "value")
        self.write.on_click(callback(self._write))
        self.insert.on_click(callback(self._insert))
        self.describe.on_click(callback(self._describe))
        self.layout.display = "none"

    def show(
        self,
        photos: Sequence["Photo"],
        thumbnails: Sequence[Image.Image],
        subject: Subject,
        tokenizers: Sequence[tuple[Any, int]],
    ) -> None:
        """Show these photos' captions, or in their place what was typed and not saved.

        That is dropped where the photo or its saved caption is another than before.
        """
        self._keep_drafts()
        parts.refill(self._rows)
        self._photos, self._subject = photos, subject
        self.fields = {
            photo.name: Textarea(
                self._drafts.get(_identity(photo), photo.caption or ""),
                placeholder=subject.instance_prompt,
                rows=3,
                layout=Layout(width="32em"),
            )
            for photo in photos[: len(thumbnails)]
        }
        self._shown = [
            (ImageOps.contain(image, (_SIDE, _SIDE)), _label(photo, subject, tokenizers))
            for photo, image in zip(photos, thumbnails, strict=False)  # the first of many
        ]
        lacking = lacking_identifier(photos, subject)
        count = f"{len(lacking)} caption{'s' * (len(lacking) > 1)}"
        self.insert.description = f"Add the identifier to {count}"
        self.insert.layout.display = "" if lacking else "none"
        self._note.value = ""
        self.opened.value = self.opened.value or any(photo.caption for photo in photos)
        self._open()
        self.layout.display = ""

    def clear(self) -> None:
        """Show nothing, as there are no photos."""
        self._keep_drafts()
        self._photos, self._shown, self.fields = [], [], {}
        parts.refill(self._rows)
        self.layout.display = "none"

    def _keep_drafts(self) -> None:
        """Remember what is in the fields and not saved, if there are any fields."""
        if self.fields:  # else they were cleared, and may come again
            shown = [photo for photo in self._photos if photo.name in self.fields]
            self._drafts = {
                _identity(photo): text
                for photo in shown
                if (text := self.fields[photo.name].value) != (photo.caption or "")
            }

    def _open(self) -> None:
        self._body.layout.display = "" if self.opened.value else "none"
        if self.opened.value and not self._rows.children:
            self._rows.children = [
                HBox([parts.captioned(*shown, _SIDE, _SIDE), field], layout=_ROW)
                for shown, field in zip(self._shown, self.fields.values(), strict=True)
            ]

    def _edited(self) -> list["Photo"]:
        """Return the photos with their captions as they are in the fields."""
        texts = {name: " ".join(field.value.split()) for name, field in self.fields.items()}
        return [replace(p, caption=texts.get(p.name, p.caption)) for p in self._photos]

    def _write(self, captions: Mapping[str, str] | None = None) -> None:
        """Save what was edited, and these captions."""
        old = {photo.name: " ".join((photo.caption or "").split()) for photo in self._photos}
        new = {p.name: p.caption or "" for p in self._edited() if p.name in self.fields}
        new |= captions or {}
        changed = {name: text for name, text in new.items() if text != old[name]}
        if changed:
            self._save(changed)
        count = f"{len(changed)} caption{'s' * (len(changed) != 1)}"
        self._note.value = f"<small>Saved {count}.</small>"

    def _insert(self) -> None:
        assert self._subject is not None
        edited = {photo.name: photo for photo in self._edited()}
        lacking = lacking_identifier([*edited.values()], self._subject)
        noun = self._subject.class_noun
        self._write({n: with_identifier(edited[n].caption or "", noun) for n in lacking})

    def _describe(self) -> None:
        assert self._subject is not None
        with parts.busy(self.describe):
            self._note.value = f"<small>Loading {captioner.MODEL}…</small>"
            described = captioner.describe(self._photos[: len(self.fields)], self._subject)
        for name, text in described.items():
            self.fields[name].value = text
        self._note.value = "<small>Read the captions, correct them, and save them.</small>"


def _identity(photo: "Photo") -> _Identity:
    return photo.name, photo.traits.digest, photo.caption


def _label(photo: "Photo", subject: Subject, tokenizers: Sequence[tuple[Any, int]]) -> str:
    """Return a photo's name, and how long its caption is for the base."""
    text = (photo.caption or subject.instance_prompt).replace("{}", subject.identifier)
    tokens, limit = count_tokens(text, tokenizers)
    cut = ": the rest is cut off" if tokens > limit else ""
    return printable(f"{photo.name}, {tokens} of {limit} tokens{cut}")


def _button(description: str, icon: str, tooltip: str) -> Button:
    return Button(
        description=description, icon=icon, tooltip=tooltip, layout=Layout(width="auto")
    )  # fmt: skip
