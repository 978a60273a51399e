"""Write a study as one page and as a Space, and use both: in a browser, and by its server."""

import base64
import io
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from PIL import Image

from dreambooth_lib import __main__ as command
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.evaluation.sweep import grid, sweep
from dreambooth_lib.export import gallery, space
from dreambooth_lib.export.comfyui_lora import ExportError
from dreambooth_lib.training import runs
from dreambooth_lib.training.validation import ValidationPlan

CHROMIUM = shutil.which("chromium")
#: A name that spoils the page if it is written as it is.
NAME = "<!--<script>dog"


@pytest.fixture(scope="module")
def study(
    tiny_sd1: str,
    photos: str,
    clip_folder: Path,
    make_config: Callable[..., TrainConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Make a study of two λ and two steps."""
    folder = tmp_path_factory.mktemp("study")
    config = make_config(tiny_sd1, photos).replace(scorer=str(clip_folder), resolution=16)
    config = config.replace(subject=replace(config.subject, name=NAME))
    plan = ValidationPlan(class_images=2, unrelated=1, inference_steps=1)
    done = list(sweep(grid(config, prior_weight=[0.0, 1.0]), folder, [1, 2], plan))
    assert [cell.error for cell in done] == [None, None]
    return folder


def data_of(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def test_the_page_has_every_image_of_the_study(study: Path, tmp_path: Path) -> None:
    page = gallery.write_gallery(gallery.find_runs([study]), tmp_path / "gallery.html")
    (subject,) = data_of(page)["subjects"]
    assert subject["name"] == NAME and subject["photos"] == [] and subject["best"] in (0, 1)
    assert [run["label"] for run in subject["runs"]] == ["λ 0", "λ 1"]
    for run in subject["runs"]:
        assert [step["step"] for step in run["steps"]] == [0, 1, 2]
        for step in run["steps"]:
            counts = {name: len(images) for name, images in step["images"].items()}
            assert counts == {"subject": 4, "class": 2, "others": 1}
            assert all(0 <= value <= 1 for _, value in step["scores"])
            for prompt, source in (image for kind in step["images"].values() for image in kind):
                assert prompt and source.startswith("data:image/webp;base64,")
    assert "http" not in re.sub(r"data:[^\"]*", "", page.read_text())  # it needs no network


def test_photos_are_shown_only_if_asked_for(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "gallery.html"
    words = ["dreambooth_lib", "gallery", str(study), "--photos", "--out", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    assert capsys.readouterr().out == f"{page}\n"
    assert len(data_of(page)["subjects"][0]["photos"]) == 4


def test_runs_that_differ_in_more_than_the_prior_are_named_by_their_folders(
    study: Path, tmp_path: Path
) -> None:
    found = gallery.find_runs([study])
    changed = [runs.Run(run.folder, run.config.replace(seed=n)) for n, run in enumerate(found)]
    (subject,) = data_of(gallery.write_gallery(changed, tmp_path / "page.html"))["subjects"]
    assert [run["label"] for run in subject["runs"]] == ["prior_weight=0.0", "prior_weight=1.0"]


def test_large_images_are_reduced() -> None:
    small = gallery._address(Image.new("RGB", (1024, 512)))
    image = Image.open(io.BytesIO(base64.b64decode(small.partition(",")[2])))
    assert image.size == (256, 128) and image.format == "WEBP"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run that was validated; give the folder"):
        gallery.find_runs([tmp_path])


def test_a_space_of_a_lora_is_refused(study: Path, tmp_path: Path) -> None:
    (run, *_) = gallery.find_runs([study])
    lora = runs.Run(run.folder, run.config.replace(method="lora"))
    with pytest.raises(InputError, match="is a LoRA, and a Space generates with a full model"):
        space.write_space([lora], tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_a_space_deletes_no_other_files(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "my-space"
    (clone / ".git").mkdir(parents=True)
    (clone / "settings.json").write_text("{}")
    app = tmp_path / "my-space" / "app"  # of something else
    app.mkdir()
    (app / "settings.json").write_text("{}")
    (app / "app.py").write_text("")
    monkeypatch.chdir(clone)
    for folder in (clone, Path("."), app):
        with pytest.raises(ExportError, match=r"my-space(/app)? holds other files, which would be"):
            space.write_space(gallery.find_runs([study]), folder)
    assert (clone / ".git").is_dir() and (app / "app.py").exists()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a Space's own app.py; yield its address."""
    spec = spec_from_file_location("space_app_copy", folder / "app.py")
    assert spec and spec.loader
    app = module_from_spec(spec)
    spec.loader.exec_module(app)
    with ThreadingHTTPServer(("127.0.0.1", 0), app.Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_space_shows_the_study_and_draws(study: Path, tmp_path: Path) -> None:
    folder = space.write_space(gallery.find_runs([study]), tmp_path / "space")
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "app.py", "model", "settings.json", "README.md", "Dockerfile",
                     "requirements.txt"}  # fmt: skip
    text = "".join(p.read_text() for p in folder.iterdir() if p.suffix in (".json", ".md", ".txt"))
    assert str(study) not in text and "\nsdk: docker\n" in text and "torch==" in text
    lines = (folder / "Dockerfile").read_text().splitlines()
    own, all_others = [line for line in lines if line.startswith("RUN pip install")]
    assert "torch==" in own and own.endswith("--index-url https://download.pytorch.org/whl/cpu")
    assert all_others.endswith("-r requirements.txt")  # which torch's CPU build then fulfils
    assert data_of(folder / "index.html")["draw"].startswith("a ")
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["width"], settings["height"]) == (16, 16)
    assert space.write_space(gallery.find_runs([study]), folder) == folder, "an earlier one"
    with serving(folder) as address:
        with urlopen(f"{address}/") as answer:
            assert answer.read() == (folder / "index.html").read_bytes()

        def draw(**fields: object) -> bytes:
            with urlopen(f"{address}/draw?{urlencode(fields)}") as answer:
                assert answer.headers["Content-Type"] == "image/png"
                return answer.read()

        first = draw(prompt="a dog", seed=1)
        assert first.startswith(b"\x89PNG")
        assert draw(prompt="a dog", seed=1) == first != draw(prompt="a dog", seed=2)
        for fields in ({"prompt": "", "seed": 1}, {"prompt": "a", "seed": "x"},
                       {"prompt": "a" * 301}, {"prompt": "a", "seed": "9" * 7}):  # fmt: skip
            with pytest.raises(HTTPError) as refused:
                draw(**fields)
            assert refused.value.code == 400
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{address}/../settings.json")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_sliders_and_the_field_work_in_a_browser(study: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    found = gallery.find_runs([study])
    page_file = gallery.write_gallery(found, tmp_path / "gallery.html", photos=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(page_file.as_uri())
        assert tab.locator("#subject option").all_inner_texts() == [NAME]
        assert tab.locator("#drawing").is_hidden() and tab.locator("figure").count() == 4 + 7
        tab.locator("#run").fill("0")
        tab.locator("#step").fill("0")
        assert tab.locator("#run-name").inner_text() == "λ 0"
        assert tab.locator("#step-name").inner_text() == "0: the base model"
        before = tab.locator("#images img").nth(4).get_attribute("src")
        tab.locator("#step").fill("2")
        assert tab.locator("#step-name").inner_text() == "2"
        assert tab.locator("#images img").nth(4).get_attribute("src") != before
        with serving(space.write_space(found, tmp_path / "space")) as address:
            tab.goto(address)
            tab.locator("#draw button").click()
            tab.locator("#drawn img").wait_for()
            assert tab.locator("#drawn figcaption").inner_text().startswith("a ")
        browser.close()
    assert errors == []
