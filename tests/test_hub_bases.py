"""Say in a sentence why a base of the Hub cannot be loaded, and load it offline once it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import FakeHub, Repo

from dreambooth_lib.families import loading
from dreambooth_lib.families.base_files import BaseError
from dreambooth_lib.notebook import preflight

UNET = "unet/diffusion_pytorch_model.safetensors"
Files = dict[str, bytes]


def load(base: str) -> str:
    return loading.load_model(base).pipeline.config["_name_or_path"]


def load_offline(base: str) -> tuple[str, preflight.Check]:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    try:
        return load(base), preflight._base(base)
    finally:
        constants.HF_HUB_OFFLINE = False


@pytest.fixture
def files(tiny_sd1: str) -> Files:
    return read_files(Path(tiny_sd1))


def read_files(folder: Path) -> Files:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def renamed(files: Files, old: str, new: str) -> Files:
    return {name.replace(old, new): content for name, content in files.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: renamed(f, ".safetensors", ".bin"), "has only model.bin"),
        (lambda f: renamed(f, UNET, UNET[:-11] + "bin"), "format that can hold code"),
        (lambda f: renamed(f, ".safetensors", ".fp16.safetensors"), "set variant to 'fp16'"),
        (lambda f: {k: v for k, v in f.items() if k != UNET}, "unet has no weights"),
        (lambda f: {k: v for k, v in f.items() if k[:4] != "vae/"}, "vae/config.json is missing"),
        (lambda f: f | {UNET: b"version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
        (lambda f: f | {UNET: f[UNET][:-99]}, f"{UNET} cannot be read"),
    ],
)  # fmt: skip
def test_what_a_base_lacks_is_named(
    change: Callable[[Files], Files], words: str, files: Files, fake_hub: FakeHub,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    name = f"me/{request.node.callspec.id.split('-')[0].strip('<>')}{abs(hash(words)) % 10**6}"
    fake_hub.repos[name] = Repo(files=change(files))
    with pytest.raises(BaseError, match=words) as found:
        fake_hub.call(load, name)
    assert str(found.value).count("; ") == 1


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        (UNET, 401, "rejects your token"),
        (UNET, 403, "your access is refused"),
        ("api/models", 429, "rate limit"),
        ("model_index.json", 401, "rejects your token"),
    ],
)
def test_a_refusal_of_the_hub_is_told_by_its_cause_wherever_it_comes(
    place: str, status: int, words: str, files: Files, fake_hub: FakeHub
) -> None:
    name = f"me/refused{status}-{len(place)}"
    fake_hub.repos[name] = Repo(files=files)
    fake_hub.refusals[place] = status
    with pytest.raises(BaseError, match=words):
        fake_hub.call(load, name)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux", "flux_2_klein", "z_image"])
def test_a_base_that_is_in_the_cache_loads_offline_and_preflight_says_so(
    kind: str, tiny_bases: Callable[[str], str], fake_hub: FakeHub
) -> None:
    name = f"me/{kind}"
    fake_hub.repos[name] = Repo(files=read_files(Path(tiny_bases(kind))))
    assert fake_hub.call(load, name) == name
    fake_hub.requests.clear()
    loaded, check = fake_hub.call(load_offline, name)
    assert loaded == name and check.ok and "in the local cache" in check.result
    assert not fake_hub.requests
    with pytest.raises(BaseError, match="unset HF_HUB_OFFLINE"):
        fake_hub.call(load_offline, "me/other")
