"""Choose the subject: its photos, its class noun and its identifier."""

import html
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from IPython.display import display
from ipywidgets import HTML, Button, Checkbox, Combobox, Layout, Text, VBox
from PIL import ImageOps

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.errors import printable
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.user_text import short_path
from dreambooth_lib.data.captions import check_captions, check_lengths, write_captions
from dreambooth_lib.data.decoding import MAX_BYTES
from dreambooth_lib.data.identifiers import check_folder_name, check_identifier, rare_identifiers
from dreambooth_lib.data.images import BadPhotosError, DataError, Images, Photo, listed, read_source
from dreambooth_lib.data.quality_checks import check_photos, hold_out
from dreambooth_lib.data.sources import PHOTO_SUFFIXES, list_files
from dreambooth_lib.families import loading
from dreambooth_lib.figures import image_grids
from dreambooth_lib.notebook import colab
from dreambooth_lib.notebook.widgets import practice_base, upload
from dreambooth_lib.notebook.widgets.captions import CaptionEditor
from dreambooth_lib.notebook.widgets.framing import FramingPanel
from dreambooth_lib.notebook.widgets.parts import (
    Panel,
    bullets,
    control,
    empty_image,
    show_image,
    with_hints,
)

_SHOWN = 60  # photos
_AT_FIRST = 5  # messages that show at once; the others unfold
_THUMBNAIL = 320  # pixels a side, twice what the grid shows
_LONGEST_LABEL = 120  # characters of a photo's name and caption

_ON_COLAB = (
    "To upload photos, set UPLOAD = True in the cell “Choose what to train” of section 1, and run "
    f"the notebook from there; or type the path of a folder or zip here. {upload.CONSENT}"
)


