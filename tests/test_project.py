"""What the project says of itself agrees: its version, address, commands, links and forms."""

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

import dreambooth_lib
from dreambooth_lib.__main__ import parser
from tools import address

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
#: Pages that people read first; ``make docs`` checks the links of all.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/usage.md")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_there_is_one_version_number() -> None:
    assert "version" in PROJECT["dynamic"]  # it is the package's own
    newest = re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == dreambooth_lib.__version__
    assert metadata("dreambooth-lib")["Version"] == dreambooth_lib.__version__


def test_one_repository_is_named_everywhere() -> None:
    links = re.compile(
        r"https://(?:colab\.research\.google\.com/)?github(?:\.com)?/([\w.-]+/[\w-]+)"
    )
    own = address.current()
    for name in address.FILES:
        found = set(links.findall((ROOT / name).read_text()))
        assert own in found, name
    for name in ("pyproject.toml", "CITATION.cff", "mkdocs.yml"):
        assert set(links.findall((ROOT / name).read_text())) == {own}
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]
    assert cited["license"] == PROJECT["license"]


@pytest.mark.parametrize("page", PAGES)
def test_the_links_and_commands_of_a_page_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    assert set(re.findall(r"make ([a-z0-9-]+)(?=[`\s,])(?=.*)", _code(text))) <= targets()
    commands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    named = re.findall(r"python -m dreambooth_lib (?!--)([a-z]+)", text)
    assert set(named) <= set(commands or ())


def _code(text: str) -> str:
    """Return what is code in Markdown: indented lines, and what stands in backticks."""
    blocks = [line for line in text.splitlines() if line.startswith("    ")]
    return "\n".join([*(f"{span} " for span in re.findall(r"`([^`]+)`", text)), *blocks])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_issue_forms_can_be_read_and_ask_for_the_report(form: Path) -> None:
    read = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert read["blank_issues_enabled"] is False
        return
    assert {"name", "description", "body"} <= read.keys()
    fields = [field for field in read["body"] if field["type"] == "textarea"]
    assert all({"label"} <= field["attributes"].keys() for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    asked = "python -m dreambooth_lib report" in form.read_text()
    assert asked == (form.stem != "idea")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_workflows_run_what_is_there(workflow: Path) -> None:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    for command in commands:
        assert set(re.findall(r"^make (\S+)", command)) <= targets()
        for module in re.findall(r"python -m (tools\.\w+)", command):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
        if command.startswith("."):
            assert (ROOT / command).exists()


def test_each_supported_python_is_tested_and_named() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    tested = jobs["newest"]["strategy"]["matrix"]["python"]
    named = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert tested == named == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={tested[0]}"
