"""Test what is special to Colab with a fake of its package: secrets, uploads, Drive."""

import io
import os
import re
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from fake_colab import FakeColab, NotebookAccessError, SecretNotFoundError, TimeoutException
from PIL import Image

from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.hub_token import hub_token
from dreambooth_lib.core.user_text import without_private
from dreambooth_lib.data.images import DataError, read_photos
from dreambooth_lib.data.subjects import load_subject
from dreambooth_lib.families import hub_files
from dreambooth_lib.notebook import colab, drive_worker

TOKEN = "hf_notAToken"


@pytest.fixture(autouse=True)
def no_token_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


PHOTOS = {"red.png": png("red"), "blue.png": png("blue")}


# Token


def test_outside_colab_it_is_not_asked_for_anything() -> None:
    assert not colab.in_colab()
    assert hub_token() is None and colab.mount_drive() is None


def test_the_token_is_colabs_secret(fake_colab: FakeColab) -> None:
    assert colab.in_colab()
    fake_colab.secrets["HF_TOKEN"] = f" {TOKEN}\n"
    assert hub_token() == TOKEN


@pytest.mark.parametrize(
    "secret", [TimeoutException(), SecretNotFoundError(), NotebookAccessError(), " "]
)
def test_without_a_secret_the_environment_counts_or_it_is_anonymous(
    fake_colab: FakeColab, monkeypatch: pytest.MonkeyPatch, secret: str | Exception
) -> None:
    fake_colab.secrets["HF_TOKEN"] = secret
    assert hub_token() is None
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    assert hub_token() == TOKEN
    once = isinstance(secret, TimeoutException | NotebookAccessError)
    assert fake_colab.asked == ["secret HF_TOKEN"] * (1 if once else 2)


@pytest.mark.parametrize("answer", [TimeoutException(), NotebookAccessError()])
def test_a_secret_that_was_asked_for_in_vain_is_asked_for_again_only_where_it_is_needed(
    fake_colab: FakeColab, answer: Exception
) -> None:
    fake_colab.secrets["HF_TOKEN"] = answer
    assert [hub_token(), hub_token()] == [None, None]
    assert len(fake_colab.asked) == 1, "each question is a dialog on the page"
    fake_colab.secrets["HF_TOKEN"] = TOKEN
    assert hub_token(ask_again=True) == TOKEN == hub_token()


