"""Check the notebooks' widgets: what they show, what they return, and that no error is lost."""

import gc
import html
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import save_photos
from ipywidgets import HTML, Button, HBox, Image, IntProgress, Widget
from PIL import Image as PIL_Image

import dreambooth_lib
from dreambooth_lib import TrainConfig
from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import DataError
from dreambooth_lib.data.quality_checks import hold_out
from dreambooth_lib.families import loading
from dreambooth_lib.figures import image_grids, plots
from dreambooth_lib.notebook import captioner, timing, widgets
from dreambooth_lib.notebook.widgets import loaded_models, parts, playground, upload
from dreambooth_lib.notebook.widgets.in_force import settings_in_force
from dreambooth_lib.notebook.widgets.settings import HINTS, python_of
from dreambooth_lib.training import loop, runs, sampling, validation
from dreambooth_lib.training.batches import Batch, Batches
from dreambooth_lib.training.optimizer_step import Optimizer
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation_record import load_images

Make = Callable[..., TrainConfig]


def texts(widget: Any) -> str:
    """Return all the text that a widget shows."""
    own = widget.value if isinstance(widget, HTML) else ""
    return " ".join([own, *(texts(child) for child in getattr(widget, "children", ()))])


def images(widget: Any) -> list[PIL_Image.Image]:
    """Return all images that a widget shows, in order."""
    own = []
    if isinstance(widget, Image) and widget.layout.display != "none":
        own = [PIL_Image.open(io.BytesIO(widget.value))]
    return own + [image for child in getattr(widget, "children", ()) for image in images(child)]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Widget]:
    """Collect what is displayed below the cell."""
    displayed: list[Widget] = []
    monkeypatch.setattr("dreambooth_lib.notebook.widgets.training.display", displayed.append)
    return displayed


@pytest.fixture
def started(
    tmp_path: Path, photos: str, make_config: Make, tiny_sd2: str, clip_folder: Path
) -> Callable[..., Run]:
    def start(name: str = "run", **changes: Any) -> Run:
        fields = {"validate_every": 2, "scorer": str(clip_folder), "ema_decay": None} | changes
        run = runs.start(make_config(tiny_sd2, photos, **fields), tmp_path / name)
        plan = validation.ValidationPlan(class_images=2, inference_steps=2)
        (run.folder / "validation").mkdir()
        (run.folder / "validation" / "plan.json").write_text(json.dumps(asdict(plan)))
        return run

    return start


def buttons(widget: Any) -> list[Button]:
    """Return all buttons in a widget."""
    own = [widget] if isinstance(widget, Button) else []
    return own + [found for child in getattr(widget, "children", ()) for found in buttons(child)]


