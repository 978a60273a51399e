"""Use notebook 01 in a real browser as a person does, in JupyterLab and in the classic Notebook.

Screenshots of each step go to ``outputs/browser/STACK``. The tests need Debian's chromium. The
classic Notebook runs on the environment whose Python ``DREAMBOOTH_TEST_COLAB_PYTHON`` names.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browser import CLASSIC, LAB, ROOT, VIEW, Page, Stack, served
from PIL import Image
from test_notebooks import NOTEBOOKS, codes

from dreambooth_lib.families.loading import BUNDLED
from dreambooth_lib.training import runs

CHROMIUM = shutil.which("chromium")
PYTHONS = {"lab": sys.executable, "classic": os.environ.get("DREAMBOOTH_TEST_COLAB_PYTHON")}
#: More steps make screenshots for the docs, of images that are drawn as a person's are.
SHOWN = os.environ.get("DREAMBOOTH_TEST_BROWSER_STEPS")
STEPS = int(SHOWN or 24)
DRAWN = "" if SHOWN else '"prior_inference_steps": 2, "validation_inference_steps": 2, '
SHORT = f'"steps": {STEPS}, "class_images": 24, "validate_every": {STEPS // 4}'
SHORTEST = '"steps": 4, "class_images": 4, "validate_every": 4'
(SETUP, PARAMETERS, PREFLIGHT, BEGIN, SUBJECT, SETTINGS, CLASS, TRAIN, CHECKPOINT, PLAY, KEEP,
 SHARE, FILE, END) = range(14)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]


@contextmanager
def opened(
    stack: Stack, folder: Path, name: str, *arguments: str, **variables: str
) -> Iterator[Page]:
    """Open a notebook of a folder on a server with these arguments and variables."""
    from playwright.sync_api import sync_playwright

    python = PYTHONS[stack.name]
    if python is None:
        pytest.skip("needs the second environment")
    with (
        served(stack, python, folder, *arguments, **variables) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport=VIEW)
        screenshots = ROOT / "outputs" / "browser" / stack.name
        yield Page(tab, stack, address, name, screenshots)
        tab.screenshot(path=screenshots / "end.png")
        browser.close()


@pytest.fixture(params=[LAB, CLASSIC], ids=lambda stack: stack.name)
def stack(request: pytest.FixtureRequest) -> Stack:
    return request.param


@pytest.fixture
def page(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    notebook = json.loads(NOTEBOOKS["01_dreambooth"].read_text())
    settings = f"SETTINGS = {{{DRAWN}{getattr(request, 'param', SHORT)}}}"
    codes(notebook)[PARAMETERS]["source"] += ["\n", settings]
    (tmp_path / "01_dreambooth.ipynb").write_text(json.dumps(notebook))
    with opened(stack, tmp_path, "01_dreambooth.ipynb") as page:
        yield page


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make five JPEGs of nearly 4 MB each, like a phone's."""
    folder, rng = tmp_path_factory.mktemp("phone"), np.random.default_rng(0)
    for number in range(5):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((2000, 1600))
        fine = rng.integers(-60, 61, (1600, 2000, 3), np.int16)
        pixels = np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"IMG_{number}.jpg", quality=99)
    files = sorted(folder.iterdir())
    assert 18e6 < sum(file.stat().st_size for file in files) < 25e6
    return files


#: Cells: the subject's panel, the photos of its config, and a download link.
PANEL = ("from dreambooth_lib import TrainConfig, load_subject",
         "from dreambooth_lib.export import zip_download",
         "from dreambooth_lib.families import loading",
         "from dreambooth_lib.notebook import widgets",
         'subject = load_subject(loading.BUNDLED / "subjects" / "patch_dog", "dog")',
         "panel = widgets.SubjectPanel(TrainConfig(subject))",
         "panel")  # fmt: skip
CHOSEN = ("print(panel.config.subject.photos)",)
LINK = ('zip_download.download_link("models/rex.zip")',)


def write_panel(folder: Path) -> str:
    cells = [
        {"cell_type": "code", "id": str(number), "metadata": {}, "outputs": [],
         "execution_count": None, "source": "\n".join(lines)}
        for number, lines in enumerate((PANEL, CHOSEN, LINK))
    ]  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel},
                "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
    (folder / "mine" / "models").mkdir(parents=True)
    (folder / "mine" / "panel.ipynb").write_text(json.dumps(notebook))
    return "mine/panel.ipynb"