def test_huggingface_hub_does_not_ask_for_the_same_secret_once_more(
    fake_colab: FakeColab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does where it finds Colab's own shell, which no test has."""
    from huggingface_hub.utils import _auth

    monkeypatch.setattr(huggingface_hub, "get_token", _auth.get_token)
    monkeypatch.setattr(_auth, "is_google_colab", lambda: True)
    monkeypatch.setattr(_auth, "_IS_GOOGLE_COLAB_CHECKED", False)
    fake_colab.secrets["HF_TOKEN"] = NotebookAccessError()
    assert hub_token(ask_again=True) is None
    assert len(fake_colab.asked) == 1


def test_the_session_ends_on_colab_alone(fake_colab: FakeColab) -> None:
    colab.end_session()
    assert fake_colab.asked == ["flush and unmount", "unassign"]


def test_the_session_goes_on_where_drive_was_not_written(
    fake_colab: FakeColab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("flush failed")

    monkeypatch.setattr(sys.modules["google.colab.drive"], "flush_and_unmount", fail)
    with pytest.raises(KitError, match=r"not taken all files \(ValueError: flush failed\), and"):
        colab.end_session()
    assert fake_colab.asked == []


def test_the_session_goes_on_until_every_backup_is_complete(
    fake_colab: FakeColab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    thawed, problem = threading.Event(), "it is full."

    def backup(*given: Any) -> str | None:
        thawed.wait(60)
        return problem

    monkeypatch.setattr(drive_worker, "backup", backup)
    run = SimpleNamespace(folder=tmp_path / "run")
    gone = SimpleNamespace(folder=tmp_path / "gone")
    run.folder.mkdir()
    (run.folder / "config.toml").touch()
    for one in (gone, run):  # a run's folder may be deleted after its backup
        place = tmp_path / "drive" / one.folder.name
        drive_worker.Backup(one, place, limit=0.2).save()  # type: ignore[arg-type]
    with pytest.raises(colab.DriveError, match=r"has not ended within.*; the session was not"):
        colab.end_session()
    thawed.set()
    for copying in drive_worker._under_way.values():
        copying.result.result(30)
    with pytest.raises(colab.DriveError, match="it is full; the session was not ended: run this"):
        colab.end_session()
    assert fake_colab.asked == []
    problem = None
    colab.end_session()
    assert fake_colab.asked == ["flush and unmount", "unassign"]


def test_elsewhere_no_session_ends(fake_colab: FakeColab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colab, "in_colab", lambda: False)
    colab.end_session()
    assert fake_colab.asked == []


def test_an_unknown_fault_of_the_secrets_is_not_hidden(fake_colab: FakeColab) -> None:
    fake_colab.secrets["HF_TOKEN"] = RuntimeError("what is this")
    with pytest.raises(RuntimeError):
        hub_token()


def test_the_token_is_not_printed_and_leaves_the_environment_with_the_secret(
    fake_colab: FakeColab, capsys: pytest.CaptureFixture[str]
) -> None:
    for token in (TOKEN, f"{TOKEN}2"):  # the user may replace it
        fake_colab.secrets["HF_TOKEN"] = token
        hub_token()
        assert [name for name, value in os.environ.items() if token in value] == ["HF_TOKEN"]
    assert TOKEN not in without_private(repr(os.environ)) + "".join(capsys.readouterr())
    del fake_colab.secrets["HF_TOKEN"]
    hub_token()
    assert "HF_TOKEN" not in os.environ
    os.environ["HF_TOKEN"] = TOKEN  # the user's own
    hub_token()
    assert os.environ["HF_TOKEN"] == TOKEN


@pytest.mark.parametrize("answer", [TimeoutException(), NotebookAccessError(), ""])
def test_a_base_is_downloaded_with_a_secret_that_was_added_after_a_refusal(
    fake_colab: FakeColab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str | Exception
) -> None:
    def download(*given: str, revision: str | None, token: str | None = None) -> str:
        if (token or os.environ.get("HF_TOKEN")) != TOKEN:
            refusal = Exception("401")
            refusal.response = SimpleNamespace(status_code=401)  # type: ignore[attr-defined]
            raise refusal
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    fake_colab.secrets["HF_TOKEN"] = answer
    with pytest.raises(KitError, match="your access is refused"):
        hub_files.download("maker/base", "model_index.json", None)
    fake_colab.secrets["HF_TOKEN"] = TOKEN
    assert hub_files.download("maker/base", "model_index.json", None) == tmp_path
    assert os.environ["HF_TOKEN"] == TOKEN, "where diffusers and transformers find it"


# Uploads


def test_an_upload_is_a_folder_that_a_subject_loads_from(
    fake_colab: FakeColab, tmp_path: Path
) -> None:
    fake_colab.uploads = PHOTOS
    folder = colab.upload(tmp_path / "photos")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == PHOTOS
    with pytest.warns(UserWarning, match="blurred"):
        subject = load_subject(folder, class_noun="dog", name="rex")
    assert subject.photos == str(folder) and len(read_photos(subject.photos)) == 2


def test_photos_that_are_uploaded_again_keep_their_names(
    fake_colab: FakeColab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_colab.uploads = PHOTOS
    (tmp_path / "red.png").write_bytes(b"dragged into the Files panel")
    first = colab.upload("photos")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == PHOTOS
    assert colab.upload("photos") == first and Path.cwd() == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "red.png"]


def test_outside_colab_there_is_no_upload(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="load_subject"):
        colab.upload(tmp_path)


def test_uploads_do_not_mix_and_the_same_one_is_the_same_folder(tmp_path: Path) -> None:
    first = colab.save_uploads(PHOTOS, tmp_path)
    second = colab.save_uploads({"red.png": png("green")}, tmp_path)
    assert first != second and first.parent == second.parent == tmp_path
    assert [path.name for path in second.iterdir()] == ["red.png"]
    assert (first / "red.png").read_bytes() == PHOTOS["red.png"]
    assert colab.save_uploads(dict(reversed(PHOTOS.items())), tmp_path) == first
    assert sorted(tmp_path.iterdir()) == sorted([first, second])


def test_what_a_widget_gives_is_saved_too(tmp_path: Path) -> None:
    views = {name: memoryview(content) for name, content in PHOTOS.items()}
    assert colab.save_uploads(views, tmp_path) == colab.save_uploads(PHOTOS, tmp_path)


def test_a_zip_is_kept_as_it_is_and_read(tmp_path: Path) -> None:
    source = colab.save_uploads({"mine.ZIP": packed(PHOTOS)}, tmp_path)
    assert [photo.name for photo in read_photos(source)] == ["blue.png", "red.png"]


def test_a_zip_that_leaves_its_folder_is_refused_when_it_is_read(tmp_path: Path) -> None:
    source = colab.save_uploads({"bad.zip": packed({"../red.png": png("red")})}, tmp_path)
    with pytest.raises(DataError, match="leads out of the zip"):
        read_photos(source)
    assert not (tmp_path / "red.png").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "nothing was uploaded"),
        ({"a.zip": packed(PHOTOS), "b.png": png("red")}, "'a.zip' was uploaded with other files"),
        ({"a.zip": packed(PHOTOS), "b.zip": packed(PHOTOS)}, "'a.zip' was uploaded with other"),
    ],
)
def test_an_upload_that_is_no_subject_is_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        colab.save_uploads(files, tmp_path / "photos")
    assert not (tmp_path / "photos").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a\nb.png", "contains the invisible character U+000A; retype it without it."),
        ("\x1b[2J.png", "contains the invisible character U+001B; retype it without it."),
        ("é" * 120 + ".png", "is 244 bytes long; use 200 or fewer."),
        ("con.png", "is 'con.png', which is reserved on Windows; give another name."),
        ("LPT1 .a.png", "is 'LPT1 .a.png', which is reserved on Windows; give another name."),
        ("\udc80.png", "contains the invisible character U+DC80; retype it without it."),
    ],
)
def test_a_name_that_not_every_disk_takes_is_refused(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(DataError, match=f"name of the upload .* {re.escape(why)}") as caught:
        colab.save_uploads({"good.png": png("red"), name: png("red")}, tmp_path / "photos")
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_names_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="upper and lower case"):
        colab.save_uploads({"a.PNG": png("red"), "A.png": png("blue")}, tmp_path / "photos")
    for name in ("Screenshot at 3.45\u202fPM.png", "\U0001f469\u200d\U0001f467.png"):
        saved = colab.save_uploads({name: png("red")}, tmp_path / "photos")
        assert [photo.name for photo in read_photos(saved)] == [name]


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "b/a.png", "b\\a.png", "..", ".", "", "a\0"]
)
def test_a_name_that_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=re.escape(repr(name))):
        colab.save_uploads({"good.png": png("red"), name: png("red")}, tmp_path / "photos")
    assert list(tmp_path.iterdir()) == []