def png(colour: str, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    PIL_Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


# The subject


@pytest.fixture
def subject(tiny_sd2: str, photos: str, make_config: Make, tmp_path: Path) -> widgets.SubjectPanel:
    return widgets.SubjectPanel(make_config(tiny_sd2, photos), tmp_path / "uploads")


def test_the_subject_panel_begins_with_the_configs_subject(
    subject: widgets.SubjectPanel, tiny_sd2: str, photos: str, make_config: Make
) -> None:
    assert subject.config == make_config(tiny_sd2, photos)
    thumbnails, crops = images(subject)
    assert thumbnails.width > 4 * 24 and crops.width > 4 * 16
    assert "cropped to 16 × 16" in texts(subject)
    assert "The page may freeze for a minute while it uploads" in texts(subject)
    assert "below 16" not in texts(subject), "the photos are larger than this base's pictures"


@pytest.mark.parametrize("version", [7, 8])
def test_uploads_become_the_subject_in_both_versions(
    version: int, subject: widgets.SubjectPanel, tmp_path: Path
) -> None:
    files = {"a.png": png("red"), "b.png": png("blue")}
    value: Any = {name: {"metadata": {"name": name}, "content": data}
                  for name, data in files.items()}  # fmt: skip
    if version == 8:
        value = tuple({"name": n, "content": memoryview(data)} for n, data in files.items())
    assert upload.uploaded_files(value) == files
    subject.use(upload.uploaded_files(value))
    uploaded = subject.config.subject
    assert Path(uploaded.photos).parent == tmp_path / "uploads"
    assert [photo.name for photo in subject.photos] == ["a.png", "b.png"]
    assert (uploaded.class_noun, uploaded.name) == ("dog", "my_dog"), "not a digest of the photos"
    assert "blurred" in texts(subject)
    assert "the class noun is 'dog', as before the upload" in html.unescape(texts(subject))
    subject.class_noun.value = "cat"
    assert "as before the upload" not in texts(subject)


def press(button: Any, files: dict[str, bytes]) -> None:
    """Send files as the button's page does in each version of ipywidgets."""
    if isinstance(button.value, dict):  # ipywidgets 7: a count tells that all data is there
        button.metadata = [{"name": name} for name in files]
        button.data = list(files.values())
        button._counter += len(files)
    else:
        button.value = tuple(
            {"name": name, "type": "", "size": len(content), "content": content,
             "last_modified": datetime.now(UTC)}
            for name, content in files.items()
        )  # fmt: skip


def test_the_upload_buttons_value_is_used(subject: widgets.SubjectPanel) -> None:
    press(subject.upload, {"c.png": png("green")})
    subject.check()
    assert [photo.name for photo in subject.photos] == ["c.png"]


def test_a_wrong_path_is_an_error_for_the_panel_and_its_config(
    subject: widgets.SubjectPanel, photos: str
) -> None:
    subject.source.value = "/no/<such>"
    assert "there is no folder or zip /no/&lt;such&gt;; check the path." in subject.note.value
    with pytest.raises(DataError, match="check the path"):
        _ = subject.config
    subject.source.value = photos
    assert not subject.note.value and subject.config.subject.photos == photos


def test_an_error_stays_until_its_own_field_is_corrected(
    subject: widgets.SubjectPanel, photos: str
) -> None:
    subject.source.value = "/no/such"
    subject.class_noun.value = "cat"
    assert "check the path" in subject.note.value
    with pytest.raises(DataError, match="check the path"):
        subject.check()
    subject.use({"a.png": png("red"), "b.png": png("blue")})
    subject.check()
    assert not subject.note.value and len(subject.photos) == 2


def test_good_photos_clear_the_error_of_a_failed_upload(
    subject: widgets.SubjectPanel, photos: str, tmp_path: Path
) -> None:
    subject._read_uploaded = lambda: subject.use({"a.txt": b"no picture"})  # type: ignore[method-assign]
    panel = widgets.SettingsPanel(subject)
    subject.callback(subject._read_uploaded)(None)
    assert subject.note.value
    subject.source.value = str(Path(photos))
    subject.source.value = str(save_photos(tmp_path / "max", 3))
    subject.check()
    panel.check()
    assert not subject.note.value and panel.config == subject.config


@pytest.mark.parametrize("bad", ["upload", "path", "too large", "used by a cell"])
def test_after_a_bad_input_no_photos_are_left_to_train_on(
    bad: str, subject: widgets.SubjectPanel, photos: str
) -> None:
    assert f"Showing 4 photos from {photos}" in texts(subject) and len(images(subject)) == 2
    assert "before you train" in subject.findings.value  # the identifier is common to this base
    if bad == "upload":
        press(subject.upload, {"a.jpg": b"text", "b.png": png("red")})
    elif bad == "path":
        subject.source.value = "/no/such"
    elif bad == "too large":
        press(subject.upload, {upload._NOTE: b'{"files": 5, "bytes": 18900000}'})
    else:
        with pytest.raises(DataError, match="is empty, damaged or not an image"):
            subject.use({"a.jpg": b"text"})
    text = texts(subject)
    assert images(subject) == [] and "Showing" not in text and not subject.findings.value
    assert subject.children[0] is subject.note and subject.note.layout.display == ""
    assert subject.note.value.count("⚠") == 1 and "color" in subject.note.value
    subject.class_noun.value = "cat"
    subject.crop_to(8)
    assert images(subject) == [] and not subject.findings.value
    assert subject.source.placeholder == f"before: {photos}", "the way back"
    assert (subject.go_on.layout.display == "") == (bad == "upload")
    panel_fails = [lambda: subject.config, subject.check, lambda: widgets.SettingsPanel(subject)]
    for fails in panel_fails:
        with pytest.raises(DataError):
            fails()
    subject.source.value = "/nor/such"
    assert subject.note.value.count("⚠") == 1, "only what was tried last is of interest"
    subject.source.value = photos
    assert len(images(subject)) == 2 and subject.note.layout.display == "none"
    assert subject.config.subject.photos == photos


def test_files_too_large_for_the_server_are_named_with_what_to_do(
    subject: widgets.SubjectPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(subject.upload, {upload._NOTE: b'{"files": 5, "bytes": 18900000}'})
    text = html.unescape(subject.note.value)
    assert "5 photos of 19 MB in all did not arrive: this Jupyter server accepts 10 MB" in text
    assert "into a folder in Jupyter's file browser" in text and "type the folder's name" in text
    assert subject.source.value == "", "the old path is not theirs"
    press(subject.upload, {upload._NOTE: b'{"files": 1, "bytes": 18900000}'})
    assert "a file of 19 MB in all" in subject.note.value
    monkeypatch.setenv(upload.LIMIT, "209715200")
    press(subject.upload, {upload._NOTE: b'{"files": 99, "bytes": 310000000}'})
    assert "accepts 210 MB at once" in subject.note.value and "make lab" not in subject.note.value
    monkeypatch.setenv(upload.LIMIT, "much")
    with pytest.raises(ConfigError, match="DREAMBOOTH_UPLOAD_LIMIT is 'much'"):
        upload.size_limit()


def test_the_same_files_can_be_uploaded_again(subject: widgets.SubjectPanel, photos: str) -> None:
    for _ in range(2):
        press(subject.upload, {"c.png": png("green")})
        assert not upload.uploaded_files(subject.upload.value), "the button is empty again"
        subject.check()
        assert re.search(r"Showing 1 photo from .*</b> \(uploaded \d\d:\d\d\)", texts(subject))
        assert "c.png alone is too little" in texts(subject)
        subject.source.value = photos
        assert "uploaded" not in subject.title.value


def test_photos_added_to_the_folder_are_read_on_reload(
    tiny_sd2: str, make_config: Make, tmp_path: Path
) -> None:
    folder = Path(save_photos(tmp_path / "max", 3))
    panel = widgets.SubjectPanel(make_config(tiny_sd2, str(folder)), tmp_path / "uploads")
    (folder / "more.png").write_bytes(png("red"))
    panel.reload()
    assert [photo.name for photo in panel.photos] == ["0.png", "1.png", "2.png", "more.png"]
    (folder / "text.jpg").write_text("text")
    panel.reload()
    with pytest.raises(DataError, match=r"text\.jpg"):
        panel.check()


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that gets the labels of each image grid that is drawn."""
    drawn: list[Any] = []
    grid = image_grids.grid
    monkeypatch.setattr(
        image_grids, "grid", lambda shown, columns, names=None: (
            drawn.append(names), grid(shown, columns, names)
        )[1],
    )  # fmt: skip
    return drawn


def test_the_panel_shows_captions_and_what_is_wrong_with_them(
    tiny_sd2: str, make_config: Make, tmp_path: Path, labels: list[Any]
) -> None:
    folder = Path(save_photos(tmp_path / "max", 3))
    (folder / "0.txt").write_text("a dog on the beach")
    (folder / "1.txt").write_text("a {} dog on the beach in snow a photo of a red dog on a red cat")
    (folder / "2.json").write_text("{}")
    (folder / "IMG_1.MOV").write_bytes(b"film")
    panel = widgets.SubjectPanel(make_config(tiny_sd2, str(folder)), tmp_path / "uploads")
    text = html.unescape(panel.findings.value)
    assert "0.png: a dog on the beach" in labels[0] and labels[0][2] == "2.png"
    assert "1 of 2 captions (0.png) lacks the identifier 'ohwx'" in text
    assert "the caption of 1.png is too long: it has " in text
    assert "2.json is not used" in text and "IMG_1.MOV is not used" in text
    panel.identifier.value = "beach"
    assert "lacks the identifier" not in panel.findings.value
    panel.identifier.value = "ohwx"
    (folder / "1.txt").write_text("a dog on the beach in snow a photo of a red dog on a red {} cat")
    panel.reload()
    with pytest.raises(DataError, match="past the token limit"):
        panel.check()


def click(button: Any) -> None:
    button.click()


@pytest.mark.parametrize("packed", [False, True])
def test_captions_are_edited_in_the_panel_and_lie_beside_the_photos(
    tiny_sd2: str, make_config: Make, tmp_path: Path, packed: bool
) -> None:
    folder = Path(save_photos(tmp_path / "max", 3))
    (folder / "0.txt").write_text("a dog\non the beach")
    (folder / "1.txt").write_text("on the beach in snow a photo of a red cat a red a")
    source = shutil.make_archive(str(folder), "zip", folder) if packed else str(folder)
    panel = widgets.SubjectPanel(make_config(tiny_sd2, source), tmp_path / "uploads")
    editor = panel.captions
    assert editor.opened.value and [*editor.fields] == ["0.png", "1.png", "2.png"]
    assert "13 of 14 tokens" in texts(panel) or "tokens: the rest is cut off" in texts(panel)
    assert editor.insert.description == "Add the identifier to 2 captions"
    editor.fields["2.png"].value = "a photo of a {} dog  on a bed"
    click(editor.insert)
    panel.check()
    place = Path(panel.config.subject.photos)
    assert place == folder if not packed else place.parent == (tmp_path / "uploads").resolve()
    assert [photo.caption for photo in panel.photos] == [
        "a {} dog on the beach",
        "a {} dog, on the beach in snow a photo of a red cat a red a",
        "a photo of a {} dog on a bed",
    ]
    assert "Saved 3 captions" in texts(panel) and "lack the identifier" not in texts(panel)
    assert editor.insert.layout.display == "none"
    assert (folder / "2.txt").exists() is not packed
    panel.captions.fields["1.png"].value = ""
    click(editor.write)
    assert panel.photos[1].caption is None and "Saved 1 caption." in texts(panel)
    assert (Path(panel.config.subject.photos) / "1.txt").read_text() == ""


def test_captions_that_are_not_saved_stay_while_other_things_are_changed(
    tiny_sd2: str, make_config: Make, tmp_path: Path
) -> None:
    folder = Path(save_photos(tmp_path / "max", 5))
    (folder / "0.txt").write_text("a dog")
    panel = widgets.SubjectPanel(make_config(tiny_sd2, str(folder)), tmp_path / "uploads")
    editor = panel.captions

    def typed() -> list[str]:
        return [editor.fields[name].value for name in ("0.png", "1.png", "2.png")]

    editor.fields["0.png"].value, editor.fields["1.png"].value = "a {} dog", "a {} dog on a bed"
    panel.hold_out.value = not panel.hold_out.value
    panel.framing.crop.value = "subject"
    panel.class_noun.value = "puppy"
    panel.crop_to(8)
    panel.reload()
    assert typed() == ["a {} dog", "a {} dog on a bed", ""]
    panel.source.value = "/no/such"
    panel.source.value = str(folder)
    assert typed() == ["a {} dog", "a {} dog on a bed", ""], "a wrong path costs nothing"
    (folder / "0.txt").write_text("a dog on the beach")
    panel.reload()
    assert typed() == ["a dog on the beach", "a {} dog on a bed", ""], "by another program"
    click(editor.write)
    assert (folder / "1.txt").read_text() == "a {} dog on a bed"
    editor.fields["1.png"].value = ""
    click(editor.write)
    assert typed()[1] == "" and panel.photos[1].caption is None
    editor.fields["2.png"].value = "a {} dog on a chair"
    panel.use({f"{number}.png": png("red", (40, 30 + number)) for number in range(3)})
    assert typed() == ["", "", ""], "other photos of the same names"


def test_photos_without_captions_are_described_only_when_asked(
    tiny_sd2: str, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(save_photos(tmp_path / "max", 3))
    panel = widgets.SubjectPanel(make_config(tiny_sd2, str(folder)), tmp_path / "uploads")
    editor = panel.captions
    assert not editor.opened.value and editor.insert.layout.display == "none"
    assert f"{captioner.MODEL} (a download of {captioner.DOWNLOAD}" in texts(panel)

    def describe(photos: list[Any], subject: Subject) -> dict[str, str]:
        assert editor.describe.disabled
        return {p.name: f"a {{}} {subject.class_noun} in {p.name}" for p in photos}

    monkeypatch.setattr(captioner, "describe", describe)
    click(editor.describe)
    assert editor.fields["1.png"].value == "a {} dog in 1.png" and not editor.describe.disabled
    assert not list(folder.glob("*.txt")), "a person reads them before"
    click(editor.write)
    assert (folder / "1.txt").read_text() == "a {} dog in 1.png"

    def fail(*_: Any) -> Any:
        raise captioner.CaptionerError("the captioner cannot be loaded.")

    monkeypatch.setattr(captioner, "describe", fail)
    click(editor.describe)
    with pytest.raises(captioner.CaptionerError):
        panel.check()


@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_photo_is_named_and_the_others_are_used_at_a_click(
    tiny_sd2: str, make_config: Make, tmp_path: Path, photos: str, packed: bool
) -> None:
    folder = Path(save_photos(tmp_path / "max", 3))
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:90])
    source = shutil.make_archive(str(folder), "zip", folder) if packed else str(folder)
    panel = widgets.SubjectPanel(make_config(tiny_sd2, photos), tmp_path / "uploads")
    assert panel.go_on.layout.display == "none"
    panel.source.value = source
    with pytest.raises(DataError, match=r"'1\.png'"):
        panel.check()
    assert panel.go_on.layout.display == "" and panel.captions.layout.display == "none"
    assert not images(panel)
    assert panel.go_on.description == "Continue without 1.png"
    click(panel.go_on)
    assert [photo.name for photo in panel.photos] == ["0.png", "2.png"]
    assert panel.config.subject.left_out == ("1.png",) and panel.go_on.layout.display == "none"
    assert "1.png is left out, as you chose." in texts(panel)
    told = panel.findings.value.split("About these files:")
    assert "as you chose" in told[1] and "as you chose" not in told[0], "nothing to check there"
    assert widgets.SubjectPanel(panel.config, tmp_path / "uploads").photos[0].name == "0.png"
    panel.captions.fields["0.png"].value = "a {} dog"
    click(panel.captions.write)
    assert [photo.caption for photo in panel.photos] == ["a {} dog", None]
    panel.source.value = photos
    assert panel.config.subject.left_out is None


def test_the_panel_shows_only_the_first_of_many_photos(
    tiny_sd2: str, make_config: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(70):
        (folder / f"{number:02}.png").write_bytes(png("red") + bytes([number]))
    (folder / "00\n\x1b.txt").write_text("odd")
    panel = widgets.SubjectPanel(make_config(tiny_sd2, str(folder)), tmp_path / "uploads")
    assert "the first 60 of 70 photos" in texts(panel)
    found = panel.findings.value
    assert found.index("<details>") > [at.start() for at in re.finditer("<li>", found)][4]
    assert "more</summary>" in found, "five show at once"
    assert panel.findings.value.count("<li>") <= 61 and "\x1b" not in panel.findings.value


def test_a_file_with_the_name_of_the_pages_note_is_an_upload(
    subject: widgets.SubjectPanel,
) -> None:
    for content in (b"no JSON", b"[1]", b'{"files": "x"}'):
        press(subject.upload, {upload._NOTE: content})
        assert "has no photos" in html.unescape(subject.note.value)


def test_photos_that_were_uploaded_with_a_bad_one_are_used_at_a_click(
    subject: widgets.SubjectPanel,
) -> None:
    press(subject.upload, {"a.png": png("blue"), "b.png": png("red")[:60], "c.png": png("red")})
    note = html.unescape(subject.note.value)
    assert "'b.png'" in note and note.count("⚠") == 1 and "left_out" not in note
    assert "or press 'Continue without b.png' in section 2." in note
    click(subject.go_on)
    click(subject.go_on)  # a double click
    assert [photo.name for photo in subject.photos] == ["a.png", "c.png"]
    assert subject.config.subject.left_out == ("b.png",) and not subject.note.value


def test_an_upload_without_photos_is_named(subject: widgets.SubjectPanel) -> None:
    press(subject.upload, {"notes.txt": b"about my dog"})
    assert "the upload has no photos, only notes.txt; choose JPEG" in subject.note.value
    settings = widgets.SettingsPanel(widgets.SubjectPanel(subject.initial_config, subject.uploads))
    press(settings._source.upload, {"notes.txt": b"about my dog"})
    assert "only notes.txt" in settings.note.value
    press(settings._source.upload, {"a.png": png("blue"), "b.png": png("red")[:60]})
    assert "'b.png'" in html.unescape(settings.note.value), "not what was wrong before"
    assert "notes" not in settings.note.value
    click(settings._source.go_on)
    settings.check()


def test_settings_of_another_panel_are_rejected(
    subject: widgets.SubjectPanel, tiny_sd2: str, photos: str, make_config: Make
) -> None:
    panel = widgets.SettingsPanel(subject)
    panel.check(subject)
    again = widgets.SubjectPanel(make_config(tiny_sd2, photos))
    with pytest.raises(ConfigError, match="run the cell of section 3 again"):
        panel.check(again)


def test_the_bundled_base_says_what_it_cannot_draw(
    photos: str, make_config: Make, tiny_sd2: str
) -> None:
    known = widgets.SubjectPanel(make_config("toybox", photos))
    assert "cannot generate" not in texts(known)
    known.class_noun.value = "Dog"
    assert "cannot generate" not in texts(known)
    assert "drawings, not photos: if these are photos, choose another base" in texts(known)
    known.class_noun.value = "a dog"
    assert "without its article: &#x27;dog&#x27;" in texts(known)
    known.class_noun.value = "dachshund"
    text = texts(known)
    assert "cannot generate &#x27;dachshund&#x27;" in text
    assert "drawings of 48 things (backpack, balloon" in text
    known.class_noun.value = "polka dot teapot"
    assert "write the class noun &#x27;teapot&#x27;" in texts(known)
    assert "48 things" not in texts(known)
    known.source.value = str(loading.BUNDLED / "subjects" / "patch_dog")
    assert "if these are photos" not in texts(known), "the bundled ones are drawings"
    pretrained = widgets.SubjectPanel(make_config(tiny_sd2, photos))
    pretrained.class_noun.value = "dachshund"
    assert "cannot generate" not in texts(pretrained) and "if these" not in texts(pretrained)


def test_no_photo_is_held_out_where_that_is_switched_off(
    photos: str, make_config: Make, tiny_sd2: str, labels: list[Any]
) -> None:
    subject = widgets.SubjectPanel(make_config(tiny_sd2, photos, validate_every=2))
    assert "held out" in labels[-1] and subject.config.hold_out
    subject.hold_out.value = False
    assert labels[-1] is None and not subject.config.hold_out


def test_the_crops_follow_the_resolution_and_mark_the_held_out_photo(
    photos: str, make_config: Make, tiny_sd2: str, labels: list[Any]
) -> None:
    subject = widgets.SubjectPanel(make_config(tiny_sd2, photos, validate_every=2))
    held_out = hold_out(subject.photos)[1]
    marks = ["held out" if p in held_out else "" for p in subject.photos]
    assert labels[-1] == marks and sum(map(bool, marks)) == 1
    widgets.SubjectPanel(make_config(tiny_sd2, photos, validate_every=0))
    assert labels[-1] is None
    panel = widgets.SettingsPanel(subject)
    panel.controls["resolution"].value = 8
    assert "cropped to 8 × 8" in texts(subject)


def test_class_noun_and_identifier_go_into_the_subject_with_warnings(
    subject: widgets.SubjectPanel,
) -> None:
    subject.class_noun.value, subject.identifier.value = " cat ", "sks"
    assert subject.config.subject.token == "sks cat"
    assert "a rifle, and guns appear" in texts(subject)
    subject.class_noun.value = " "
    with pytest.raises(ConfigError, match="class noun of section 2 is empty"):
        _ = subject.config


def test_on_colab_the_panel_points_to_colabs_upload(
    fake_colab: Any, tiny_sd2: str, photos: str, make_config: Make, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    panel = widgets.SubjectPanel(make_config(tiny_sd2, photos), tmp_path / "uploads")
    assert "UPLOAD = True" in texts(panel) and "10 MB" not in texts(panel)
    fake_colab.uploads = {"d.png": png("red")}
    panel.upload_on_colab()
    assert [photo.name for photo in panel.photos] == ["d.png"]
    fake_colab.uploads = {"d.png": png("red"), "e.png": b"no image"}
    panel.upload_on_colab()  # shows what is wrong, with the button to go on
    assert "'e.png'" in html.unescape(panel.note.value) and not panel.go_on.layout.display
    click(panel.go_on)
    panel.check()
    fake_colab.uploads = {}
    panel.upload_on_colab()
    panel.check()
    assert [photo.name for photo in panel.photos] == ["d.png"], "those of the upload before"
    assert "Nothing was uploaded, so the photos in " in capsys.readouterr().out
    panel.use(photos)
    panel.upload_on_colab()
    with pytest.raises(DataError, match="nothing was uploaded"):
        panel.check()


def test_after_an_interrupted_upload_the_first_photos_are_not_trained_on(
    fake_colab: Any, tiny_sd2: str, photos: str, make_config: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop() -> None:
        raise KeyboardInterrupt

    panel = widgets.SubjectPanel(make_config(tiny_sd2, photos), tmp_path / "uploads")
    with monkeypatch.context() as patch:
        patch.setattr("google.colab.files.upload", stop)
        with pytest.raises(KeyboardInterrupt):
            panel.upload_on_colab()
        with pytest.raises(DataError, match="no photos are chosen; run the cell of section 2"):
            _ = panel.config
    panel.reload()  # as the cell does when it is run again
    fake_colab.uploads = {"d.png": png("red")}
    panel.upload_on_colab()
    monkeypatch.setattr("google.colab.files.upload", stop)
    with pytest.raises(KeyboardInterrupt):
        panel.upload_on_colab()
    assert Path(panel.config.subject.photos).parent == tmp_path / "uploads", "the user's own stay"


# The settings


@pytest.fixture
def settings(tiny_sd2: str, photos: str, make_config: Make) -> widgets.SettingsPanel:
    return widgets.SettingsPanel(make_config(tiny_sd2, photos, validate_every=2))


def test_the_settings_begin_with_the_config_and_follow_their_controls(
    settings: widgets.SettingsPanel, tiny_sd2: str, photos: str, make_config: Make
) -> None:
    config = make_config(tiny_sd2, photos, validate_every=2)
    assert settings.config == config
    moved = {"prior_weight": 0.5, "steps": 9, "learning_rate": 1e-4, "train_text_encoder": True,
             "resolution": 8, "class_images": 7, "early_stop": True, "method": "lora",
             "prior": "distilled"}  # fmt: skip
    assert {*moved, "keep_class", "adapter"} == settings.controls.keys()
    for name, value in moved.items():
        settings.controls[name].value = value
    assert settings.config == config.replace(**moved)
    assert "T4" not in texts(settings), "a text encoder may train on one, and nothing refuses it"


@pytest.mark.parametrize(
    "changes",
    [
        {"prior": "none"},
        {"resolution": 16},
        {"method": "lora"},
        {"method": "lora", "prior": "none"},
    ],
)
def test_settings_whose_controls_are_not_moved_stay(
    changes: dict[str, Any], tiny_sd2: str, photos: str, make_config: Make
) -> None:
    """As of a finished run that is opened again, which any other change makes a new one."""
    given = make_config(tiny_sd2, photos, **changes)
    for config in (given, given.replace(prior_weight=0.0)):
        panel = widgets.SettingsPanel(config)
        assert panel.config == config
        panel.controls["steps"].value = 9
        assert panel.config == config.replace(steps=9)
    panel.controls["prior_weight"].value = 0.5
    assert panel.config.prior != "none" and panel.config.prior_weight == 0.5
    panel.controls["resolution"].value = 8
    assert panel.config.resolution == 8
    panel.controls["resolution"].value = 16
    assert panel.config.resolution == given.resolution


def test_to_keep_the_class_takes_the_place_of_a_lambda_set_by_hand(
    settings: widgets.SettingsPanel,
) -> None:
    controls, scope = settings.controls, dict[str, Any](db=dreambooth_lib)
    controls["prior_weight"].value = 0.0
    assert settings.config.prior_weight == 0 and not controls["prior_weight"].disabled
    controls["keep_class"].value = 0.9
    assert controls["prior_weight"].disabled and not settings.note.value
    assert (settings.config.keep_class, settings.config.prior_weight) == (0.9, 1.0)
    assert "keep_class=0.9" in settings.python.value
    assert "prior_weight" not in settings.python.value
    exec(python_of(settings.config), scope)
    assert scope["config"] == settings.config
    assert widgets.SettingsPanel(settings.config).controls["keep_class"].label == "90%"
    controls["keep_class"].value = 0.0
    assert not controls["prior_weight"].disabled and "prior_weight=0.0" in settings.python.value
    for own, start in ((0.0, 1.0), (9.0, 1.0), (0.5, 0.5)):
        again = widgets.SettingsPanel(settings.config.replace(prior_weight=own))
        again.controls["keep_class"].value = 0.9
        assert not again.note.value and again.config.prior_weight == start


def test_the_python_that_is_shown_makes_the_same_config(settings: widgets.SettingsPanel) -> None:
    settings.controls["prior_weight"].value = 0.25
    scope: dict[str, Any] = {"db": dreambooth_lib}
    exec(python_of(settings.config), scope)
    assert scope["config"] == settings.config
    assert "prior_weight=0.25" in settings.python.value and "steps=4" in settings.python.value
    assert "warmup_steps" not in settings.python.value


@pytest.mark.parametrize("validate_every", [None, 125, 75])
def test_the_same_in_python_has_the_interval_of_validations_as_it_was_set(
    photos: str, validate_every: int | None
) -> None:
    """125 is the default; set, it is kept whatever it costs."""
    config = TrainConfig(dreambooth_lib.Subject(photos, "dog"), validate_every=validate_every)
    shown, scope = python_of(config), dict[str, Any](db=dreambooth_lib)
    exec(shown, scope)
    assert scope["config"] == config and "validation_share" not in shown


def test_photos_in_the_working_directory_have_a_relative_path(
    photos: str, make_config: Callable[..., TrainConfig], tiny_sd1: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(photos).parent)
    shown = python_of(make_config(tiny_sd1, photos))
    assert f"db.Subject({Path(photos).name!r}, class_noun='dog')" in shown


def test_the_panel_shows_a_photo_folder_as_the_page_does(
    subject: widgets.SubjectPanel, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(photos).parent)
    subject.use(photos)
    assert subject.source.value == Path(photos).name
    assert f"from {subject.source.value}</b>" in subject.title.value
    assert subject.config.subject.photos == photos


def test_a_path_in_the_home_folder_may_begin_with_a_tilde(
    subject: widgets.SubjectPanel, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(photos).parent))
    subject.source.value = f"~/{Path(photos).name}"
    assert subject.config.subject.photos == photos
    subject._save_captions({})
    subject.check()


def test_settings_over_a_subject_panel_follow_it(subject: widgets.SubjectPanel) -> None:
    panel = widgets.SettingsPanel(subject)
    subject.source.value = "/no/such"
    assert "check the path" in panel.note.value
    assert not panel.python.value, "the code of what was there before would mislead"
    with pytest.raises(DataError):
        _ = panel.config
    subject.use({"a.png": png("red"), "b.png": png("blue")})
    subject.class_noun.value = "cat"
    assert panel.config == subject.config and not panel.note.value
    python = html.unescape(panel.python.value)
    assert "class_noun='cat'" in python and "uploads" in python
    framing = subject.framing
    subject.hold_out.value = not subject.hold_out.value
    framing.crop.value, framing.weight.value, framing.base.value = "buckets", 0.1, True
    for words in ("hold_out=", "crop='buckets'", "background_weight=0.1", "background_prior=True"):
        assert words in html.unescape(panel.python.value)
    framing.weight.value = 0.0
    assert "background_weight=0.0" in panel.python.value
    assert "background_prior" not in panel.python.value


def test_all_settings_are_shown_by_a_switch_and_reset_at_once(
    settings: widgets.SettingsPanel,
) -> None:
    assert settings._more.layout.display == "none"
    settings.all.value = True
    assert not settings._more.layout.display
    first = settings.config
    settings.controls["steps"].value, settings.controls["prior"].value = 5000, "distilled"
    assert settings.config.steps == 5000
    settings.reset.click()
    assert settings.config == first
    settings.controls["steps"].value = 0
    with pytest.raises(ConfigError, match="steps"):
        settings.check()


def test_the_training_view_tells_the_time_left_and_the_settings_with_what_changed(
    started: Callable[..., Run], shown: list[Widget], photos: str
) -> None:
    run = started(steps=2, prior_weight=0.5)
    seen = [texts(shown[0]) for _ in widgets.monitor(run)]
    assert "Step 1 of 2, less than a minute left." in seen[0] and "λ 0.5, " in seen[0]
    assert "since" not in seen[0]
    unfinished = started("second", steps=4, prior_weight=0.5)
    for step in widgets.monitor(unfinished):
        if step.step == 2:
            break
    for weight in (0.7, 1.5):  # a training that fails at once leaves its change in the config
        changed = unfinished.config.replace(prior_weight=weight, steps=6)
        resumed = runs.start_or_resume(changed, unfinished.folder)
    list(widgets.monitor(resumed))
    told = texts(shown[-1])
    assert "λ 1.5 since step 2 (before: 0.5), " in told, "no step was trained with 0.7"
    assert "6 steps (before: 4)" in told
    assert [row["fields"]["prior_weight"] for row in resumed.rows("changes")] == [
        [0.5, 0.7], [0.7, 1.5]
    ]  # fmt: skip
    asked = settings_in_force(started("third", keep_class=0.9))
    assert "target class loss ratio 90%, " in asked and "λ" not in asked


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(20, "less than a minute"), (70, "about 1 min"), (81, "about 1.5 min"),
     (164, "about 2.5 min"), (165, "about 3 min"), (3500, "about 58 min"),
     (4800, "about 1 h 20 min"), (7190, "about 2 h 0 min")],
)  # fmt: skip
def test_times_are_told_in_words(seconds: float, words: str) -> None:
    assert timing.in_words(seconds) == words


def test_contradicting_settings_are_an_error_for_the_panel_and_its_config(
    settings: widgets.SettingsPanel,
) -> None:
    settings.controls["class_images"].value = 0
    assert "class_images is 0" in settings.note.value
    for fails in (settings.check, lambda: settings.config):
        with pytest.raises(ConfigError, match="class_images is 0"):
            fails()
    settings.controls["prior_weight"].value = 0
    settings.check()
    assert settings.config.prior_weight == 0 and not settings.note.value


def test_minutes_are_shown_only_after_measuring(
    settings: widgets.SettingsPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "min" not in settings.time.value
    measured = timing.Pace(step=30.0, validation=15.0)
    monkeypatch.setattr("dreambooth_lib.notebook.widgets.settings.measure", lambda config: measured)
    settings.predict.click()
    # Four steps, and validations before the first and after the second and the fourth.
    assert measured.seconds(settings.config) == 4 * 30 + 3 * 15
    assert "<b>about 3 min</b>" in settings.time.value
    assert "Generating class images takes extra time." in settings.time.value
    settings.controls["steps"].value = 9
    assert "<b>about 6 min</b>" in settings.time.value
    settings.controls["resolution"].value = 8
    assert not settings.time.value, "that was of another resolution"


def test_the_time_of_class_images_is_told_where_the_base_draws_them(
    started: Callable[..., Run],
) -> None:
    config = started(class_images=200).config
    pace = timing.Pace(1.0, 60.0, class_image=25.0)
    text = pace.describe_class_images(config)
    assert "Generating 200 class images takes <b>about 1 h 25 min</b> more, unless" in text
    assert pace.describe_class_images(config.replace(prior_weight=0)) == ""
    drawn = config.replace(validation_inference_steps=2, prior_inference_steps=6)
    pace = timing.measure(drawn)
    count = len(validation.plan_for(drawn).prompts(drawn.subject))
    assert pace.class_image == pytest.approx(3 * pace.validation / count)
    assert timing.measure(config.replace(prior_weight=0)).class_image == 0


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"checkpoint_every": 2, "validate_every": 0}, [2, 4, 5]),
        ({"checkpoint_every": 4, "validate_every": 3}, [3, 4, 5]),
        ({"checkpoint_every": 100, "validate_every": 0}, [5]),
    ],
)
def test_predicted_time_has_the_checkpoints_that_a_run_writes(
    changes: dict[str, Any], steps: list[int], started: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = started(steps=5, **changes)
    saved, save = [], Run.save_checkpoint

    def counting(run: Run, step: int, *args: Any) -> None:
        saved.append(step)
        save(run, step, *args)

    monkeypatch.setattr(Run, "save_checkpoint", counting)
    list(loop.train(run))
    assert saved == steps and timing.checkpoints(run.config) == len(steps)
    plain, slow = (timing.Pace(1.0, 2.0, checkpoint) for checkpoint in (0.0, 30.0))
    assert slow.seconds(run.config) - plain.seconds(run.config) == 30 * len(steps)


def test_a_checkpoint_is_timed_by_its_bytes_on_the_disk(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = started(validate_every=0, prior_weight=0).config
    assert 0 < timing.measure(config).checkpoint < 10
    monkeypatch.setattr(timing, "_seconds_to_write", lambda size, folder: float(size))
    run = runs.start(config.replace(steps=1), tmp_path / "one")
    list(loop.train(run))
    tensors = 0
    for file in run.checkpoints()[1].glob("*.safetensors"):
        with file.open("rb") as opened:  # of such small ones the header is a large share
            header = 8 + int.from_bytes(opened.read(8), "little")
        tensors += file.stat().st_size - header
    assert timing.measure(config).checkpoint == pytest.approx(tensors, rel=0.02)


def test_memory_is_estimated_after_the_measured_run_is_freed(
    settings: widgets.SettingsPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the memory after garbage collection: a session's parts hold each other and the GPU."""
    import torch

    class Parts:
        def __init__(self) -> None:
            self.itself = self

    left: list[weakref.ref[Parts]] = []

    def measured(config: TrainConfig) -> timing.Pace:
        left.append(weakref.ref(Parts()))
        return timing.Pace(1.0, 0.0)

    def free(*_: Any) -> tuple[int, int]:
        return (1 if any(one() for one in left) else 14 << 30), 15 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr("dreambooth_lib.notebook.widgets.settings.measure", measured)
    gc.disable()
    try:
        settings.predict.click()
    finally:
        gc.enable()
    assert "level 'standard'" in settings.time.value


def test_steps_that_the_loss_scale_skips_are_not_measured(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, apply, tries = started(validate_every=0).config, Optimizer._apply_gradients, []

    def skipping(optimizer: Optimizer) -> bool:
        tries.append(optimizer.completed_steps)
        return apply(optimizer) if len(tries) > 12 else False

    monkeypatch.setattr(Optimizer, "_apply_gradients", skipping)
    assert timing.measure(config).step > 0
    assert len(tries) == 12 + 1 + 3
    monkeypatch.setattr(Optimizer, "_apply_gradients", lambda optimizer: False)
    with pytest.raises(loop.NonFiniteLoss, match="use mixed_precision 'no'"):
        timing.measure(config)


def test_measuring_the_pace_leaves_nothing_behind(
    started: Callable[..., Run], tmp_path: Path
) -> None:
    run = started()
    before = sorted(tmp_path.rglob("*"))
    pace = timing.measure(run.config)
    assert 0 < pace.step < 60 and 0 < pace.validation < 60
    assert timing.measure(run.config.replace(validate_every=0, prior_weight=0)).validation == 0
    assert sorted(tmp_path.rglob("*")) == before


# The training monitor


def test_monitor_yields_the_steps_of_train_and_shows_curves_and_images(
    started: Callable[..., Run], shown: list[Widget]
) -> None:
    plain = [step.loss for step in loop.train(started("plain"))]
    run = started()
    assert [step.loss for step in widgets.monitor(run)] == plain
    (panel,) = shown
    losses, validation, sheet = images(panel)
    assert min(losses.width, validation.width) > 500
    assert sheet.height > 3 * 128, "a row for the base and each validation"
    assert "Finished at step 4" in texts(panel)


def test_an_interrupt_ends_the_cell_and_says_how_to_resume(
    started: Callable[..., Run], shown: list[Widget], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, at = started(), Batches.at
    uninterrupted = [step.loss for step in loop.train(started("plain"))]

    def interrupted(batches: Batches, step: int) -> Batch:
        if step == 3:
            raise KeyboardInterrupt
        return at(batches, step)

    monkeypatch.setattr(Batches, "at", interrupted)
    drawn_at, losses = list[int](), plots.losses

    def noted(log: list[dict[str, Any]], **options: Any) -> Any:
        drawn_at[:] = [row["step"] for row in log]
        return losses(log, **options)

    monkeypatch.setattr(plots, "losses", noted)
    monkeypatch.setattr("dreambooth_lib.notebook.widgets.training._PLOT_TIME", 1e-9)
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 3; run this cell again"):
        for _ in widgets.monitor(run):
            pass
    assert "The run is saved at step 3." in texts(shown[0])
    bar = next(child for child in shown[0].children if isinstance(child, IntProgress))
    assert bar.value == 3 and bar.bar_style == "info", "red would say that something failed"
    assert drawn_at == [1, 2, 3], "the curves of the step that the run goes on from"
    monkeypatch.setattr(Batches, "at", at)
    again = [(step.step, step.loss) for step in widgets.monitor(runs.resume(run.folder))]
    assert again == [(4, uninterrupted[3])]


def test_an_interrupt_while_curves_are_drawn_saves_the_run(
    started: Callable[..., Run], shown: list[Widget], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dreambooth_lib.figures.plots.losses", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 1"):
        list(widgets.monitor(run))
    assert list(run.checkpoints()) == [1]


def test_leaving_the_loop_saves(started: Callable[..., Run], shown: list[Widget]) -> None:
    run = started()
    for step in widgets.monitor(run):
        if step.step == 3:
            break
    told = "The run is saved at step 3. Run this cell again to resume."
    assert 3 in run.checkpoints() and told in texts(shown[0])


def test_an_error_in_training_is_shown_and_raised(
    started: Callable[..., Run], shown: list[Widget]
) -> None:
    run = started(learning_rate=1e30)
    with pytest.raises(loop.NonFiniteLoss):
        list(widgets.monitor(run))
    with pytest.raises(loop.NonFiniteLoss):
        shown[0].check()  # type: ignore[attr-defined]
    assert "lower learning_rate" in texts(shown[0]) and "Traceback" not in texts(shown[0])


# The checkpoint slider and the playground


def test_the_slider_steps_through_validations_and_marks_the_best(
    started: Callable[..., Run],
) -> None:
    run = started()
    list(loop.train(run))
    slider = widgets.CheckpointSlider(run)
    assert slider.step == slider.best.step and html.escape(slider.best.reason) in texts(slider)
    labels = [label for label, _ in slider.slider.options]
    starred = [label for label in labels if "★" in label]
    assert labels[0] == "base" and len(labels) == 3
    assert starred == [f"{slider.best.step} ★"] * slider.best.better_than_base
    assert all("view only" not in label for label in labels), "the newest and the best are kept"
    seen = {}
    for step in (0, 2, 4):
        slider.slider.value = step
        seen[step] = [picture.tobytes() for picture in images(slider.images)]
        assert seen[step][0] == load_images(run, step).subject[0].tobytes()
        assert len(seen[step]) == 4 + 2 + 10
    assert seen[0] != seen[4]
    assert slider.step == 4 and "The cells below use this step." in texts(slider)
    assert f"Step 4 of {run.folder.name}<" in texts(slider)
    assert texts(slider).count("your photo") == len(images(slider)) - len(seen[4]) == 4
    here = Path(run.config.subject.photos)
    there = here.rename(here.with_name("moved"))
    assert len(images(widgets.CheckpointSlider(run))) == len(seen[4]), "the photos may be gone"
    there.rename(here)


def open_images() -> int:
    """Return how many image widgets are held by whatever holds them."""
    gc.collect()
    return sum(type(found) is Image for found in gc.get_objects())


def test_images_that_are_no_longer_shown_are_not_held(
    started: Callable[..., Run], tiny_sd2: str, make_config: Make, tmp_path: Path
) -> None:
    run = started()
    list(loop.train(run))
    slider, play = widgets.CheckpointSlider(run), widgets.compare_with_base(run)
    play.steps.value = 5
    play.draw()
    photos = Path(save_photos(tmp_path / "max", 3))
    (photos / "0.txt").write_text("a {} dog")
    subject = widgets.SubjectPanel(make_config(tiny_sd2, str(photos)), tmp_path / "uploads")
    before = open_images()
    for step in (0, 2, 4, slider.best.step):
        slider.slider.value = step
        play = widgets.compare_with_base(run, earlier=play)
        subject.captions.opened.value = not subject.captions.opened.value
        subject.class_noun.value = f"dog{step}"
    assert len(images(play.entries)) == 2 and len(images(subject.captions)) == 3
    assert open_images() == before


def test_a_step_without_weights_is_view_only(started: Callable[..., Run]) -> None:
    run = started(validate_every=1, checkpoints_kept=1)
    list(loop.train(run))
    slider = widgets.CheckpointSlider(run)
    gone = [step for step in (1, 2, 3, 4) if step not in run.checkpoints()]
    assert gone, "only the newest and the best are kept"
    assert (f"{gone[0]}, view only", gone[0]) in slider.slider.options
    for step in (0, gone[0]):
        slider.slider.value = step
        assert slider.step == slider.best.step
        assert f"the cells below use step {slider.best.step}." in texts(slider)
        assert len(images(slider.images)) == 4 + 2 + 10


def test_a_chosen_step_is_kept_until_the_run_is_trained_further(
    started: Callable[..., Run],
) -> None:
    run = started(validate_every=1, checkpoints_kept=9)
    list(loop.train(run))
    slider = widgets.CheckpointSlider(run)
    other = next(step for step in (1, 2, 3, 4) if step != slider.best.step)
    slider.slider.value = other
    again = widgets.CheckpointSlider(run)
    assert again.step == again.slider.value == other
    assert f"Step {other} of" in texts(again), "a saved model would be replaced by another step's"
    shutil.rmtree(run.checkpoints()[other])
    assert widgets.CheckpointSlider(run).step == slider.best.step
    again.slider.value = slider.best.step
    longer = runs.start_or_resume(run.config.replace(steps=5), run.folder)
    list(loop.train(longer))
    slider = widgets.CheckpointSlider(longer)
    assert slider.slider.value == slider.best.step
    (run.folder / "chosen_checkpoint.json").write_text('{"step": [], "last": 5}')
    assert widgets.CheckpointSlider(longer).step == slider.best.step


def test_class_images_are_drawn_where_the_run_expects_them(
    started: Callable[..., Run],
) -> None:
    run = started(validate_every=0)
    page = widgets.show_class_images(run.config, run.folder.parent)
    assert page is not None and page.width > 4 * 128
    made = {path: path.stat().st_mtime_ns for path in run.folder.parent.rglob("0000*.png")}
    assert len(made) == 4
    list(loop.train(run))
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert widgets.show_class_images(run.config.replace(prior_weight=0), run.folder.parent) is None


def test_class_images_are_drawn_without_a_playgrounds_models_and_stored_ones_without_the_base(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loaded, load = started(validate_every=0), [], sampling.load_source

    def load_source(config: TrainConfig, **more: Any) -> Any:
        assert not loaded_models.LOADED
        loaded.append(config)
        return load(config, **more)

    monkeypatch.setattr(sampling, "load_source", load_source)
    monkeypatch.setitem(loaded_models.LOADED, "toybox", None)
    pages = [widgets.show_class_images(run.config, run.folder.parent) for _ in range(2)]
    assert len(loaded) == 1 and list(pages[0].getdata()) == list(pages[1].getdata())
    next(run.folder.parent.rglob("00002.png")).unlink()
    assert widgets.show_class_images(run.config, run.folder.parent) is not None
    assert len(loaded) == 2, "one was missing"


def test_a_run_reuses_class_images_of_a_base_with_a_relative_path(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(validate_every=0)
    base = Path(run.config.base)
    monkeypatch.chdir(base.parent)
    widgets.show_class_images(run.config.replace(base=base.name), run.folder.parent)
    list(loop.train(run))
    assert len(list(run.folder.parent.glob("class_images/*/manifest.json"))) == 1


def test_a_run_without_validation_has_no_slider(started: Callable[..., Run]) -> None:
    with pytest.raises(RunError, match=r"no validated step .*train a run with validate_every"):
        widgets.CheckpointSlider(started(validate_every=0))


def test_a_run_before_its_first_validation_is_told_when_that_comes(
    started: Callable[..., Run],
) -> None:
    with pytest.raises(RunError, match=r"train it further, .*first validation comes at step 3\."):
        widgets.CheckpointSlider(started(validate_every=3))


def test_the_playground_draws_both_models_with_the_same_seeds_and_keeps_all(
    started: Callable[..., Run],
) -> None:
    run = started(validate_every=0)
    list(loop.train(run))
    play = widgets.compare_with_base(run)
    assert play.prompt.value == "a {} dog on the beach"
    play.steps.value, play.count.value, play.seed.value = 5, 2, 7
    play.button.click()
    play.check()
    play.negative_prompt.value = "snow <b>"
    last = play.draw()
    assert play.gallery[-1] is last and len(play.gallery) == 2
    assert last.prompt == "a ohwx dog on the beach"
    assert list(last.images) == ["base", tuned := "run, step 4"]
    assert [made.seed for made in last.images["base"]] == [7, 8]
    newest, first = play.entries.children
    assert "negative prompt “snow &lt;b&gt;”" in texts(newest) and "negative" not in texts(first)
    assert [text in texts(first) for text in ("base, seed 7", f"{tuned}, seed 8")] == [True, True]
    drawn = [picture.tobytes() for picture in images(newest)]
    asked = {name: [made.image.tobytes() for made in row] for name, row in last.images.items()}
    assert drawn == [asked["base"][0], asked[tuned][0], asked["base"][1], asked[tuned][1]]
    assert asked["base"] != asked[tuned]
    play.guidance.value = 1.0
    with pytest.warns(UserWarning, match="negative prompt 'snow <b>' is ignored"):
        assert play.draw().negative_prompt == ""
    play.guidance.value = 7.5
    play.prompt.value, play.count.value = "", 1
    play.draw()
    assert "No prompt, negative prompt “snow" in texts(play.entries.children[0])
    rows = [child for child in newest.children if isinstance(child, HBox) and images(child)]
    assert [len(images(row)) for row in rows] == [2, 2], "a row for each seed"


def test_a_run_called_base_is_not_taken_for_the_base(
    started: Callable[..., Run], tmp_path: Path
) -> None:
    run = started(validate_every=0)
    list(loop.train(run))
    shutil.rmtree(run.folder / "checkpoints")
    play = widgets.compare_with_base(runs.resume(run.folder.rename(tmp_path / "base")))
    assert play.left.options == ("base", "base, tuned")


def test_a_playground_goes_on_with_the_gallery_of_an_earlier_one(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(validate_every=0, checkpoint_every=2)
    list(loop.train(run))
    first = widgets.compare_with_base(run, 2)
    first.steps.value, first.prompt.value, first.seed.value = 5, "a {} dog in space", 3
    monkeypatch.setattr(playground.secrets, "randbelow", lambda limit: limit - 1)
    first.new_seed.click()
    first.check()
    assert first.seed.value == 2**31 - 1 == first.gallery[0].images["base"][0].seed
    assert first._drawing.layout.display == "none" and first.progress.value == 2
    second = widgets.compare_with_base(run, 4, earlier=first)
    assert second.gallery == first.gallery and second.prompt.value == "a {} dog in space"
    second.draw()
    assert "run, step 2, seed" in texts(second.entries.children[1])
    assert "run, step 4, seed" in texts(second.entries.children[0])


@pytest.mark.parametrize("another", [False, True])
def test_steps_and_guidance_go_on_with_the_same_base_only(
    another: bool, started: Callable[..., Run], tiny_sd1: str
) -> None:
    first = widgets.compare_with_base(started())
    began = first.steps.value, first.guidance.value
    first.steps.value, first.guidance.value, first.seed.value = 7, 1.5, 3
    run = started("other")
    config = run.config.replace(base=tiny_sd1 if another else run.config.base)
    second = widgets.compare_with_base(Run(run.folder, config), earlier=first)
    expected = began if another else (7, 1.5)
    assert (second.steps.value, second.guidance.value) == expected and second.seed.value == 3


def test_images_are_saved_with_the_settings_that_a1111_reads(
    started: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = started(validate_every=0)
    list(loop.train(run))
    play = widgets.compare_with_base(run)
    play.steps.value, play.guidance.value, play.seed.value = 5, 4.5, 7
    play.negative_prompt.value = "snow, fog"
    play.draw()
    for _ in range(2):
        (save,) = [b for b in buttons(play.entries) if b.description == "Save these images"]
        save.click()
    play.check()
    files = sorted(path.name for path in Path("images/run").iterdir())
    assert files == [
        f"{n}-{name}-seed7.png" for n in ("0001", "0002") for name in ("base", "run-step-4")
    ]
    with PIL_Image.open(Path("images/run", files[0])) as image:
        saved, pixels = image.info["parameters"], image.tobytes()
    assert pixels == play.gallery[0].images["base"][0].image.tobytes()
    prompt, negative, settings = saved.splitlines()
    assert (prompt, negative) == ("a ohwx dog on the beach", "Negative prompt: snow, fog")
    pairs = dict(part.split(": ") for part in settings.split(", "))
    size = pairs.pop("Size")
    assert size == "16x16" and pairs == {
        "Steps": "5", "Sampler": "DDIM", "CFG scale": "4.5", "Seed": "7", "Model": "base"
    }  # fmt: skip
    assert {image.info["parameters"] for image in images(play)} > {saved}, "on the page as well"


def test_any_two_sources_can_be_compared(started: Callable[..., Run]) -> None:
    run = started(validate_every=0, checkpoint_every=2)
    list(loop.train(run))
    sources = {"step 2": (run, 2), "step 4": (run, 4), "end": run}
    pair = widgets.Playground(sources, run.config.subject, "a {} dog")
    pair.steps.value = 5
    pair.left.value, pair.right.value = "step 4", "end"
    left, right = (rows[0].image.tobytes() for rows in pair.draw().images.values())
    assert left == right, "the run ended with step 4's weights"
    pair.left.value = "step 2"
    left, right = (rows[0].image.tobytes() for rows in pair.draw().images.values())
    assert left != right and set(loaded_models.LOADED) == {(run, 2), run}


def test_models_of_earlier_playgrounds_are_freed(
    started: Callable[..., Run], shown: list[Widget]
) -> None:
    run = started(validate_every=0)
    list(loop.train(run))
    play = widgets.compare_with_base(run)
    play.steps.value = 5
    play.draw()
    models = [weakref.ref(family) for family in loaded_models.LOADED.values()]
    assert len(models) == 2 and all(model() is not None for model in models)
    again = widgets.compare_with_base(run)
    assert [model() for model in models] == [None, None], "as when its cell is run again"
    again.steps.value = 5
    again.draw()
    assert play.draw().prompt, "an earlier playground loads its models again"
    list(widgets.monitor(run))
    assert not loaded_models.LOADED, "training has the memory for itself"


@pytest.mark.parametrize("kind", ["interrupt", "error"])
def test_a_session_is_freed_once_its_cell_has_ended(
    kind: str, started: Callable[..., Run], shown: list[Widget], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, finished, trainers = started(), Trainer.finished, []

    def stopped(trainer: Trainer) -> bool:
        if trainer.step == 2:
            trainers.append(weakref.ref(trainer))
            raise KeyboardInterrupt if kind == "interrupt" else RuntimeError("out of memory")
        return finished(trainer)

    monkeypatch.setattr(Trainer, "finished", stopped)
    with pytest.raises((KeyboardInterrupt, RuntimeError)) as kept:  # as a notebook keeps it
        for _ in widgets.monitor(run):
            pass
    gpu_memory.free_memory()
    assert trainers[0]() is None and kept.value is not None and shown


def test_a_kept_error_holds_no_frames(
    settings: widgets.SettingsPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        pass

    models = []

    def fails(_config: TrainConfig) -> timing.Pace:
        model = Model()
        models.append(weakref.ref(model))
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("dreambooth_lib.notebook.widgets.settings.measure", fails)
    settings.predict.click()
    with pytest.raises(RuntimeError, match="out of memory"):
        settings.check()
    assert models[0]() is None
    settings.controls["resolution"].value = 8
    assert not settings.note.value, "other settings may work"


def test_the_playgrounds_base_is_the_runs_at_its_resolution(started: Callable[..., Run]) -> None:
    run = started(validate_every=0, resolution=24)
    list(loop.train(run))
    play = widgets.compare_with_base(run)
    play.steps.value = 5
    drawn = play.draw()
    assert {made.image.size for row in drawn.images.values() for made in row} == {(24, 24)}


def test_the_playground_warns_of_a_prompt_without_the_subject(started: Callable[..., Run]) -> None:
    play = widgets.compare_with_base(started())
    assert not play.advice.value
    play.prompt.value = "a dog in the snow"
    assert (
        "does not name your subject: write <code>a {} dog in the snow</code>" in play.advice.value
    )
    play.prompt.value = "a ohwx dog in the snow"
    assert not play.advice.value
    play.check()


@pytest.mark.parametrize(("side", "wide"), [(64, 256), (512, 480)])
def test_large_images_are_shown_larger(side: int, wide: int) -> None:
    sample = playground.Sample("a dog", 0, PIL_Image.new("RGB", (side, side)))
    entry = playground._show_entry(widgets.GalleryEntry("a dog", "", 5.0, 5, {"base": [sample]}))
    (column,) = entry.children[1].children
    assert (column.children[0].width, column.layout.width) == (str(wide), f"{wide}px")


def test_an_error_while_drawing_is_shown_and_raised_by_check(
    started: Callable[..., Run],
) -> None:
    play = widgets.compare_with_base(started())
    play.button.click()
    assert "has not finished; train it to its end" in play.note.value
    assert not play.button.disabled
    with pytest.raises(RunError, match="has not finished"):
        play.check()


def test_controls_have_labels_and_hints_and_html_has_no_colours(
    settings: widgets.SettingsPanel, subject: widgets.SubjectPanel
) -> None:
    for panel in (settings, subject):
        assert "color" not in texts(panel) and "background" not in texts(panel)
    told = html.unescape(texts(settings))
    assert all(HINTS[name] in told for name in settings.controls) and "font-size" not in told
    assert all(control.description for control in settings.controls.values())


def test_a_method_brings_its_own_learning_rate(photos: str, make_config: Make) -> None:
    from dreambooth_lib.notebook import widgets

    config = TrainConfig(make_config("toybox", photos).subject)
    settings = widgets.SettingsPanel(config)
    assert settings.config == config
    assert settings.controls["learning_rate"].label == "the method's default", "and not blank"
    settings.controls["method"].value = "lora"
    assert settings.config.learning_rate == TrainConfig(config.subject, method="lora").learning_rate
    assert "method=&#x27;lora&#x27;" in settings.python.value
    settings.controls["learning_rate"].value = 1e-4
    settings.controls["method"].value = "full"
    assert settings.config == config.replace(learning_rate=1e-4)


def test_an_adapter_is_chosen_beside_lora_alone(photos: str, make_config: Make) -> None:
    from dreambooth_lib.notebook import widgets

    config = TrainConfig(make_config("toybox", photos).subject)
    settings = widgets.SettingsPanel(config)
    assert settings.controls["adapter"].disabled
    settings.controls["method"].value = "lora"
    settings.controls["adapter"].value = "lokr"
    assert settings.config.adapter == "lokr" and not settings.controls["adapter"].disabled
    assert "adapter=&#x27;lokr&#x27;" in settings.python.value
    settings.controls["method"].value = "qlora"
    assert settings.config.adapter is None and settings.controls["adapter"].disabled
    own = config.replace(method="lora", adapter="lokr", adapter_settings={"decompose_factor": 2})
    assert widgets.SettingsPanel(own).config == own


def test_an_adapter_that_this_gpu_cannot_train_is_an_error_at_once(
    photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from dreambooth_lib.notebook import widgets

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    config = TrainConfig(make_config("toybox", photos).subject, method="lora")
    settings = widgets.SettingsPanel(config)
    settings.controls["adapter"].value = "delora"
    with pytest.raises(ConfigError, match="'delora', which produces NaN in float16"):
        settings.check()
    settings.controls["adapter"].value = "lokr"
    settings.check()


def test_gpu_memory_is_shown_with_its_level(
    tiny_sd1: str, photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from dreambooth_lib.notebook.widgets.settings import _memory

    config = make_config(tiny_sd1, photos)
    assert _memory(config) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (14 << 30, 15 << 30))
    assert "0.0 GiB</b> of the GPU's 15.0, at memory level 'standard'" in _memory(config)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1, 15 << 30))
    assert "'lowest'" in _memory(config)


def test_qlora_is_one_of_the_methods(photos: str, make_config: Make) -> None:
    from dreambooth_lib.notebook import widgets

    config = TrainConfig(make_config("toybox", photos).subject)
    settings = widgets.SettingsPanel(config)
    settings.controls["method"].value = "qlora"
    asked = settings.config
    assert (asked.method, asked.quantize) == ("lora", "nf4")
    assert "quantize=&#x27;nf4&#x27;" in settings.python.value
    again = widgets.SettingsPanel(asked)
    assert again.config == asked and again.controls["method"].value == "qlora"
    again.controls["method"].value = "full"
    assert again.config.quantize is None


def test_other_libraries_print_nothing_into_the_notebook(tmp_path: Path) -> None:
    code = (
        "from dreambooth_lib.families import loading; from dreambooth_lib.notebook import widgets; "
        "widgets.quiet(); loading.load_model('toybox'); import bitsandbytes"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_actions_in_threads_wait_for_each_other_and_a_busy_button_is_not_pressed_again() -> None:
    """As in a kernel that answers widgets in threads of their own."""
    button, other = Button(), Button()
    started, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def work() -> None:
        with parts.busy(button):
            started.set()
            assert go_on.wait(30)
            done.append("worked")

    panel = parts.Panel(button, other)
    button.on_click(panel.callback(work))
    other.on_click(panel.callback(lambda: done.append("other")))
    first = threading.Thread(target=button.click)
    first.start()
    assert started.wait(30)
    button.click()  # returns at once
    second = threading.Thread(target=other.click)
    second.start()
    second.join(0.2)
    assert second.is_alive() and not done
    go_on.set()
    first.join(30)
    second.join(30)
    assert done == ["worked", "other"]
    panel.check()