def make_lab() -> tuple[dict[str, str], list[str]]:
    """Return the environment variables and the server's arguments of ``make lab``."""
    dry = ["make", "--dry-run", "--no-print-directory", "--old-file=.venv/ready", "lab"]
    # Else this make, run by the one that runs the tests, would print its folder first.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        dry, cwd=ROOT, check=True, capture_output=True, text=True, env=environment
    )
    words = shlex.split(done.stdout.replace("\\\n", ""))
    start = words.index("-m") - 1
    variables = dict(word.split("=", 1) for word in words[:start])
    return variables, [word for word in words[start:] if word.startswith("--")]


def test_make_lab_accepts_photos_of_18_mb(stack: Stack, tmp_path: Path, photos: list[Path]) -> None:
    variables, arguments = make_lab()
    if stack is CLASSIC:
        arguments = [word.replace("--ServerApp", "--NotebookApp") for word in arguments]
    with opened(stack, tmp_path, write_panel(tmp_path), *arguments, **variables) as page:
        page.run(0)
        page.wait_for(0, "at most 210 MB", 60)  # after what libraries print as they load
        page.upload(0, photos)
        page.wait_for(0, "(uploaded", 60)
        page.wait_for(0, "if these are photos")
        assert re.search(r"Showing 5 photos from photos/\w+ \(uploaded", page.text(0))
        page.shoot(0, "upload-18-mb")
        (arrived,) = (tmp_path / "mine" / "photos").iterdir()
        assert [file.read_bytes() for file in sorted(arrived.iterdir())] == [
            file.read_bytes() for file in photos
        ]


