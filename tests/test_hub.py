"""Test a model's card, and its upload by the real client to a fake Hub."""

import ast
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mistune
import pytest
import torch
from fake_hub import HANG_UP, OWNER, TOKEN, FakeHub, Repo, Request, run_lines, save_loaded
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.hub_token import hub_token
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.user_text import without_private
from dreambooth_lib.export import comfyui, hub, model_card, pipeline_folder
from dreambooth_lib.families import loading
from dreambooth_lib.notebook import preflight
from dreambooth_lib.training import loop, runs
from dreambooth_lib.training.runs import Run, RunError

NAME = f"{OWNER}/my-dog"


@pytest.fixture(scope="module")
def run(
    tiny_sd1: str, photos: str, clip_folder: Path, make_config: Callable[..., TrainConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:  # fmt: skip
    config = make_config(tiny_sd1, photos, scorer=str(clip_folder), validate_every=2)
    run = runs.start(config, tmp_path_factory.mktemp("runs") / "run")
    for _ in loop.train(run):
        pass
    return run


def test_a_card_says_how_to_draw_the_subject_and_how_it_was_made(run: Run, tmp_path: Path) -> None:
    card = ModelCard.load(model_card.write_card(run, 2, tmp_path / "model"))
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model is None, "a base of this machine has no address"
    assert f'"{run.config.subject.instance_prompt} on the beach"' in card.text
    assert f"λ {run.config.prior_weight:g}" in card.text and "step 2 of 4" in card.text
    assert run.config.subject.photos not in card.content
    assert run.config.base not in card.content and "`sd1`, fine-tuned with DreamBooth" in card.text
    assert Image.open(tmp_path / "model" / "samples.png").size[0] > 100


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prior": "distilled"}, "λ 1 on the base model's own predictions for “a dog”."),
        (
            {"prior": "distilled", "prior_prompts": ("a car", "")},
            "λ 1 on the base model's own predictions for “a dog” and 2 other prompts.",
        ),
        ({"prior": "none"}, "no prior preservation."),
        ({"class_folder": "/tmp"}, "λ 1 on the trainer's own class images."),
        ({}, "λ 1 on 4 class images of “a dog”."),
    ],
)
def test_a_card_mentions_class_images_only_where_there_were_some(
    changes: dict[str, Any], sentence: str, run: Run, tmp_path: Path
) -> None:
    other = Run(run.folder, run.config.replace(**changes))
    text = model_card.write_card(other, 2, tmp_path / "model").read_text()
    assert sentence in " ".join(text.split())
    assert ("4 class images" in text) == (not changes)


#: Words that are code, markup or an address where they are not quoted.
WORDS = (
    'dog"); import os; os.system("id"); print("', "dog'''", "``` x", "`x`", "back\\", "{}", "a | b",
    "<img src=x onerror=alert(1)>", "<!-- x", "![a](http://x.y/p.png)", "[a](http://x.y)", "*a* b",
    "https://x.y/z", "www.x.y", "&lt;b&gt;", "$x^2$", "=b=", "_b_", "~~d~~", "# head", "- x",
    "日本の犬",
)  # fmt: skip


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        plugins = ["url", "table", "strikethrough", "math", "mark"]
        self.feed(str(mistune.create_markdown(escape=False, plugins=plugins)(markdown)))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def code_of(card: str) -> tuple[str, str]:
    """The fence and the code of a card's example."""
    ((fence, code),) = re.findall(r"^(`{3,})python\n(.*?)^\1$", card, re.S | re.M)
    return fence, code


@pytest.mark.parametrize("word", [word for word in WORDS if word != "{}"])  # no identifier has it
def test_a_card_shows_words_as_text_and_quotes_them_in_code(
    word: str, run: Run, tmp_path: Path
) -> None:
    def card_of(word: str, base: str) -> str:
        subject = Subject(run.config.subject.photos, word, f"{word}zwx")
        config = run.config.replace(subject=subject, base=base, prior="generated")
        return model_card._card(Run(run.folder, config), 2, False).partition("---\n\n")[2]

    base = tmp_path / re.sub("/", "_", word)
    base.symlink_to(run.config.base)
    plain, card = card_of("dog", run.config.base), card_of(word, str(base))
    assert Page(card).tags == Page(plain).tags
    shown = " ".join(Page(card).text.split())
    assert f"a {word}”" in shown and shown.startswith(f"{word}zwx {word} ")
    fence, code = code_of(card)
    assert fence not in code and str(tmp_path) not in card
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert f"a {word}zwx {word} on the beach" in constants
    assert len(ast.parse(code).body) == len(ast.parse(code_of(plain)[1]).body) == 6


