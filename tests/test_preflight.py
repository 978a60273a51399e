"""Test the checks before a run, which of them are red, and how they are shown."""

import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch
from fake_colab import FakeColab, NotebookAccessError, TimeoutException

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.notebook import base_models, install, preflight, will_it_fit
from dreambooth_lib.notebook.install import Plan
from dreambooth_lib.notebook.preflight import Check, Table
from dreambooth_lib.notebook.will_it_fit import Needs, Resources
from dreambooth_lib.training import runs

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
XL = "stabilityai/stable-diffusion-xl-base-1.0"
SD35 = "stabilityai/stable-diffusion-3.5-medium"
FLUX = "black-forest-labs/FLUX.1-dev"
Z = "Tongyi-MAI/Z-Image"
KLEIN = "black-forest-labs/FLUX.2-klein-base-4B"
TOKEN = "hf_notAToken"


def checks_of(base: str, folder: Path) -> dict[str, Check]:
    checks = preflight.preflight(base, folder)
    for check in checks:
        assert bool(check.fix) != check.ok, f"{check} is red without a fix, or ok with one"
        assert check.fix.endswith(".") or check.ok
    return {check.name: check for check in checks}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Fake a Hub that has everything; return what each request came with."""
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(
        huggingface_hub, "get_hf_file_metadata", lambda url, **kwargs: asked.append(kwargs)
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    return asked


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fake a machine with so many GiB free, and with a GPU if it has a name."""

    def make(gpu: str = "", vram: float = 14.4, bf16: bool = False, ram: float = 11.2,
             disk: float = 70.0) -> None:  # fmt: skip
        memory = SimpleNamespace(available=int(ram * GIB), total=int(12.7 * GIB))
        usage = namedtuple("usage", ["total", "free"])(int(110 * GIB), int(disk * GIB))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(vram * GIB), 15 * GIB))
        # As on a T4: bf16 is emulated, not native.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
                including_emulation or bf16
            ),
        )  # fmt: skip
        if gpu:
            optim = ModuleType("bitsandbytes.optim")
            optim.AdamW8bit = object  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
            monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)

    return make


def test_the_embedded_base_is_ready_on_this_cpu(
    tmp_path: Path, machine: Callable[..., None]
) -> None:
    machine(ram=6, disk=5)
    checks = checks_of("toybox", tmp_path / "runs" / "not yet there")
    assert list(checks) == ["Python", "packages", "GPU", "RAM", "disk", "base", "scorer"]
    assert all(check.ok for check in checks.values()), Table(list(checks.values()))
    assert not (tmp_path / "runs").exists()


def test_stable_diffusion_on_a_free_colab_gpu(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]]
) -> None:
    machine(gpu="Tesla T4")
    checks = checks_of(SD, tmp_path)
    assert all(check.ok for check in checks.values()), Table(list(checks.values()))
    assert checks["GPU"].result == "Tesla T4, fp16 (no native bf16)"
    assert checks["GPU memory"].result == "14.4 of 15.0 GiB free, about 9.9 needed"
    assert checks["method"].result == "full fine-tuning, memory level 'standard'"
    assert checks["8-bit AdamW"].ok
    machine(gpu="NVIDIA A100", bf16=True)
    assert checks_of(SD, tmp_path)["GPU"].result == "NVIDIA A100, native bf16"
    assert checks_of(Z, tmp_path)["method"].result.startswith(
        "QLoRA, memory level 'low'; for full fine-tuning"
    )


def test_too_little_of_anything_is_red(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]]
) -> None:
    machine(gpu="Tesla T4", vram=1.5, ram=2.0, disk=2.0)
    red = {name: check for name, check in checks_of(SD, tmp_path).items() if not check.ok}
    assert red.keys() == {"method", "GPU memory", "RAM", "disk"}
    assert "not enough GPU memory, RAM or disk" in red["method"].result
    assert red["GPU memory"].result.startswith("1.5 of 15.0 GiB free")
    machine(gpu="Tesla T4", ram=2.0)
    fix = checks_of(FLUX, tmp_path)["RAM"].fix
    assert fix == "Restart the session or close other programs to free RAM."
    assert str(tmp_path) in red["disk"].fix