class SubjectPanel(Panel):
    """A subject's photos, shown and checked, with its class noun and identifier.

    ``config`` is ``initial_config`` with the subject shown. Uploads are saved in ``uploads``.
    Raises ``DataError`` for the first photos and ``BaseError`` for the base.
    """

    def __init__(self, config: TrainConfig, uploads: str | Path = "photos"):
        base = loading.inspect_base(config.base, config.revision, config.prompt_chunks)
        self.initial_config, self.uploads = config, Path(uploads)
        self._tokenizers, self._how_to_read_more = base.tokenizers, base.how_to_read_more
        #: Files to go on without, by the folder or zip that they are in.
        self._left_out = {Path(config.subject.photos).resolve(): config.subject.left_out or ()}
        self._bad: tuple[str, tuple[str, ...]] = ("", ())  # the same of photos just refused
        self.resolution = config.resolution or base.resolution
        subject, rare = config.subject, rare_identifiers(base.tokenizers[0][0])
        self.upload = upload.upload_button()
        self.source = control(Text, "folder or zip", value=short_path(subject.photos))
        self.class_noun = control(Text, "class noun", value=subject.class_noun)
        self.identifier = control(Combobox, "identifier", value=subject.identifier, options=rare)
        self.hold_out = control(Checkbox, "hold out a photo", value=config.hold_out)
        self.photos: list[Photo] = []
        self._path = ""
        self._notes: list[str] = []
        self.findings, self.thumbnails, self.crops = HTML(), empty_image(), empty_image()
        self.title, self._crops_title = HTML(), HTML()
        self.captions = CaptionEditor(self._save_captions, self.callback)
        go_on_layout = Layout(width="auto", display="none", align_self="flex-start")
        self.go_on = Button(button_style="primary", layout=go_on_layout)
        self.framing = FramingPanel(config, base.size_multiple, self._show, self.reload)
        hints = {
            self.source: "three to six photos of the subject in different surroundings",
            self.class_noun: "what your subject is, in one plain word: dog, teapot, backpack",
            self.identifier: "a rare word that will stand for your subject; keep it if in doubt",
            self.hold_out: "with four or more, one is never trained on: its loss shows overfitting",
        }
        super().__init__(
            self.go_on,  # below the error
            HTML(_ON_COLAB) if colab.in_colab() else upload.upload_row(self.upload),
            with_hints(hints),
            self.title, self.thumbnails, self.findings, self.captions,
            self._crops_title, self.crops, self.framing,
        )  # fmt: skip
        self.go_on.on_click(self.callback(self._go_on))
        self.on_change(self._read_uploaded, self.upload)
        self.on_change(self._read_typed, self.source)
        self.on_change(self._show, self.class_noun, self.identifier, self.hold_out)
        self.use(subject.photos)

    def use(self, source: str | Path | Mapping[str, bytes]) -> None:
        """Use and show the photos of a folder, a zip or uploaded files by name.

        Raises ``DataError`` as ``read_photos`` and ``colab.save_uploads`` do. The panel is then
        empty and says why: the former photos would be taken for these.
        """
        self._clear()
        try:
            self._uploaded_at = ""
            if isinstance(source, Mapping):
                source = colab.save_uploads(source, self.uploads)
                self._uploaded_at = f" (uploaded {datetime.now():%H:%M})"
            source = os.path.expanduser(source)
            self.photos, self._notes = read_source(self._subject_of(source))
            self._path = self.source.value = short_path(source)
            self._show()
        except BadPhotosError as error:
            self._clear()
            self._bad = (str(source), error.names)
            self.go_on.description = f"Continue without {listed(error.names)}"
            self.go_on.layout.display = ""
            told = DataError(f"{error.problem}, or press '{self.go_on.description}' in section 2.")
            self.report(told, self.use)
            raise told from error
        except Exception as error:
            self._clear()
            self.report(error, self.use)
            raise

    def upload_on_colab(self) -> None:
        """Show Colab's upload button, and use what comes; the panel shows what is wrong with it."""
        self.callback(self._upload_on_colab)(None)

    def _upload_on_colab(self) -> None:
        first = self.initial_config.subject.photos
        kept = None if str(Path(self._path).resolve()) == first else self._path
        if not kept:  # the bundled photos must not pass for an upload that is interrupted
            self._clear()
        self.use(colab.upload(self.uploads, kept))

    def _subject_of(self, source: str | Path) -> Subject:
        """Return the config's subject with the photos at a path, but for those left out there."""
        left_out = self._left_out.get(Path(source).resolve())
        return replace(self.initial_config.subject, photos=str(source), left_out=left_out)

    def _go_on(self) -> None:
        """Use the good photos, without the bad ones that the panel names."""
        source, names = self._bad
        place = Path(source).resolve()
        self._left_out[place] = tuple(dict.fromkeys((*self._left_out.get(place, ()), *names)))
        self.use(source)

    def _save_captions(self, captions: Mapping[str, str]) -> None:
        """Write captions beside the photos; those of a zip are unpacked as an upload first."""
        path = Path(self._path)
        if path.is_file() and path.suffix.lower() not in PHOTO_SUFFIXES:
            left_out = self._left_out.get(path.resolve()) or ()
            files = [file for file in list_files(path) if file.name not in left_out]
            unpacked = {file.name: file.read(MAX_BYTES, "a photo") for file in files}
            path = colab.save_uploads(unpacked, self.uploads)
        write_captions(path if path.is_dir() else path.parent, captions)
        self.use(path)

    def reload(self) -> None:
        """Read the folder or zip again, and show its photos."""
        self.callback(self._read)(None)

    def _clear(self) -> None:
        """Show no photos, and no messages on earlier ones."""
        self.clear_errors()
        if self._path:
            self.source.placeholder = f"before: {self._path}"
        self.photos, self._notes, self._path = [], [], ""
        for text in (self.title, self.findings, self._crops_title):
            text.value = ""
        self.captions.clear()
        for shown in (self.thumbnails, self.crops, self.go_on):
            shown.layout.display = "none"

    def _ipython_display_(self) -> None:
        if not colab.in_colab():
            display(upload.guard())
        display(VBox([self]))  # as either version of ipywidgets displays it

    def crop_to(self, side: int) -> None:
        """Show the crops of another resolution."""
        if side != self.resolution:
            self.resolution = side
            self._show()

    @property
    def config(self) -> TrainConfig:
        """Return the run's config with this subject. Raises the error that the panel shows."""
        self.check()
        if not self.photos:  # reading them was interrupted
            raise DataError("no photos are chosen; run the cell of section 2 again.")
        subject, noun = self.initial_config.subject, self.class_noun.value.strip()
        if not noun:
            raise ConfigError(
                "the class noun of section 2 is empty; write what your subject is, such as 'dog'."
            )
        path, name = Path(self._path).resolve(), subject.name
        if str(path) != subject.photos:
            uploaded = path.is_relative_to(self.uploads.resolve())
            name = f"my_{noun.replace(' ', '_')}" if uploaded else ""
        subject = replace(
            subject,
            photos=str(path),
            left_out=self._left_out.get(path),
            class_noun=noun,
            identifier=self.identifier.value.strip(),
            name=name,
        )
        self.framing.check()
        return self.initial_config.replace(
            subject=subject, hold_out=self.hold_out.value, **self.framing.changes
        )

    def _read_uploaded(self) -> None:
        try:
            if files := upload.take_files(self.upload):
                self.use(files)
        except DataError:
            if self.use not in self.errors:  # nothing has arrived
                self._clear()
            self.source.value = ""  # its path is not that of the upload
            raise

    def _read_typed(self) -> None:
        if self.source.value != self._path:
            self._read()

    def _read(self) -> None:
        self.use(self.source.value.strip())

    def _check_words(self) -> list[str]:
        """Return messages about identifier, class noun and captions.

        Raises ``ConfigError`` and ``DataError`` for words that cannot be trained.
        """
        identifier, noun = self.identifier.value.strip(), self.class_noun.value.strip()
        problems = check_identifier(identifier, self._tokenizers[0][0])
        problems += practice_base.findings(self.initial_config.base, noun)
        first, path = self.initial_config.subject, Path(self._path).resolve()
        is_new = str(path) != first.photos and path.is_relative_to(self.uploads.resolve())
        if is_new and noun == first.class_noun:
            problems.append(
                f"the class noun is '{noun}', as before the upload: change it if these photos show "
                "something else."
            )
        if identifier and noun:  # config says which of them is empty
            subject = Subject(self._path, noun, identifier)
            problems += check_captions(self.photos, subject) + check_folder_name(subject)
            problems += check_lengths(
                self.photos, subject, self._tokenizers, self._how_to_read_more
            )
        return problems

    def _show(self) -> None:
        photos, config, side = self.photos, self.initial_config, self.resolution
        if not photos:
            return
        shapes = self.framing.shapes(photos, side)
        problems = self._check_words()
        problems += [finding.message for finding in check_photos(photos, side, shapes)]
        count = f"{len(photos)} photo{'s' * (len(photos) > 1)}"
        shown = photos[:_SHOWN]
        first = f"the first {_SHOWN} of " if len(photos) > _SHOWN else ""
        thumbnails, crops = [], self.framing.cropped(shown, shapes[:_SHOWN])
        for image in Images(shown):
            large = max(image.size) > _THUMBNAIL
            thumbnails.append(ImageOps.contain(image, (_THUMBNAIL,) * 2) if large else image)
        grid = image_grids.grid(thumbnails, 6, [_label(photo) for photo in shown])
        held_out = hold_out(photos)[1] if config.validate_every and self.hold_out.value else []
        labels = ["held out" if p in held_out else "" for p in shown] if held_out else None
        cropped = image_grids.grid(crops, 6, labels)
        # Change everything at once, so that all of it shows the same photos.
        path = html.escape(self._path)
        self.title.value = f"<b>Showing {first}{count} from {path}</b>{self._uploaded_at}"
        show_image(self.thumbnails, grid.save)
        self.findings.value = f"<b>No problems found in {count}.</b>"
        if problems:
            self.findings.value = bullets("Check these before you train:", problems, _AT_FIRST)
        if self._notes:
            self.findings.value += bullets("About these files:", self._notes, _AT_FIRST)
        if remark := practice_base.remark(config.base, self._path):
            self.findings.value += f"<div>{html.escape(remark)}</div>"
        sizes = ", ".join(f"{width} × {height}" for width, height in dict.fromkeys(shapes))
        self._crops_title.value = f"<b>What training sees</b>: cropped to {sizes} pixels"
        show_image(self.crops, cropped.save)
        noun = self.class_noun.value.strip() or config.subject.class_noun
        identifier = self.identifier.value.strip() or config.subject.identifier
        subject = replace(config.subject, class_noun=noun, identifier=identifier)
        self.captions.show(photos, thumbnails, subject, self._tokenizers)
        self.framing.use(photos, self._path, noun)


def _label(photo: Photo) -> str:
    """Return a photo's name, and its caption if it has one."""
    text = printable(f"{photo.name}: {photo.caption}" if photo.caption else photo.name)
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
