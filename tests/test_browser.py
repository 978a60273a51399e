"""The main notebook in a real browser, on both stacks that people have, as a person goes through.

Pictures of each step are left in ``outputs/browser/STACK``. It needs Debian's chromium; the classic
Notebook runs on the second environment, whose Python ``DREAMBOOTH_TEST_COLAB_PYTHON`` names.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CLASSIC, LAB, ROOT, VIEW, Page, Stack, served
from test_notebooks import NOTEBOOKS, codes

from dreambooth_lib import runs
from dreambooth_lib.families import BUNDLED

CHROMIUM = shutil.which("chromium")
PYTHONS = {"lab": sys.executable, "classic": os.environ.get("DREAMBOOTH_TEST_COLAB_PYTHON")}
#: Fewer steps, and nothing else; more of them make pictures to show.
STEPS = int(os.environ.get("DREAMBOOTH_TEST_BROWSER_STEPS", 24))
SHORT = f'SETTINGS = {{"steps": {STEPS}, "class_pictures": 24, "watch_every": {STEPS // 4}}}'
(SETUP, PARAMETERS, PREFLIGHT, BEGIN, SUBJECT, SETTINGS, CLASS, TRAIN, CHECKPOINT, PLAY, KEEP,
 SHARE, ASSERTIONS) = range(13)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]


@pytest.fixture(params=[LAB, CLASSIC], ids=lambda stack: stack.name)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    stack: Stack = request.param
    python = PYTHONS[stack.name]
    if python is None:
        pytest.skip("needs the second environment")
    notebook = json.loads(NOTEBOOKS["01_dreambooth"].read_text())
    codes(notebook)[PARAMETERS]["source"] += ["\n", SHORT]
    (tmp_path / "01_dreambooth.ipynb").write_text(json.dumps(notebook))
    with served(stack, python, tmp_path) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport=VIEW)
        pictures = ROOT / "outputs" / "browser" / stack.name
        yield Page(tab, stack, address, "01_dreambooth.ipynb", pictures)
        tab.screenshot(path=pictures / "end.png")
        browser.close()


def test_from_photos_to_a_picture_of_ones_own_prompt(page: Page, tmp_path: Path) -> None:
    for number in (SETUP, PARAMETERS):
        page.run(number)
    page.run(PREFLIGHT)
    page.wait_for(PREFLIGHT, "memory")
    assert "to fix" not in page.text(PREFLIGHT)
    page.shoot(PREFLIGHT, "1-preflight")
    page.run(BEGIN)
    page.wait_for(BEGIN, "Beginning a new run.")

    page.run(SUBJECT)
    page.upload(SUBJECT, sorted((BUNDLED / "subjects" / "candy_turtle").glob("*.png"))[:3])
    page.type(SUBJECT, "class noun", "turtle")
    page.wait_for(SUBJECT, "3 pictures")
    page.shoot(SUBJECT, "2-subject")

    page.run(SETTINGS)
    page.wait_for(SETTINGS, "prior_weight=1.0")
    weight = float(page.drag(SETTINGS, "λ, prior weight", 40))
    steps = int(page.drag(SETTINGS, "training steps", 2))
    assert weight > 1 and steps > STEPS
    page.wait_for(SETTINGS, f"prior_weight={weight}")
    page.wait_for(SETTINGS, f"steps={steps}")
    assert "class_noun='turtle'" in page.text(SETTINGS)
    page.shoot(SETTINGS, "3-settings")

    page.run(CLASS)
    page.shoot(CLASS, "4-class-pictures")

    page.start(TRAIN)
    page.wait_for(TRAIN, re.compile(r"Step ([89]|1\d):"))
    page.interrupt()
    page.finish(TRAIN)
    page.wait_for(TRAIN, "run this cell again to go on")
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
    page.wait_for(CHECKPOINT, "Chosen ★:")
    page.drag(CHECKPOINT, "checkpoint", -400)
    page.wait_for(CHECKPOINT, "The base")
    page.drag(CHECKPOINT, "checkpoint", 800)
    page.wait_for(CHECKPOINT, f"Step {steps}")
    page.shoot(CHECKPOINT, "7-checkpoint")

    page.run(PLAY)
    page.type(PLAY, "prompt", "a {} turtle in the snow")
    page.cell(PLAY).locator("button", has_text="Draw").click()
    page.wait_for(PLAY, "“a ohwx turtle in the snow”")
    assert page.cell(PLAY).locator("img").count() == 4, "base and tuned, twice"
    page.shoot(PLAY, "8-playground")

    page.run(KEEP)
    page.run(SHARE)
    page.run(ASSERTIONS)
    assert not page.tab.get_by_text("⚠").count()