@pytest.mark.parametrize("name", ["a`b", "a\nb", '"); exit(); ("', "a\\"])
def test_a_loras_code_quotes_its_folder_and_its_token(name: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    subject = Subject("photos", "dog", '"<x>')
    config = run.config.replace(method="lora", train_token=True, subject=subject)
    code = model_card.usage(Run(run.folder, config), tmp_path / name)
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert str(tmp_path / name) in constants and '"<x>' in constants
    assert f"{tmp_path / name}/word/token.safetensors" in constants


@pytest.mark.parametrize("changes", [{}, {"method": "lora", "train_text_encoder": True}])
def test_what_leaves_the_machine_has_none_of_its_paths(
    changes: dict[str, Any], tiny_sd1: str, photos: str, clip_folder: Path,
    make_config: Callable[..., TrainConfig], tmp_path: Path,
) -> None:  # fmt: skip
    config = make_config(tiny_sd1, photos, scorer=str(clip_folder), validate_every=2, **changes)
    run = runs.start(config.replace(steps=2), tmp_path / "run")
    list(loop.train(run))
    pipeline_folder.write_model(run, 2, tmp_path / "model", photos=True)
    comfyui.export(run, tmp_path / "model", tmp_path / "exports")
    kept = [
        *(tmp_path / "exports").iterdir(),
        tmp_path / "model.zip",
        *(tmp_path / "model").rglob("*.*"),
    ]
    kept += [p for p in run.pipeline.rglob("*.*") if p.name != loading.LORA_BASE_FILE]
    assert len(kept) > 7
    for file in kept:
        for place in (tmp_path, tiny_sd1, photos):
            assert str(place).encode() not in file.read_bytes(), file
    if not changes:  # what the base's settings are found by
        index = loading.resolve(str(tmp_path / "model")).read("model_index.json")
        assert index["_name_or_path"] == Path(tiny_sd1).name


def test_a_base_folder_that_is_gone_is_no_address(run: Run, tmp_path: Path) -> None:
    gone = Run(run.folder, run.config.replace(base=str(tmp_path / "gone" / "base")))
    card = model_card._card(gone, 2, False)
    assert "base_model" not in card and str(tmp_path) not in card


def test_a_card_needs_a_validation_at_its_step(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was not validated at step 3"):
        model_card.write_card(run, 3, tmp_path / "model")


def test_a_card_shows_the_curves_and_the_photos_only_if_asked(run: Run, tmp_path: Path) -> None:
    text = model_card.write_card(run, 2, tmp_path / "model").read_text()
    assert "(curves.png)" in text and "photos.png" not in text
    assert Image.open(tmp_path / "model" / "curves.png").size[0] > 100
    assert not (tmp_path / "model" / "photos.png").exists()
    text = model_card.write_card(run, 2, tmp_path / "shown", photos=True).read_text()
    assert "(photos.png)" in text
    with Image.open(tmp_path / "shown" / "photos.png") as strip:
        assert strip.width > 3 * strip.height and not strip.getexif()


def test_a_card_gives_the_licence_of_a_base_that_gives_one(
    run: Run, fake_hub: FakeHub, tmp_path: Path
) -> None:
    fields = "license: other\nlicense_name: not-for-sale\nlicense_link: "
    for name, link in (("linked", "https://example.org/licence"), ("beside", "LICENSE.md")):
        card = f"---\n{fields}{link}\n---\n"
        fake_hub.repos[f"maker/{name}"] = Repo(files={"README.md": card.encode()})
    fake_hub.repos["maker/silent"] = Repo()

    def card_of(base: str) -> ModelCard:
        on_the_hub = Run(run.folder, run.config.replace(base=base))
        card = ModelCard.load(
            fake_hub.call(model_card.write_card, on_the_hub, 2, tmp_path / "model")
        )
        assert (
            card.data.base_model == base
            and "licence and terms of the base model apply" in card.text
        )
        return card

    linked = card_of("maker/linked").data
    assert (linked.license, linked.license_name) == ("other", "not-for-sale")
    assert linked.license_link == "https://example.org/licence"
    assert card_of("maker/beside").data.license_link is None, "that file is the base's"
    assert card_of("maker/silent").data.license is None
    assert card_of("maker/gone").data.license is None
    fake_hub.refusals["maker/linked"] = HANG_UP
    assert card_of("maker/linked").data.license is None


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name} {name}": value
        for file in folder.rglob("*.safetensors")
        for name, value in load_file(file).items()
    }


