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
    assert Image.open(tmp_path / "model" / "samples.png").size[0] > 100


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
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(hub.HubError, match="needs a token"):
        hub.push(tmp_path, "me/my-dog")


@pytest.mark.parametrize("error", [httpx.ConnectError("no route"), OSError(), TimeoutError("late")])
def test_a_connection_that_breaks_off_is_one_sentence(
    error: Exception, hub_of: type[StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(StandIn, "refusal", error)
    with pytest.raises(hub.HubError, match=r"the way to the Hub broke off \(.+\); push again"):
        hub.push(tmp_path, "me/my-dog")


def test_a_card_tells_no_path_of_this_machine_and_what_the_prior_was(
    run: Run, tmp_path: Path
) -> None:
    def card(**changes: Any) -> str:
        changed = Run(run.folder, run.config.replace(**changes))
        return hub.write_card(changed, 2, tmp_path / "model").read_text()

    base = Path(run.config.base)
    assert str(base.parent) not in card() and f"`{base.name}` personalised" in card()
    assert "class pictures of" in card()
    assert "class pictures of" not in card(prior="distilled")
    assert "the base's own predictions for “a dog”" in card(prior="distilled")
    assert "no prior preservation" in card(prior="none")
    assert "by LoRA of rank 16, merged" in card(method="lora")


def test_what_is_kept_is_whole_or_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.keep(run, 2, tmp_path / "model")
    assert (folder / "model_index.json").exists() and (folder / "README.md").exists()
    before = {file.name for file in folder.rglob("*")}
    (folder / "mark").touch()
    monkeypatch.setattr(hub, "write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hub.keep(run, 4, folder)
    assert {file.name for file in folder.rglob("*")} == before | {"mark"}
    assert [path.name for path in tmp_path.glob(".*")] == []
