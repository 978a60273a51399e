"""Describe a machine for an issue, without anything private."""

import getpass
import sys
from pathlib import Path, PureWindowsPath

import pytest

from dreambooth_lib import __main__ as command
from dreambooth_lib.core.user_text import without_private
from dreambooth_lib.notebook import preflight, report

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
SECRET = "a-key-of-no-known-kind"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Plant a token, a key, a user and a home folder in the checks of a machine."""
    home = tmp_path / "home" / "johanna"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "johanna")
    checks = [
        preflight.Check("base", False, f"{home}/models with {TOKEN}", f"Ask johanna for {SECRET}."),
        preflight.Check("disk", True, f"https://johanna:{SECRET}@example.org/a /home/peter/b"),
    ]
    monkeypatch.setattr(preflight, "preflight", lambda base, folder: checks)
    return home


def test_the_report_has_versions_and_checks_and_nothing_private(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert getpass.getuser() == "johanna" and Path.home() == planted
    monkeypatch.setattr(sys, "argv", ["dreambooth_lib", "report", "--base", "toybox"])
    command.main()
    shown = capsys.readouterr().out
    for private in (TOKEN, SECRET, "johanna", "peter", str(planted), str(planted.parent)):
        assert private not in shown
    assert "~/models with [hidden]" in shown and "https://example.org/a ~/b" in shown
    assert "Ask [user] for [hidden]." in shown
    for name in ("dreambooth_lib", "Python", "torch", "diffusers", "numpy"):
        assert f"\n| {name} | " in shown
    assert "pytest" not in shown and "✗ to fix" in shown


def test_the_report_has_the_checks_of_the_base_that_it_is_of() -> None:
    assert "'toybox' is on this machine" in report.report()
    assert "'nobody/nothing'" in report.report("nobody/nothing")


def test_a_home_at_the_root_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert without_private("/data/false, 3 of 4") == "/data/false, 3 of 4"


def test_a_users_name_is_no_part_of_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    assert without_private("cannot ask ann") == "cannot ask [user]"

    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert without_private("cannot ask ann") == "cannot ask ann"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("C:/Users/John Smith/kit", "~/kit"),
        (r"C:\Users\John Smith\kit", r"~\kit"),
        (repr(r"c:\users\john smith\kit"), r"'~\\kit'"),
        ("/mnt/c/Users/John Smith/kit", "/mnt~/kit"),
        ("in C:/Users/peter or in D:/data", "in ~ or in D:/data"),
        ("in /home/peter or in data/kit", "in ~ or in data/kit"),
        ("D:/People/Ann Lee/kit and D:/People/Ann Leeds/kit", "~/kit and D:/People/Ann Leeds/kit"),
        (r"d:\people\ann lee", "~"),
    ],
)
def test_homes_are_left_out_by_any_writing(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Windows(PureWindowsPath):
        def resolve(self) -> PureWindowsPath:
            return self

    home = Windows(r"D:\People\Ann Lee")
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    assert without_private(text) == shown


def test_a_users_name_is_found_beside_an_underscore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    text = "/data/alice_runs my_alice alice2 malice"
    assert without_private(text) == "/data/[user]_runs my_[user] alice2 malice"


@pytest.mark.parametrize(
    "name", ["DB_PASS", "PGPASSWORD", "MYSQL_PWD", "AZURE_CREDENTIAL", "db_credentials"]
)
def test_values_of_secret_variables_are_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "open-sesame")
    monkeypatch.setenv("PWD", "/data/project")  # the working folder
    assert without_private("open-sesame in /data/project") == "[hidden] in /data/project"
