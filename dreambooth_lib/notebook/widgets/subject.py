"""Choosing the subject: its pictures, what they are of, and the word that will name it."""

import html
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from IPython.display import display
from ipywidgets import HTML, Combobox, Text, VBox
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.identifiers import check_identifier, rare_identifiers
from dreambooth_lib.data.images import DataError, Photo, read_pictures
from dreambooth_lib.data.preprocessing import to_tensor
from dreambooth_lib.data.quality_checks import check_pictures, hold_out
from dreambooth_lib.families import loading
from dreambooth_lib.figures import image_grids
from dreambooth_lib.notebook import colab
from dreambooth_lib.notebook.widgets import upload
from dreambooth_lib.notebook.widgets.parts import Panel, blank, control, from_here, hinted, show

if TYPE_CHECKING:
    import torch

_ON_COLAB = (
    "on Colab: set UPLOAD = True in the settings cell and run from there; or type a folder's or "
    "zip's path"
)


class SubjectPanel(Panel):
    """A subject's pictures, shown and checked, its class noun and its identifier.

    ``config`` is the run's with this subject, and ``given`` what that began as. Uploads are saved
    in ``uploads``. Raises ``DataError`` for the first pictures and ``BaseError`` for the base.
    """

    def __init__(self, config: TrainConfig, uploads: str | Path = "photos"):
        outline = loading.inspect_base(config.base, config.revision)
        self.given, self.uploads, self._tokenizer = config, Path(uploads), outline.tokenizer
        self.resolution = config.resolution or outline.resolution
        subject, rare = config.subject, rare_identifiers(outline.tokenizer)
        self.upload = upload.button()
        self.source = control(Text, "folder or zip", value=subject.pictures)
        self.class_noun = control(Text, "class noun", value=subject.class_noun)
        self.identifier = control(Combobox, "identifier", value=subject.identifier, options=rare)
        self.photos: list[Photo] = []
        self.findings, self.thumbnails, self.crops = HTML(), blank(), blank()
        self._title, self._crops_title = HTML(), HTML()
        hints = {
            self.source: "three to six pictures of the subject in different surroundings",
            self.class_noun: "what your subject is, in one plain word: dog, teapot, person",
            self.identifier: "a rare word that will mean your subject; keep it if in doubt",
        }
        super().__init__(
            HTML(_ON_COLAB) if colab.in_colab() else upload.row(self.upload),
            hinted(hints),
            self._title, self.thumbnails, self.findings, self._crops_title, self.crops,
        )  # fmt: skip
        self.on_change(self._read_uploaded, self.upload)
        self.on_change(self._read_typed, self.source)
        self.on_change(self._show, self.class_noun, self.identifier)
        self.use(subject.pictures)

    def use(self, source: str | Path | Mapping[str, bytes]) -> None:
        """Take pictures from a folder, a zip or uploaded files by name, and show them.

        Raises ``DataError`` as ``read_pictures`` and ``colab.save_uploads`` do. The panel has no
        pictures then, and says why: those from before would be taken for these.
        """
        self._clear()
        self._title.value = "Reading the pictures ..."
        try:
            self._when = ""
            if isinstance(source, Mapping):
                source = colab.save_uploads(source, self.uploads)
                self._when = f" (uploaded {datetime.now():%H:%M})"
            self.photos = read_pictures(source)
            self._used = self.source.value = str(source)
            self._show()
        except Exception as error:
            self._clear()
            self.fail(error, self.use)
            raise

    def read_again(self) -> None:
        """Take the pictures that lie in the folder or zip by now, and show them."""
        self.callback(self._read)(None)

    def _clear(self) -> None:
        """Show no pictures, and say nothing of any, not even what was wrong with earlier ones."""
        self.mend()
        self.photos, self._used = [], ""
        for text in (self._title, self.findings, self._crops_title):
            text.value = ""
        for place in (self.thumbnails, self.crops):
            place.layout.display = "none"

    def _ipython_display_(self) -> None:
        if not colab.in_colab():
            display(upload.guard())
        display(VBox([self]))  # shown by either version's own way, which this one stands for

    def crop_to(self, side: int) -> None:
        """Show what training sees at another resolution."""
        if side != self.resolution:
            self.resolution = side
            self._show()

    @property
    def config(self) -> TrainConfig:
        """The run's config with this subject. Raises what the panel says is wrong."""
        self.check()
        if not self.photos:  # reading them was interrupted
            raise DataError("no pictures are chosen; run the cell of step 2 again.")
        subject, noun = self.given.subject, self.class_noun.value.strip()
        pictures, name = Path(self._used).resolve(), subject.name
        if str(pictures) != subject.pictures:
            uploaded = pictures.is_relative_to(self.uploads.resolve())
            name = f"my_{noun.replace(' ', '_')}" if uploaded else ""
        subject = replace(
            subject,
            pictures=str(pictures),
            class_noun=noun,
            identifier=self.identifier.value.strip(),
            name=name,
        )
        return self.given.replace(subject=subject)

    def _read_uploaded(self) -> None:
        try:
            files = upload.taken(self.upload)
            if files:
                self.use(files)
        except DataError:
            self._clear()
            self.source.value = ""  # what it names is not what was meant
            raise

    def _read_typed(self) -> None:
        if self.source.value != self._used:
            self._read()

    def _read(self) -> None:
        self.use(self.source.value.strip())

    def _show(self) -> None:
        photos, config, side = self.photos, self.given, self.resolution
        if not photos:
            return
        found = [finding.message for finding in check_pictures(photos, side)]
        found += check_identifier(self.identifier.value.strip(), self._tokenizer)
        found += _unknown_noun(config.base, self.class_noun.value.strip())
        items = "".join(f"<li>{html.escape(text)}</li>" for text in found)
        count = f"{len(photos)} picture{'s' * (len(photos) > 1)}"
        grid = image_grids.grid([p.image for p in photos], 6, [photo.name for photo in photos])
        crops = [_to_image(to_tensor(p.image, side, config.crop)) for p in photos]
        held = hold_out(photos)[1] if config.validate_every and config.hold_out else []
        labels = ["kept out, to test on" if p in held else "" for p in photos] if held else None
        cropped = image_grids.grid(crops, 6, labels)
        # All at once, as by now it is all of the same pictures.
        place = html.escape(from_here(self._used))
        self._title.value = f"<b>Showing {count} of {place}</b>{self._when}"
        show(self.thumbnails, grid.save)
        self.findings.value = f"<b>No problems found in {count}.</b>"
        if found:
            self.findings.value = f"<b>Look at these before you train:</b><ul>{items}</ul>"
        self._crops_title.value = f"<b>What training sees</b>: cropped to {side} × {side} pixels"
        show(self.crops, cropped.save)


def _unknown_noun(base: str, noun: str) -> list[str]:
    """Warn where the embedded base has never seen such a thing; other bases have seen most."""
    if base != "toybox":
        return []
    classifier = loading.BUNDLED / "toybox" / "classifier" / "config.json"
    labels = json.loads(classifier.read_text())["id2label"].values()
    nouns = [label.removeprefix("class: ") for label in labels if label.startswith("class: ")]
    if noun.lower() in nouns:
        return []
    return [
        f"the embedded base cannot draw '{noun}', nor photos of anything: it knows emoji-like "
        f"drawings of {len(nouns)} things ({', '.join(nouns)}); take one of these, or for photos "
        "of your own another base."
    ]


def _to_image(pixels: "torch.Tensor") -> Image.Image:
    """Reverse :func:`to_tensor`."""
    levels = ((pixels + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
