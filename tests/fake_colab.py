"""A stand-in for ``google.colab``: the fixture of that name makes this process one on Colab."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from dreambooth_lib.core import hub_token
from dreambooth_lib.notebook import colab, drive_worker


class Error(Exception):
    """As ``google.colab.errors.Error``, of which the three below are."""


class SecretNotFoundError(Error):
    pass


class NotebookAccessError(Error):
    pass


class TimeoutException(Error):
    pass


@dataclass
class FakeColab:
    """Hold what the user of this Colab has and does; change it before the code under test asks."""

    mount_point: Path
    secrets: dict[str, str | Exception] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    drive: str = "there"  #: or "refused", or "empty": mounted, but with nothing behind it
    asked: list[str] = field(default_factory=list)

    def get(self, name: str) -> str:
        self.asked.append(f"secret {name}")
        secret = self.secrets.get(name, SecretNotFoundError(name))
        if isinstance(secret, Exception):
            raise secret
        return secret

    def upload(self) -> dict[str, bytes]:
        """Write the uploads into the working directory, and return them by their names there."""
        self.asked.append("upload")
        uploaded = {}
        for name, content in self.uploads.items():
            place, number = Path(name), 0
            while place.exists():
                number += 1
                place = Path(f"{Path(name).stem} ({number}){Path(name).suffix}")
            place.write_bytes(content)
            uploaded[str(place)] = content
        return uploaded

    def download(self, file: str) -> None:
        self.asked.append(f"download {file}")

    def unassign(self) -> None:
        self.asked.append("unassign")

    def flush_and_unmount(self) -> None:
        self.asked.append("flush and unmount")

    def mount(self, mount_point: str, force_remount: bool = False) -> None:
        self.asked.append(f"mount {mount_point}")
        if self.drive == "refused":
            raise ValueError("mount failed")
        if self.drive == "there":
            (Path(mount_point) / "MyDrive").mkdir(parents=True, exist_ok=True)


@pytest.fixture
def fake_colab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeColab:
    fake = FakeColab(tmp_path / "content" / "drive")
    members = {
        "userdata": {"get": fake.get, "SecretNotFoundError": SecretNotFoundError,
                     "NotebookAccessError": NotebookAccessError,
                     "TimeoutException": TimeoutException},
        "files": {"upload": fake.upload, "download": fake.download},
        "drive": {"mount": fake.mount, "flush_and_unmount": fake.flush_and_unmount},
        "runtime": {"unassign": fake.unassign},
        "errors": {"Error": Error},
    }  # fmt: skip
    package = ModuleType("google.colab")
    for name, contents in members.items():
        module = ModuleType(f"google.colab.{name}")
        vars(module).update(contents)
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    google = ModuleType("google")
    google.colab = package  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setattr(drive_worker, "_under_way", {})
    monkeypatch.setattr(colab, "MOUNT", fake.mount_point)
    monkeypatch.setattr(hub_token, "_asked_in_vain", False)
    monkeypatch.setattr(hub_token, "_passed_on", None)
    monkeypatch.setenv("HF_TOKEN", "")  # such that it is as before after the test
    monkeypatch.delenv("HF_TOKEN")
    return fake
