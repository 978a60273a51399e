"""A tuned model's card and its upload, with a stand-in for the Hub."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from dreambooth_lib import hub, runs, training
from dreambooth_lib.config import TrainConfig
from dreambooth_lib.runs import Run, RunError

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def run(
    tiny_sd1: str, photos: str, clip_folder: Path, make_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> Run:  # fmt: skip
    config = make_config(tiny_sd1, photos, judge=str(clip_folder), watch_every=2)
    run = runs.start(config, tmp_path / "run")
    for _ in training.train(run):
        pass
    return run


class StandIn:
    """Takes what HfApi takes; ``refusal`` is raised instead where it is set."""

    refusal: Exception | None = None

    def __init__(self, token: str):
        self.token = token

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> Any:
        if self.refusal:
            raise self.refusal
        assert exist_ok
        StandIn.made = (name, private, self.token)
        return Address(name)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        StandIn.sent = (repo_id, sorted(file.name for file in Path(folder_path).iterdir()))


class Address(str):
    @property
    def repo_id(self) -> str:
        return str(self)


@pytest.fixture
def hub_of(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr("huggingface_hub.HfApi", StandIn)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    return StandIn


def test_a_card_says_how_to_draw_the_subject_and_how_it_was_made(run: Run, tmp_path: Path) -> None:
    card = ModelCard.load(hub.write_card(run, 2, tmp_path / "model"))
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model is None, "a base of this machine has no address"
    assert f'"{run.config.subject.instance_prompt} on the beach"' in card.text
    assert f"λ {run.config.prior_weight:g}" in card.text and "Step 2 of 4" in card.text
    assert run.config.subject.pictures not in card.content
    assert run.config.base not in card.content and "`sd1` personalised" in card.text
    assert Image.open(tmp_path / "model" / "samples.png").size[0] > 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prior": "distilled"}, "λ 1, by the base's own predictions for “a dog”."),
        ({"prior": "none"}, "no prior preservation."),
        ({"class_folder": "/tmp"}, "λ 1 and the trainer's own class pictures."),
        ({}, "λ 1 and 4 class pictures of “a dog”."),
    ],
)
def test_a_card_tells_of_class_pictures_only_where_there_were_some(
    changes: dict[str, Any], said: str, run: Run, tmp_path: Path
) -> None:
    other = Run(run.folder, run.config.replace(**changes))
    text = hub.write_card(other, 2, tmp_path / "model").read_text()
    assert said in " ".join(text.split())
    assert ("4 class pictures" in text) == (not changes)


def test_a_card_needs_a_look_at_its_step(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was not looked at in step 3"):
        hub.write_card(run, 3, tmp_path / "model")


def test_a_model_is_pushed_privately_and_the_token_goes_nowhere_else(
    run: Run, hub_of: type[StandIn], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    hub.write_card(run, 2, folder)
    assert hub.push(folder, "me/my-dog") == "me/my-dog"
    assert StandIn.made == ("me/my-dog", True, TOKEN)
    assert StandIn.sent == ("me/my-dog", ["README.md", "samples.png"])
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written and not any(TOKEN.encode() in file.read_bytes() for file in written)


def test_no_token_and_a_refusal_are_one_sentence(
    hub_of: type[StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    response = SimpleNamespace(headers={}, status_code=403, request=None)
    refusal = HfHubHTTPError("403 Forbidden: you may not\nmore of it", response=response)
    monkeypatch.setattr(StandIn, "refusal", refusal)
    with pytest.raises(hub.HubError, match=r"did not take 'me/my-dog' \(403 .* may not\); check"):
        hub.push(tmp_path, "me/my-dog")
    monkeypatch.setattr(StandIn, "refusal", HfHubHTTPError("", response=response))
    with pytest.raises(hub.HubError, match=r"did not take 'me/my-dog' \(HfHubHTTPError\)"):
        hub.push(tmp_path, "me/my-dog")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(hub.HubError, match="needs a token"):
        hub.push(tmp_path, "me/my-dog")


@pytest.mark.parametrize(
    "error", [httpx.ConnectTimeout("timed out"), ConnectionResetError(104, "reset by peer")]
)
def test_a_network_that_fails_is_one_sentence(
    error: Exception, hub_of: type[StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(StandIn, "refusal", error)
    with pytest.raises(hub.HubError, match=r"could not be sent to the Hub \(.*check the network"):
        hub.push(tmp_path, "me/my-dog")
