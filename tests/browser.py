"""Drive a notebook in a real browser, in JupyterLab and in the classic Notebook.

Both are driven as by a person: with clicks, keys and the text on the page.
"""

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VIEW = {"width": 1200, "height": 2400}  #: high enough for the longest cell
#: Keep Lab from asking about news and from leaving out cells off the screen.
LAB_SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """A notebook application, and where things are on its page."""

    name: str
    arguments: tuple[str, ...]
    address: str  #: of a notebook, after the server's
    cell: str  #: a code cell
    editor: str
    prompt: str
    interrupt: str
    ready: str  #: on the page once the kernel is there
    outputs: str
    errors: str  #: a traceback


LAB = Stack(
    name="lab",
    arguments=("lab", "--ServerApp.token=", "--ServerApp.open_browser=False", "--ip=127.0.0.1"),
    address="doc/tree/{}",
    cell=".jp-CodeCell",
    editor=".jp-InputArea-editor",
    prompt=".jp-InputPrompt",
    interrupt='[data-command="notebook:interrupt-kernel"]',
    ready="#jp-main-statusbar :text('| Idle')",
    outputs=".jp-Cell-outputWrapper",
    errors='[data-mime-type="application/vnd.jupyter.error"]',
)
CLASSIC = Stack(
    name="classic",
    arguments=("notebook", "--NotebookApp.token=", "--NotebookApp.open_browser=False",
               "--ip=127.0.0.1"),
    address="notebooks/{}",
    cell=".code_cell",
    editor=".input_area",
    prompt=".input_prompt",
    interrupt="#interrupt button, button[data-jupyter-action='jupyter-notebook:interrupt-kernel']",
    ready="#kernel_indicator_icon.kernel_idle_icon",
    outputs=".output_wrapper",
    errors=".output_error",
)  # fmt: skip


@contextmanager
def served(
    stack: Stack, python: str, folder: Path, *arguments: str, **variables: str
) -> Iterator[str]:
    """Serve ``folder`` with more arguments and environment variables; yield its address."""
    settings = folder / ".lab"
    for name, values in LAB_SETTINGS.items():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTER_CONFIG_DIR": str(folder / ".jupyter"),
        "JUPYTER_DATA_DIR": str(folder / ".jupyter-data"),
        "IPYTHONDIR": str(folder / ".ipython"),
        **variables,
    }
    command = [python, "-m", "jupyter", *stack.arguments, f"--port={port}", "--allow-root"]
    command += arguments
    with (folder / ".server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    try:
        _wait(address, server, folder / ".server.log")
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _wait(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}api", timeout=2).read()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the notebook's server did not start:\n{log.read_text()[-2000:]}")


class Page:
    """A notebook, open in a tab."""

    def __init__(self, tab: Any, stack: Stack, address: str, name: str, screenshots: Path):
        self.tab, self.stack, self.screenshots = tab, stack, screenshots
        tab.goto(address + stack.address.format(name))
        tab.locator(stack.ready).first.wait_for(timeout=120_000, state="attached")

    def cell(self, number: int) -> Any:
        return self.tab.locator(self.stack.cell).nth(number)

    def start(self, number: int) -> None:
        """Run the code cell of this number as a person does: click, Shift and Enter."""
        if (folded := self.cell(number).locator(".jp-Placeholder-content")).count():
            folded.first.click()  # which unfolds it
        self.cell(number).locator(self.stack.editor).first.click()
        self.tab.keyboard.press("Shift+Enter")

    def finish(self, number: int, seconds: float = 300) -> str:
        """Wait until a cell has run; return the text of its output."""
        prompt = self.cell(number).locator(self.stack.prompt).first
        until = time.monotonic() + seconds
        while not any(letter.isdigit() for letter in prompt.inner_text()):
            assert time.monotonic() < until, f"cell {number} still runs after {seconds} s"
            time.sleep(0.2)
        return self.text(number)

    def run(self, number: int, seconds: float = 300) -> str:
        self.start(number)
        text = self.finish(number, seconds)
        assert not self.cell(number).locator(self.stack.errors).count(), text
        return text

    def text(self, number: int) -> str:
        return self.cell(number).locator(self.stack.outputs).first.inner_text()

    def wait_for(self, number: int, text: str | re.Pattern[str], seconds: float = 300) -> None:
        place = self.cell(number).locator(self.stack.outputs).get_by_text(text).first
        place.wait_for(timeout=1000 * seconds)

    def interrupt(self) -> None:
        self.tab.locator(self.stack.interrupt).first.click()

    def control(self, number: int, label: str) -> Any:
        """Return the row of a cell's output with this control."""
        rows = self.cell(number).locator(".widget-inline-hbox")
        return rows.filter(has=self.tab.get_by_text(label, exact=True)).first

    def drag(self, number: int, label: str, pixels: int) -> str:
        """Drag a slider's handle to the right; return its new readout."""
        control = self.control(number, label)
        handle = control.locator(".noUi-handle, .ui-slider-handle").first
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.tab.mouse.move(x, y)
        self.tab.mouse.down()
        self.tab.mouse.move(x + pixels, y, steps=8)
        self.tab.mouse.up()
        return control.locator(".widget-readout").inner_text()

    def type(self, number: int, label: str, text: str) -> None:
        field = self.control(number, label).locator("input").first
        field.fill(text)
        field.press("Enter")

    def upload(self, number: int, files: list[Path]) -> None:
        with self.tab.expect_file_chooser() as chooser:
            self.cell(number).locator("button", has_text="Upload photos").click()
        chooser.value.set_files(files)

    def shoot(self, number: int, name: str) -> None:
        """Take a screenshot of a cell with its output."""
        self.tab.wait_for_timeout(500)
        self.screenshots.mkdir(parents=True, exist_ok=True)
        self.cell(number).screenshot(path=self.screenshots / f"{name}.png")