def test_drives_space_is_checked_where_a_run_is_backed_up(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(gpu="Tesla T4")
    assert "Drive" not in checks_of(SD, tmp_path)
    assert preflight.preflight(SD, tmp_path, tmp_path)[-4].name == "Drive"
    whole = will_it_fit.needs_on_gpu(SD)[0].drive
    assert whole < 9 * GIB, "a free Drive has 15 GB, and not only for this"
    free_drive(monkeypatch, 5)
    checks = {check.name: check for check in preflight.preflight(SD, tmp_path, tmp_path)}
    assert checks["method"].result == (
        "LoRA, memory level 'standard'; for full fine-tuning there is not enough Drive"
    )
    assert checks["Drive"].ok
    asked = {"method": "full"}
    (red,) = [c for c in preflight.preflight(SD, tmp_path, tmp_path, asked) if c.name == "Drive"]
    assert not red.ok and "DRIVE = False" in red.fix
    run = unfinished(tmp_path / "my-dog", SD, 5 * GIB)
    drive = preflight.preflight(SD, tmp_path, tmp_path, asked)[-4]
    assert drive.ok, "it is the run that will be resumed"
    assert drive.result.startswith("5.0 of 15.0 GiB free + 5.0 of an interrupted run, about ")
    (red,) = [c for c in preflight.preflight(SD, tmp_path, tmp_path, asked, False)
              if c.name == "Drive"]  # fmt: skip
    assert not red.ok and "interrupted" not in red.result
    (run / "pipeline").mkdir()
    (run / "pipeline" / "model_index.json").write_text("{}")
    assert not preflight.preflight(SD, tmp_path, tmp_path, asked)[-4].ok
    gone = tmp_path / "drive that is gone"
    assert "does not answer" in preflight.preflight(SD, tmp_path, gone)[-4].result


def free_drive(monkeypatch: pytest.MonkeyPatch, gib: float, folder: Path | None = None) -> None:
    """Fake the free space on Drive, and as much as a new session has on the disk."""
    usage, asked = namedtuple("usage", ["total", "free"]), []

    def room(place: Path) -> object:
        if "drive that is gone" in str(place):
            raise OSError(107, "Transport endpoint is not connected")
        asked.append(place)
        of_drive = len(asked) % 2 == 0  # the disk is asked first
        return usage(15 * GIB, int(gib * GIB)) if of_drive else usage(110 * GIB, 70 * GIB)

    monkeypatch.setattr(shutil, "disk_usage", room)


@pytest.mark.parametrize(
    ("base", "drive", "settings"),
    [
        (SD, 10, {"method": "full"}),
        (SD, 3, {"method": "lora"}),
        (XL, 10, {"method": "lora"}),
        (XL, None, {"method": "full"}),
        (SD35, 10, {"method": "lora", "quantize": "nf4"}),
        (FLUX, 10, {"method": "lora", "quantize": "nf4"}),
    ],
)
def test_on_a_free_colab_account_each_base_begins_with_a_method_that_works(
    base: str, drive: float | None, settings: dict[str, object], tmp_path: Path,
    machine: Callable[..., None], hub: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Check with a T4's 14.56 GiB, 12.7 GB of memory, 70 GB of disk and the rest of Drive's 15."""
    machine(gpu="Tesla T4", vram=14.56, ram=10.6)
    if drive is not None:
        free_drive(monkeypatch, drive)
    place = None if drive is None else tmp_path
    checks = preflight.preflight(base, tmp_path, place)
    assert all(check.ok for check in checks), Table(checks)
    best = preflight.recommend(base, tmp_path, place)
    assert best.settings == settings
    config = TrainConfig(TrainConfig.from_dict(ANY).subject, base, **best.settings)
    assert config.method == settings["method"]


ANY = {"subject": {"photos": "photos", "class_noun": "dog"}}


def test_what_a_person_sets_is_what_is_checked(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]]
) -> None:
    machine(gpu="Tesla T4")
    whole = preflight.recommend(SD35, tmp_path, None, {"method": "full"})
    assert whole.needs is not None and whole.needs.method == "full fine-tuning"
    assert whole.needs.shortages(whole.free)
    small = preflight.recommend(SD, tmp_path, None, {"method": "lora", "memory": "low"})
    assert small.needs is not None and (small.needs.method, small.needs.level) == ("LoRA", "low")
    lowest = preflight.recommend(SD, tmp_path, None, {"method": "lora", "memory": "lowest"})
    assert lowest.needs == small.needs, "a LoRA has no lower level"


def test_a_base_that_cannot_compute_in_float16_needs_another_gpu(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]]
) -> None:
    machine(gpu="Tesla T4")
    check = checks_of(Z, tmp_path)["method"]
    assert not check.ok and "no bfloat16" in check.result and "L4" in check.fix
    machine(gpu="NVIDIA L4", vram=22.0, bf16=True)
    assert checks_of(Z, tmp_path)["method"].ok


def test_a_red_line_stops_whoever_asks() -> None:
    Table([Check("disk", True, "fine")]).check()
    with pytest.raises(preflight.NotReady, match=r"not ready \(<base>\); follow.*SKIP_CHECKS"):
        Table(CHECKS).check()


def test_without_a_gpu_a_large_base_is_red_and_needs_what_it_needs_on_one(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]],
    fake_colab: FakeColab,
) -> None:  # fmt: skip
    machine()
    checks = checks_of(SD, tmp_path)
    assert [name for name, check in checks.items() if not check.ok] == ["GPU"]
    assert "Change runtime type" in checks["GPU"].fix and "toybox" in checks["GPU"].fix


def test_what_a_base_needs_grows_with_its_parameters(tiny_sd1: str) -> None:
    tiny, toybox, sd = (will_it_fit.needs_on_gpu(base)[0] for base in (tiny_sd1, "toybox", SD))
    assert tiny.disk < toybox.disk < sd.disk / 10 and tiny.gpu < toybox.gpu < sd.gpu / 10
    assert sd.memory < 10 * GIB < will_it_fit.needs_on_cpu(SD).memory
    assert will_it_fit.needs_on_gpu("somebody/model")[0] == sd, "taken for one of its size"


def test_each_method_needs_less_than_the_one_before() -> None:
    whole, *_, small = will_it_fit.needs_on_gpu(FLUX)
    assert (whole.method, small.method) == ("full fine-tuning", "QLoRA")
    assert small.gpu < whole.gpu / 5 and small.memory < whole.memory / 4
    assert small.disk < whole.disk / 4 and small.drive < whole.drive / 10
    plenty, nothing = Resources(1 << 50, 1 << 50, 1 << 50), Resources(0, 0, 0)
    assert will_it_fit.first_fitting(will_it_fit.needs_on_gpu(FLUX), plenty) == whole
    assert will_it_fit.first_fitting(will_it_fit.needs_on_gpu(FLUX), nothing) == small


def test_memory_disk_and_drive_are_what_was_measured_of_stable_diffusion() -> None:
    whole, lora = (
        found[0]
        for found in (
            will_it_fit.needs_on_gpu(SD),
            will_it_fit.needs_on_gpu(SD, asked={"method": "lora"}),
        )
    )
    checkpoint = 5_187_079_736  # bytes that one of its U-Net's were, with 8-bit moments
    # There with weights in half precision: two while the newer one is copied, and the best.
    backed_up = checkpoint - 1.72e9
    assert whole.drive - will_it_fit.IMAGES == pytest.approx(2 * backed_up + 1.72e9, rel=0.01)
    assert whole.disk == pytest.approx(4.27e9 + 3 * checkpoint + 4.27e9 + 4.27e9, rel=0.03)
    assert lora.drive < 1e9
    downloaded = 4 * 1_066_235_307  # its main files are float32
    assert downloaded < lora.disk < downloaded + 1.5e9
    small = will_it_fit.needs_on_gpu(SD, asked={"method": "lora", "variant": "fp16"})[0]
    assert lora.disk - small.disk == downloaded // 2
    assert whole.memory < 10e9 and lora.memory < 10e9
    for needs in will_it_fit.needs_on_gpu(FLUX, asked={"quantize": "nf4"}):
        assert needs.memory < 10e9, "what is quantized goes to the GPU tensor by tensor"


def test_the_disk_has_room_for_the_latents_of_large_images() -> None:
    model = base_models.describe("black-forest-labs/FLUX.2-klein-base-4B")
    with_images, without = (
        will_it_fit._needs(replace(model, resolution=side), "LoRA", "low", 1, 2).disk
        for side in (model.resolution, 0)
    )
    # A mean and a deviation of 200 images, each in 32 channels and an eighth of both sides.
    assert with_images - without == 200 * 2 * 4 * 32 * (1024 // 8) ** 2


def test_a_local_copy_of_a_known_base_takes_what_that_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {"transformer": 2_243_171_520, "text_encoder_3": 4_762_310_656, "vae": 902_129_827}
    monkeypatch.setattr(base_models, "_parameters", lambda folder: counted.items())
    (tmp_path / "model_index.json").write_text("{}")
    found = will_it_fit.needs_on_gpu(str(tmp_path))
    assert [one.gpu for one in found] == [one.gpu for one in will_it_fit.needs_on_gpu(SD35)]
    assert found[-1].disk < will_it_fit.needs_on_gpu(SD35)[-1].disk, "it need not be downloaded"


@pytest.mark.parametrize(
    ("base", "like"),
    [
        ("RunDiffusion/Juggernaut-XL-v9", "Stable Diffusion XL 1.0"),
        ("black-forest-labs/FLUX.1-Krea-dev", "Flux.1 dev"),
        ("stabilityai/stable-diffusion-3.5-large", "Stable Diffusion 3.5 medium"),
        ("Lykon/dreamshaper-8", "Stable Diffusion 1.5"),
    ],
)
def test_a_base_of_the_hub_that_is_not_known_is_taken_for_one_and_told(
    base: str, like: str, tmp_path: Path, machine: Callable[..., None],
    hub: list[dict[str, object]],
) -> None:  # fmt: skip
    machine(gpu="Tesla T4")
    assert will_it_fit.describe(base).name == like
    assert (
        f"assuming that '{base}' is as large as {like}"
        in checks_of(base, tmp_path)["method"].result
    )
    assert "as large" not in checks_of(SD, tmp_path)["method"].result


def test_the_distilled_model_is_checked_and_counted(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]]
) -> None:
    base, asked = KLEIN, {"draw_base": "black-forest-labs/FLUX.2-klein-4B"}
    machine(gpu="Tesla T4")
    best = preflight.recommend(base, tmp_path, None, asked)
    assert best.needs is not None
    assert (best.needs.method, best.needs.level) == ("QLoRA", "low")
    alone = will_it_fit.needs_on_gpu(base)
    both = will_it_fit.needs_on_gpu(base, asked=asked)
    assert {one.method for one in both} == {"LoRA", "QLoRA"}
    assert both[1].gpu - alone[4].gpu == pytest.approx(2 * 3.876e9, rel=0.01)
    assert both[-1].gpu - alone[-1].gpu == pytest.approx(2e9, rel=0.05)
    assert both[-1].disk - alone[-1].disk == pytest.approx(16e9, rel=0.05)
    undrawn = will_it_fit.needs_on_gpu(base, asked=asked | {"validate_every": 0})
    assert (undrawn[-1].gpu, undrawn[-1].disk) == (alone[-1].gpu, both[-1].disk)
    checks = {check.name: check for check in preflight.preflight(base, tmp_path, None, asked)}
    assert checks["draw_base"].ok and "distilled" not in checks["draw_base"].result
    assert "draw_base" not in checks_of(base, tmp_path)


def test_what_settings_rule_out_is_not_told_of_the_gpu(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]]
) -> None:
    machine(gpu="NVIDIA A100", bf16=True)
    asked = {"method": "full", "quantize": "nf4"}
    (check,) = [c for c in preflight.preflight(SD, tmp_path, None, asked) if c.name == "method"]
    assert not check.ok and check.result == "no training method agrees with SETTINGS"
    assert check.fix == "Leave method, quantize and memory out of SETTINGS."


def test_an_adapter_that_overflows_on_a_t4_is_refused_there(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]]
) -> None:
    def checked(**asked: object) -> Check:
        asked = {"method": "lora", "adapter": "delora"} | asked
        return next(c for c in preflight.preflight(SD, tmp_path, None, asked) if c.name == "method")

    machine(gpu="Tesla T4")
    check = checked()
    assert not check.ok and "adapter is 'delora', which produces NaN in float16" in check.result
    assert check.fix.startswith("Use a GPU with bfloat16") and "choose another" in check.fix
    assert checked(adapter="lokr").ok and checked(mixed_precision="no").ok
    machine(gpu="NVIDIA A100", bf16=True)
    assert checked().ok and not checked(mixed_precision="fp16").ok


def unfinished(folder: Path, base: str, size: int) -> Path:
    """Start a run with a checkpoint of this many bytes, which take no room."""
    run = runs.start(TrainConfig(Subject("photos", "dog", "ohwx"), base), folder)
    checkpoint = run.folder / "checkpoints" / "000100"
    checkpoint.mkdir(parents=True)
    with (checkpoint / "tensors.safetensors").open("wb") as file:
        file.truncate(size)
    return run.folder


def test_only_the_largest_run_that_may_be_resumed_leaves_its_room(tmp_path: Path) -> None:
    large = unfinished(tmp_path / "large", "toybox", 9 * GIB)
    unfinished(tmp_path / "small", "toybox", 2 * GIB)
    unfinished(tmp_path / "other", SD, 20 * GIB)

    def room(resume: bool | str) -> int:
        return will_it_fit._interrupted_bytes(tmp_path, "toybox", resume) // GIB

    assert [room(resume) for resume in (True, False, "small", "other")] == [9, 0, 2, 20]
    (large / ".backup.json").write_text(json.dumps({"parts": {}, "finished": True}))
    assert [room(resume) for resume in (True, "large")] == [2, 0]


def test_one_variant_of_a_local_bases_files_is_counted(tiny_sd1: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd1, tmp_path / "base")
    unet = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    before = will_it_fit.describe(str(tmp_path / "base"))
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert will_it_fit.describe(str(tmp_path / "base")).parameters == before.parameters
    unet.unlink()
    assert will_it_fit.describe(str(tmp_path / "base")).denoiser == before.denoiser > 0


def test_a_level_is_set_only_where_auto_would_take_another() -> None:
    """Check that what fits the GPU at "standard" may need the loading order of "low"."""
    standard, low = Needs(4, 9, 1, 1, "LoRA"), Needs(2, 5, 1, 1, "LoRA", "low")
    tight = Resources(memory=6, disk=9, gpu=16)
    assert will_it_fit.first_fitting([standard, low], tight) is low
    assert will_it_fit.settings(low, [standard, low], tight) == {"method": "lora", "memory": "low"}
    roomy = Resources(memory=9, disk=9, gpu=4)
    assert will_it_fit.first_fitting([standard, low], roomy) is low
    assert will_it_fit.settings(low, [standard, low], roomy) == {"method": "lora"}


def test_a_broken_bitsandbytes_is_red(
    tmp_path: Path, machine: Callable[..., None], hub: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(gpu="Tesla T4")
    monkeypatch.delattr(sys.modules["bitsandbytes.optim"], "AdamW8bit")
    check = checks_of(SD, tmp_path)["8-bit AdamW"]
    assert not check.ok and "ImportError" in check.result and "'adamw'" in check.fix


def test_missing_and_old_packages_are_red(
    tmp_path: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    plan = Plan([], {"numpy>=2.0": "1.26.4"}, [])
    monkeypatch.setattr(install, "missing_packages", lambda *args: plan)
    check = checks_of("toybox", tmp_path)["packages"]
    assert check.result == "too old: numpy>=2.0 (here 1.26.4)"
    assert check.fix == "Run pip install -U 'numpy>=2.0' and restart the session."
    plan = Plan(["torch>=2.6"], {}, [])
    checks = checks_of("toybox", tmp_path)
    assert list(checks) == ["Python", "packages"], "the rest cannot be checked without torch"
    assert checks["packages"].result == "missing: torch>=2.6"
    assert "install_missing()" in checks["packages"].fix


def test_python_is_what_the_package_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'requires-python = ">={".".join(map(str, preflight.PYTHON))}"' in text
    monkeypatch.setattr(sys, "version_info", (3, 10, 14, "final", 0))
    check = preflight._python()
    assert (check.ok, check.result) == (False, "3.10.14") and "3.11" in check.fix


# The base


def test_the_hub_is_asked_with_the_token_alone_and_not_for_long(
    tmp_path: Path, hub: list[dict[str, object]], fake_colab: FakeColab,
) -> None:  # fmt: skip
    assert checks_of(SD, tmp_path)["base"].ok
    # For the base and for both scorers.
    assert hub == [{"token": False, "timeout": preflight.TIMEOUT}] * 3, (
        "without a token, none is sent"
    )
    fake_colab.secrets["HF_TOKEN"] = TOKEN
    checks = checks_of(SD, tmp_path)
    assert hub[3]["token"] == TOKEN
    assert TOKEN not in repr(checks)


@pytest.mark.parametrize("answer", [TimeoutException(), NotebookAccessError()])
def test_each_table_asks_once_for_a_secret_that_the_user_does_not_give(
    tmp_path: Path, hub: list[dict[str, object]], fake_colab: FakeColab, answer: Exception
) -> None:
    fake_colab.secrets["HF_TOKEN"] = answer
    for tables in (1, 2):
        checks_of(SD, tmp_path)
        assert len(fake_colab.asked) == tables, "not for each scorer"
    fake_colab.secrets["HF_TOKEN"] = TOKEN
    checks_of(SD, tmp_path)
    assert [asked["token"] for asked in hub] == [False] * 6 + [TOKEN] * 3


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(url: str, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        (ConnectionError, "Check its name and the network"),
        (TimeoutError, "Check its name and the network"),
    ],
)
def test_a_base_that_cannot_be_had_is_red(
    tmp_path: Path, hub: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch,
    kind: type[Exception], fix: str,
) -> None:  # fmt: skip
    failing(monkeypatch, kind.__new__(kind, f"bearer {TOKEN}"))
    check = checks_of(SD, tmp_path)["base"]
    assert not check.ok and SD in check.result and fix in check.fix
    assert TOKEN not in repr(check), "what an error says is not shown"


def test_a_token_that_can_be_none_is_told_in_its_own_words(
    tmp_path: Path, hub: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: f"'{TOKEN}'")
    checks = checks_of(SD, tmp_path)
    for name in ("base", "scorer"):
        assert checks[name].result == "your token has a quotation mark in it"
        assert checks[name].fix.startswith("Copy it again from https://huggingface.co/")
    assert TOKEN not in repr(checks) and not hub


@pytest.mark.parametrize(
    ("pipeline", "denoiser"),
    [("StableDiffusionXLPipeline", "unet"), ("StableDiffusion3Pipeline", "transformer"),
     ("FluxPipeline", "transformer"), ("ZImagePipeline", "transformer"), ("Own", "denoiser")],
)  # fmt: skip
def test_a_base_that_was_downloaded_needs_no_network(
    tmp_path: Path, hub: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, pipeline: str,
    denoiser: str,
) -> None:  # fmt: skip
    from dreambooth_lib.families import loading
    from dreambooth_lib.families.flux import Flux

    class Own(Flux):
        denoiser_name = "denoiser"

    monkeypatch.setitem(loading.FAMILIES, "Own", Own)
    failing(monkeypatch, ConnectionError())
    index = tmp_path / "snapshot" / "model_index.json"
    (index.parent / denoiser).mkdir(parents=True)
    index.write_text(json.dumps({"_class_name": pipeline}))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(index))
    assert not checks_of(SD, tmp_path)["base"].ok, "a download that failed leaves this much"
    (index.parent / denoiser / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert checks_of(SD, tmp_path)["base"].ok


def test_the_scorer_is_checked_where_the_run_validates(
    tmp_path: Path, hub: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, clip_folder: Path
) -> None:
    def scorer(**settings: object) -> list[Check]:
        checks = preflight.preflight(SD, tmp_path, None, settings)
        return [check for check in checks if check.name.endswith("scorer")]

    check, images = scorer()
    assert check.ok and "openai/clip-vit-base-patch32" in check.result
    assert images.ok and "facebook/dinov2-small" in images.result
    assert scorer(validate_every=0) == []
    (check,) = scorer(scorer=str(clip_folder))
    assert check.ok and "on this machine" in check.result
    assert scorer(scorer="toybox", image_scorer=str(clip_folder))[1].ok
    (check,) = scorer(scorer=str(tmp_path))
    assert not check.ok and "in safetensors" in check.result
    failing(monkeypatch, ConnectionError())
    check, _ = scorer()
    assert not check.ok and "network" in check.fix


def test_a_local_base_is_found_or_said_to_be_wrong(
    tmp_path: Path, hub: list[dict[str, object]], tiny_sd1: str
) -> None:
    assert checks_of(tiny_sd1, tmp_path)["base"].ok
    check = checks_of(str(tmp_path), tmp_path)["base"]
    assert not check.ok and "has no model_index.json" in check.result
    assert check.fix.startswith("Give a folder")
    check = checks_of("/nowhere/base", tmp_path)["base"]
    assert not check.ok and "/nowhere/base" in check.result
    assert len(hub) == 6, "the Hub is not asked for what is here: twice a run, for the scorers"


# The table

CHECKS = [Check("disk", True, "9 < 10 & more"), Check("<base>", False, "gone", "Give 'toybox'.")]


def test_the_table_says_ok_in_words_and_signs() -> None:
    assert repr(Table(CHECKS)).splitlines() == [
        "✓ ok      disk           9 < 10 & more",
        "✗ to fix  <base>         gone",
        "                         -> Give 'toybox'.",
    ]
    shown = Table(CHECKS)._repr_html_()
    assert shown.count("<tr>") == 3
    assert "</b> ok</td>" in shown and "</b> to fix</td>" in shown


def test_the_table_is_safe_and_readable_in_dark_mode() -> None:
    shown = Table(CHECKS)._repr_html_()
    assert "9 &lt; 10 &amp; more" in shown and "&lt;base&gt;" in shown and "<base>" not in shown
    assert "background" not in shown and "<script" not in shown
    for colour in set(re.findall(r"#[0-9a-f]{6}", shown)):
        for ground in ("#ffffff", "#1e1e1e", "#383838"):
            assert contrast(colour, ground) >= 3, "the least for a sign, by WCAG 2.1"


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
                            for v in values)  # fmt: skip
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_check_starts_without_torch() -> None:
    """What is missing cannot be told by a module that needs it."""
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from dreambooth_lib.notebook import preflight, will_it_fit, base_models\n"
        "print('ready')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ready\n", done.stderr