def test_captions_are_edited_and_a_bad_photo_is_left_out(stack: Stack, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "rex"
    notebook = write_panel(tmp_path)
    shutil.copytree(BUNDLED / "subjects" / "patch_dog", folder)
    names = sorted(file.name for file in folder.glob("*.png"))
    first, bad = folder / names[0], folder / names[-1]
    first.with_suffix(".txt").write_text("a dog on the beach with a red ball")
    bad.write_bytes(bad.read_bytes()[:200])
    with opened(stack, tmp_path, notebook) as page:
        page.run(0)
        page.type(0, "folder or zip", "rex")
        page.cell(0).get_by_role("button", name=f"Continue without {bad.name}").click()
        page.wait_for(0, f"{bad.name} is left out, as you chose.", 60)
        page.wait_for(0, "1 of 1 captions", 60)
        page.shoot(0, "captions")
        page.cell(0).get_by_role("button", name="Add the identifier to 1 caption").click()
        page.wait_for(0, "Saved 1 caption.", 60)
        assert "lacks the identifier" not in page.text(0)
        assert first.with_suffix(".txt").read_text() == "a {} dog on the beach with a red ball"
        assert "rex" in page.run(1)


def test_on_another_server_the_panel_says_what_to_do_and_the_button_still_works(
    stack: Stack, tmp_path: Path, photos: list[Path]
) -> None:
    with opened(stack, tmp_path, write_panel(tmp_path)) as page:
        page.run(0)
        page.upload(0, photos)
        page.wait_for(0, "did not arrive", 60)
        text = page.text(0)
        assert "MB in all did not arrive: this Jupyter server accepts 10 MB at once" in text
        assert "type the folder's name below" in text and "No problems" not in text
        assert not page.cell(0).locator("img:visible").count(), "no other photos are shown"
        page.shoot(0, "upload-too-large")
        page.start(1)
        assert "did not arrive" in page.finish(1) and "patch_dog" not in page.text(1)

        page.upload(0, photos[:2])  # each server accepts these
        page.wait_for(0, "IMG_0.jpg and IMG_1.jpg alone are too little", 60)
        page.type(0, "folder or zip", str(photos[0].parent))  # as if dragged into the file browser
        page.wait_for(0, "Showing 5 photos from", 60)
        assert str(photos[0].parent) in page.run(1)
        page.shoot(0, "upload-by-the-folders-name")

        archive = tmp_path / "mine" / "models" / "rex.zip"
        archive.write_bytes(bytes(range(256)) * 10_000)  # not UTF-8
        assert "(2.6 MB)" in page.run(2)
        with page.tab.expect_download() as download:
            page.cell(2).locator("a", has_text="models/rex.zip").click()
        assert download.value.path().read_bytes() == archive.read_bytes()
        assert download.value.suggested_filename == "rex.zip"
        assert not page.tab.get_by_text("File Load Error").count()


def test_from_photos_to_an_image_of_your_own_prompt(page: Page, tmp_path: Path) -> None:
    for number in (SETUP, PARAMETERS):
        page.run(number)
    page.run(PREFLIGHT)
    page.wait_for(PREFLIGHT, "RAM")
    assert "to fix" not in page.text(PREFLIGHT)
    page.shoot(PREFLIGHT, "1-preflight")
    page.run(BEGIN)
    page.wait_for(BEGIN, "Starting a new run.")

    page.run(SUBJECT)
    page.upload(SUBJECT, sorted((BUNDLED / "subjects" / "candy_turtle").glob("*.png"))[:3])
    page.type(SUBJECT, "class noun", "turtle")
    page.wait_for(SUBJECT, "3 photos")
    page.shoot(SUBJECT, "2-subject")

    page.run(SETTINGS)
    page.wait_for(SETTINGS, "prior_weight=1.0")
    weight = float(page.drag(SETTINGS, "λ, prior weight", 40))
    page.type(SETTINGS, "training steps", str(steps := STEPS + 4))
    assert weight > 1
    page.wait_for(SETTINGS, f"prior_weight={weight}")
    page.wait_for(SETTINGS, f"steps={steps}")
    assert "class_noun='turtle'" in page.text(SETTINGS)
    page.shoot(SETTINGS, "3-settings")

    page.run(CLASS)
    page.shoot(CLASS, "4-class-images")

    page.start(TRAIN)
    page.wait_for(TRAIN, re.compile(r"Step ([89]|1\d) of"))
    page.interrupt()
    page.finish(TRAIN)
    page.wait_for(TRAIN, "run this cell again to resume")
    assert "Traceback" not in page.text(TRAIN)
    page.shoot(TRAIN, "5-interrupted")
    (folder,) = [path.parent for path in (tmp_path / "runs").glob("*/config.toml")]
    reached = max(runs.resume(folder).checkpoints())
    assert 8 <= reached < steps and runs.resume(folder).config.prior_weight == weight

    lower = float(page.drag(SETTINGS, "λ, prior weight", -60))
    page.wait_for(SETTINGS, f"prior_weight={lower}")
    page.run(TRAIN, 500)
    page.wait_for(TRAIN, f"Finished at step {steps}.")
    page.shoot(TRAIN, "6-training")
    run = runs.resume(folder)
    assert run.config.prior_weight == lower < weight
    assert [row["step"] for row in run.log()] == list(range(1, steps + 1))

    page.run(CHECKPOINT)
    page.wait_for(CHECKPOINT, "According to the scores: ")
    page.drag(CHECKPOINT, "checkpoint", -400)
    page.wait_for(CHECKPOINT, "The base")
    page.drag(CHECKPOINT, "checkpoint", 800)
    page.wait_for(CHECKPOINT, f"Step {steps}")
    page.shoot(CHECKPOINT, "7-checkpoint")

    page.run(PLAY)
    page.type(PLAY, "prompt", "a {} turtle in the snow")
    page.cell(PLAY).get_by_role("button", name="Generate", exact=True).click()
    page.wait_for(PLAY, "“a ohwx turtle in the snow”")
    assert page.cell(PLAY).locator("img").count() == 4, "base and tuned, twice"
    page.cell(PLAY).get_by_role("button", name="Save these images").first.click()
    page.wait_for(PLAY, "Saved in images")
    assert len([*(tmp_path / "images").glob("*/0001-*.png")]) == 2
    page.shoot(PLAY, "8-playground")

    page.run(KEEP)
    page.run(SHARE)
    page.run(FILE)
    page.run(END)
    assert not page.tab.get_by_text("⚠").count()


@pytest.mark.parametrize("page", [SHORTEST], indirect=True, ids=["4 steps"])
def test_a_double_click_in_a_new_kernel_measures_and_breaks_nothing(page: Page) -> None:
    """Where the server answers widgets in threads, both clicks would load the models at once."""
    for number in (SETUP, PARAMETERS, PREFLIGHT, BEGIN, SUBJECT, SETTINGS):
        page.run(number)
    page.wait_for(SETTINGS, "prior_weight=1.0")
    page.cell(SETTINGS).get_by_role("button", name="Estimate the training time").dblclick()
    page.wait_for(SETTINGS, "Training takes")
    assert "⚠" not in page.text(SETTINGS)
    page.run(TRAIN, 500)
    page.wait_for(TRAIN, "Finished at step 4.")