def test_a_model_that_is_pushed_is_loaded_from_the_hub_with_the_same_weights(
    run: Run, fake_hub: FakeHub, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    pipeline_folder.write_model(run, 2, folder)
    assert fake_hub.call(hub.push, folder, NAME) == f"{fake_hub.url}/{NAME}"
    pushed = fake_hub.repos[NAME]
    assert pushed.private and pushed.files == files_of(folder)
    fake_hub.call(save_loaded, NAME, tmp_path / "plain", tmp_path / "kit")
    expected = weights_of(folder)
    for loaded in (weights_of(tmp_path / "plain"), weights_of(tmp_path / "kit")):
        assert loaded.keys() == expected.keys() and len(loaded) > 100
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_the_lines_that_are_printed_load_a_lora_and_its_word_from_the_hub(
    tiny_sd1: str, photos: str, clip_folder: Path, make_config: Callable[..., TrainConfig],
    fake_hub: FakeHub, tmp_path: Path,
) -> None:  # fmt: skip
    config = make_config(
        tiny_sd1, photos, scorer=str(clip_folder), validate_every=2, learning_rate=0.05,
        method="lora", lora_rank=2, train_token=True,
    ).replace(subject=Subject(photos, "dog", "<rex>"))  # fmt: skip
    run = runs.start(config, tmp_path / "run")
    list(loop.train(run))
    pipeline_folder.write_model(run, 4, tmp_path / "model")
    fake_hub.call(hub.push, tmp_path / "model", NAME)
    code, _, drawn = model_card.usage(run, NAME).rpartition("\n")
    assert "a <rex> dog on the beach" in drawn
    fake_hub.call(run_lines, code, tmp_path / "actual")
    loading.load_model(str(run.folder)).pipeline.save_pretrained(tmp_path / "expected")
    actual, expected = weights_of(tmp_path / "actual"), weights_of(tmp_path / "expected")
    base = weights_of(Path(tiny_sd1))
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[n], value, atol=1e-6) for n, value in expected.items())
    moved = {n for n, one in actual.items() if one.shape != base[n].shape or (one != base[n]).any()}
    assert any("token_embedding" in name for name in moved)
    assert any(name.startswith("unet") for name in moved)


def test_the_lines_of_a_lora_load_its_base_at_its_revision(
    run: Run, tiny_sd1: str, fake_hub: FakeHub
) -> None:
    fake_hub.repos["maker/pinned"] = Repo(files=files_of(Path(tiny_sd1)))
    config = run.config.replace(base="maker/pinned", revision="v1", method="lora")
    code = fake_hub.call(model_card.usage, Run(run.folder / "none", config), "model")
    fake_hub.requests.clear()
    fake_hub.call(_execute, code.partition("pipeline.load_lora")[0])
    assert fake_hub.asked("GET", "/maker/pinned/revision/v1")
    assert not fake_hub.asked("GET", "/main")