def test_an_upload_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes, write: Callable = Path.write_bytes) -> int:
        if path.name == "blue.png":
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskError, match="disk is full"):
        colab.save_uploads(PHOTOS, tmp_path / "photos")
    assert list((tmp_path / "photos").iterdir()) == []


def test_a_file_is_downloaded_by_the_browser(fake_colab: FakeColab, tmp_path: Path) -> None:
    colab.download(tmp_path / "my-dog.zip")
    assert fake_colab.asked == [f"download {tmp_path}/my-dog.zip"]


# Drive


def test_drive_is_mounted_and_gives_a_folder(fake_colab: FakeColab) -> None:
    folder = colab.mount_drive()
    assert folder == fake_colab.mount_point / "MyDrive" / "dreambooth" and folder.is_dir()
    (folder / "run").mkdir()
    assert colab.mount_drive() == folder, "a second time is as good"


@pytest.mark.parametrize("drive", ["refused", "empty"])
def test_without_drive_it_says_so_and_goes_on(fake_colab: FakeColab, drive: str) -> None:
    fake_colab.drive = drive
    with pytest.warns(UserWarning, match="Drive could not be mounted.*run this cell again"):
        assert colab.mount_drive() is None
    assert not (fake_colab.mount_point / "MyDrive").exists(), "no Drive is made up"