def _execute(code: str) -> None:
    exec(code, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder to push: small and large files, in folders too."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 64)
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags: [dreambooth]\n---\n")
    return folder


def test_the_token_goes_into_one_header_and_nowhere_else(fake_hub: FakeHub, folder: Path) -> None:
    fake_hub.call(hub.push, folder, NAME)
    given = [request.headers.pop("authorization", None) for request in lowered(fake_hub)]
    assert f"Bearer {TOKEN}" in given and set(given) <= {f"Bearer {TOKEN}", None}
    assert not any(TOKEN in repr(request) for request in lowered(fake_hub))
    assert not any(TOKEN.encode() in content for content in fake_hub.repos[NAME].files.values())
    assert not any(TOKEN.encode() in content for content in files_of(folder).values())


def lowered(fake_hub: FakeHub) -> list[Request]:
    for request in fake_hub.requests:
        request.headers = {name.lower(): value for name, value in request.headers.items()}
    return fake_hub.requests


def test_what_is_there_is_not_sent_twice(fake_hub: FakeHub, folder: Path) -> None:
    fake_hub.call(hub.push, folder, NAME)
    assert len(fake_hub.asked("PUT")) == 1
    fake_hub.call(hub.push, folder, NAME)
    assert len(fake_hub.asked("PUT")) == 1 and len(fake_hub.repos[NAME].commits) == 1
    (folder / "model_index.json").write_text("{ }")
    fake_hub.call(hub.push, folder, NAME)
    assert len(fake_hub.asked("PUT")) == 1
    assert fake_hub.repos[NAME].commits[1:] == [["model_index.json"]]


def test_files_of_an_older_model_go_and_others_stay(
    run: Run, fake_hub: FakeHub, tmp_path: Path
) -> None:
    """Push a LoRA's folder where a full model with photos was, and the owner's own files."""
    pipeline_folder.write_model(run, 2, tmp_path / "full", photos=True)
    own = {"notes.txt": b"mine", "unet.json": b"{}", "demo/model.safetensors": b"1"}
    own |= {"extra.safetensors": b"2", "demo/photos.png": b"3", "unet/notes.md": b"4"}
    fake_hub.repos[NAME] = Repo(files=dict(own))
    fake_hub.call(hub.push, tmp_path / "full", NAME)
    assert {"photos.png", "unet/config.json"} <= fake_hub.repos[NAME].files.keys()
    (tmp_path / "lora").mkdir()
    for name in (loading.LORA_FILE, "README.md"):
        (tmp_path / "lora" / name).write_bytes(b"of the LoRA")
    fake_hub.call(hub.push, tmp_path / "lora", NAME)
    assert fake_hub.repos[NAME].files == own | files_of(tmp_path / "lora")
    assert len(fake_hub.repos[NAME].commits) == 2
    fake_hub.call(hub.push, tmp_path / "full", NAME)
    assert fake_hub.repos[NAME].files == own | files_of(tmp_path / "full")


def test_a_model_is_as_visible_as_it_was_or_is_asked_for(fake_hub: FakeHub, folder: Path) -> None:
    fake_hub.repos[NAME] = Repo(private=False, files={"notes.txt": b"mine"})
    fake_hub.call(hub.push, folder, NAME)
    assert not fake_hub.repos[NAME].private
    assert fake_hub.repos[NAME].files == {"notes.txt": b"mine"} | files_of(folder)
    fake_hub.call(hub.push, folder, f"{OWNER}/open", private=False)
    assert not fake_hub.repos[f"{OWNER}/open"].private


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("repos/create", 401, "does not accept your token.*create a new one"),
        ("repos/create", 403, r"may not write to .* \(you may not\); create .*with write access"),
        ("repos/create", (403, "Private storage limit reached."), "no room for .*limit reached.*;"),
        ("preupload", 403, "may not write to .*with write access"),
        ("objects/batch", 403, "may not write to .*with write access"),
        ("/upload/", 403, "may not write to .*with write access"),
        ("repos/create", 429, "rate limit was reached.*in a few minutes"),
        ("/commit/", 409, rf"refused '{NAME}' \(.*409.*\); check"),
        (
            "validate-yaml",
            (503, "<html>later</html>"),
            "could not be uploaded .*; check the network",
        ),
        ("validate-yaml", 400, r"refused '.*' \(Invalid metadata in README.md.*\); correct that"),
    ],
)
def test_a_refusal_is_one_sentence(
    part: str, status: int | tuple[int, str], said: str, fake_hub: FakeHub, folder: Path
) -> None:
    fake_hub.refusals[part] = status
    with pytest.raises(hub.HubError, match=said) as raised:
        fake_hub.call(hub.push, folder, NAME)
    assert "\n" not in str(raised.value) and TOKEN not in str(raised.value)
    assert NAME in str(raised.value) and not fake_hub.repos.get(NAME, Repo()).files


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("“hf_abcdefgh”", "a quotation mark"),
        ("'hf_abcdefgh'", "a quotation mark"),
        ("hf_abc\ndefgh", "a space or a line break"),
        ("hf_abc defgh", "a space or a line break"),
        ("hf_abcdéfgh", "a character that no token has"),
        ("hf_abc\0defgh", "a character that no token has"),
    ],
)
def test_a_token_that_can_be_none_is_refused_without_showing_it(
    token: str, said: str, fake_hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(hub.HubError, match=f"your token has {said}.*HF_TOKEN") as raised:
        hub.push(folder, NAME)
    assert "abc" not in str(raised.value) and not fake_hub.requests
    assert hub.licence_of("maker/linked") == {}


def test_a_token_of_the_hubs_browser_login_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_oauth_eyJhbGciOi.eyJzdWIi-_Q.sig_natu-re"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert hub_token() == token
    said = without_private(f"It was sent with {token}. The file is hf_dog.safetensors.")
    assert said == "It was sent with [hidden]. The file is hf_dog.safetensors."


def test_a_folder_that_is_not_there_is_told_before_the_hub_is_asked(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("missing", "file"):
        with pytest.raises(hub.HubError, match=f"{name} is not a folder"):
            fake_hub.call(hub.push, tmp_path / name, NAME)
    assert not fake_hub.requests


def test_a_strangers_card_is_data(fake_hub: FakeHub) -> None:
    card = b"---\nlicense: [1, {a: b}]\nlicense_name: 'x\\n---'\nlicense_link: {b: 1}\n---\n"
    fake_hub.repos["maker/odd"] = Repo(files={"README.md": card})
    assert fake_hub.call(hub.licence_of, "maker/odd") == {"license_name": "x\\n---"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("you/their-dog", "your token may not write to"),
        ("me/my/dog", "the Hub refused"),
        ("me/my dog", "the Hub refused"),
        ("", "the Hub refused"),
        ("me/a\nb", "the Hub refused"),
    ],
)
def test_a_name_that_cannot_be_had_is_one_sentence(
    name: str, said: str, fake_hub: FakeHub, folder: Path
) -> None:
    with pytest.raises(hub.HubError, match=rf"^{said} '{' '.join(name.split())}'.*;"):
        fake_hub.call(hub.push, folder, name)


@pytest.mark.parametrize("part", ["repos/create", "/commit/"])
def test_a_network_that_fails_is_one_sentence(part: str, fake_hub: FakeHub, folder: Path) -> None:
    fake_hub.refusals[part] = HANG_UP
    with pytest.raises(
        hub.HubError, match=r"could not be uploaded to the Hub \(.*check the network"
    ):
        fake_hub.call(hub.push, folder, NAME)
    fake_hub.refusals.clear()
    fake_hub.call(hub.push, folder, NAME)
    assert fake_hub.repos[NAME].files == files_of(folder)
    assert len(fake_hub.asked("PUT")) == 1


def test_without_a_token_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(hub.HubError, match="needs a token"):
        hub.push(folder, NAME)


def test_without_a_token_the_hubs_own_login_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[bool] = []
    monkeypatch.setattr("huggingface_hub.notebook_login", lambda: shown.append(True))
    monkeypatch.setattr(hub, "hub_token", lambda ask_again: None)
    assert not hub.login() and shown
    assert "Log in below" in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.notebook_login", lambda: 1 / 0)
    with pytest.raises(
        hub.HubError, match=r"login failed \(ZeroDivisionError.*; check the network"
    ):
        hub.login()
    monkeypatch.setattr(hub, "hub_token", lambda ask_again: TOKEN)
    assert hub.login() and len(shown) == 1
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_base_on_the_hub_is_checked_before_it_is_loaded(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    for name in ("there", "gated"):
        fake_hub.repos[f"maker/{name}"] = Repo(files={"model_index.json": b"{}"})
    fake_hub.repos["maker/other"] = Repo()
    fake_hub.gated.add("maker/gated")

    def check(base: str) -> preflight.Check:
        checks = fake_hub.call(preflight.preflight, base, tmp_path)
        return next(one for one in checks if one.name == "base")

    assert check("maker/there").ok
    assert check("maker/gated").fix.startswith("Accept the terms on the Hub's page of maker/gated")
    assert check("maker/gone").fix.startswith("Check its name")
    assert "no model_index.json" in check("maker/other").result
    with pytest.raises(loading.BaseError, match="'maker/gone' could not be reached on the Hub"):
        fake_hub.call(loading.load_model, "maker/gone")


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "the Hub rejects your token; replace or remove it"),
        (403, "accept the terms on the Hub's page of maker/base"),
        (429, "the Hub's rate limit was reached: wait a few minutes"),
        (500, "the Hub is having problems: wait a few minutes"),
        (HANG_UP, "check its name and the network"),
    ],
)
def test_each_refusal_of_the_hub_is_told_in_its_own_words(
    status: int, told: str, fake_hub: FakeHub, tmp_path: Path
) -> None:
    fake_hub.repos["maker/base"] = Repo(files={"model_index.json": b"{}"})
    fake_hub.refusals["maker/base"] = status
    with pytest.raises(loading.BaseError, match=told) as raised:
        fake_hub.call(loading.load_model, "maker/base")
    assert TOKEN not in str(raised.value)
    checks = fake_hub.call(preflight.preflight, "maker/base", tmp_path)
    (check,) = [one for one in checks if one.name == "base"]
    assert not check.ok and told[1:] in check.fix and TOKEN not in repr(check)


def test_a_base_on_the_hub_that_names_a_module_is_refused(fake_hub: FakeHub) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["foreign", "X"]}
    fake_hub.repos["maker/evil"] = Repo(files={
        "model_index.json": json.dumps(index).encode(), "unet/foreign.py": b"raise SystemExit",
    })  # fmt: skip
    with pytest.raises(loading.BaseError, match="by the module 'foreign'"):
        fake_hub.call(loading.load_model, "maker/evil")
    assert not any("foreign" in request.path for request in fake_hub.requests)
