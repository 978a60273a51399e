"""Test the known base models: their figures, which fit, and how they are shown."""

import re
from pathlib import Path

import pytest
import torch

from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.families import loading
from dreambooth_lib.figures import labels
from dreambooth_lib.notebook import base_models, preflight
from dreambooth_lib.notebook.base_models import (
    KNOWN,
    METHODS,
    Table,
    methods_for,
    methods_for_all,
)
from dreambooth_lib.training.memory_level import USABLE_SHARE
from tools.bases import configs, needed, parameters

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
XL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "base", "method", "level"),
    [
        ("sd15", SD, "full fine-tuning", "standard"),
        ("sd15", SD, "full fine-tuning", "lowest"),
        ("sd15", SD, "QLoRA", "low"),
        ("sdxl", XL, "LoRA", "standard"),
    ],
)
def test_figures_are_what_is_estimated_of_the_architectures(
    name: str, base: str, method: str, level: str, tmp_path: Path
) -> None:
    path, one = configs(name, tmp_path / name), base_models.describe(base)
    assert parameters(path) == (one.parameters, one.denoiser, one.large)
    assert loading.inspect_base(path).resolution == one.resolution
    stored = one.gib["fp16"][list(METHODS).index(method)][METHODS[method].levels.index(level)]
    assert needed(path, method, level, "fp16") == pytest.approx(stored, abs=0.11)


def test_every_base_has_a_figure_for_every_method_and_each_level_needs_less() -> None:
    for one in KNOWN:
        assert one.gib.keys() == {"fp16", "bf16"}
        for by_method in one.gib.values():
            for needs, method in zip(by_method, METHODS.values(), strict=True):
                assert len(needs) == len(method.levels), one.name
                found = [gib for gib in needs if gib is not None]
                assert found == sorted(found, reverse=True), one.name
                assert not found or found[0] == needs[0], one.name
        assert all(None not in needs[:2] for needs in one.gib["bf16"]), one.name
    assert len({one.base for one in KNOWN}) == len(KNOWN) == 10
    describe = base_models.describe
    assert describe("Flux.1 dev") is describe("black-forest-labs/FLUX.1-dev") in KNOWN


def test_the_first_level_that_fits_is_taken() -> None:
    sd = base_models.describe(SD)
    needs = sd.gib["bf16"][0]
    for level, need in zip(METHODS["full fine-tuning"].levels, needs, strict=True):
        row = methods_for(sd, need * GIB, "bf16")[0]
        assert (row.method, row.level, row.gib, row.fits) == ("full fine-tuning", level, need, True)
    row = methods_for(sd, needs[-1] * GIB - 1, "bf16")[0]
    assert (row.level, row.fits) == ("lowest", False)
    assert len(methods_for_all(24 * GIB, "bf16")) == len(KNOWN) * len(METHODS)


def test_more_memory_fits_more() -> None:
    fits = [
        {(row.base.name, row.method) for row in methods_for_all(gib * GIB, "bf16") if row.fits}
        for gib in (0, 13, 36, 200)
    ]
    assert not fits[0] and fits[0] < fits[1] < fits[2] < fits[3]
    assert len(fits[3]) == len(KNOWN) * len(METHODS)
    assert {row.base.base for row in methods_for_all(13 * GIB) if row.fits} >= {"toybox", SD, XL}


def test_the_table_says_what_fits_in_words_and_signs() -> None:
    text = repr(Table(methods_for_all(USABLE_SHARE * 14.5 * GIB)))
    by_name = {re.split(r"\s{2,}", line)[1]: line for line in text.splitlines()}
    assert by_name["Stable Diffusion 1.5"].startswith("✓ fits")
    assert "full fine-tuning (" in by_name["Stable Diffusion 1.5"]
    assert "full fine-tuning (" not in by_name["Flux.1 dev"]
    text = repr(Table(methods_for_all(1.0 * GIB)))
    assert "✗ too large" in text and " needs " in text and "✓ fits" in text
    (sd,) = [line for line in text.splitlines() if "Stable Diffusion 1.5" in line]
    assert all(f"{method} (" in sd for method in METHODS), "all are named where none fits"
    shown = Table(methods_for_all(0), gpu=False)._repr_html_()
    assert labels.NEUTRAL in shown and labels.BAD not in shown, "nothing is to be mended"
    shown = Table(methods_for_all(24 * GIB))._repr_html_()
    assert shown.count("<tr>") == 1 + len(KNOWN) and "</b> fits</td>" in shown
    assert shown.count("accept its terms on the Hub") == sum(one.gated for one in KNOWN)
    for one in KNOWN:
        assert f">{one.base}</td>" in shown, "to be copied into BASE"


@pytest.mark.parametrize(
    ("base", "name"),
    [("me/my-klein-9B-lora", "9B"), ("me/FLUX.2-klein-base-4B-fp8", "4B"), ("me/klein", "4B")],
)
def test_a_base_on_the_hub_is_taken_for_the_klein_that_its_name_says(base: str, name: str) -> None:
    found = base_models.describe(base)
    assert found.guess and found.name == f"FLUX.2 klein-base {name}"


def test_qlora_of_klein_is_offered_on_a_t4() -> None:
    klein = base_models.describe("black-forest-labs/FLUX.2-klein-base-4B")
    assert not klein.gated and klein.licence == "Apache-2.0"
    fitting = {row.method for row in methods_for(klein, USABLE_SHARE * 14.5 * GIB) if row.fits}
    assert fitting == {"LoRA", "QLoRA"}


def test_a_base_that_cannot_compute_in_float16_is_not_offered_where_there_is_no_other() -> None:
    z_image = base_models.describe("Z-Image")
    assert methods_for(z_image, 1 << 50) == []
    assert methods_for(z_image, 1 << 50, "bf16")
    by_name = {
        re.split(r"\s{2,}", line)[1]: line
        for line in repr(Table(methods_for_all(1 << 50))).splitlines()
    }
    assert by_name["Z-Image"].startswith("✗ needs bfloat16") and "bfloat16" in by_name["Z-Image"]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_table_is_of_this_machine(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    found = base_models.table()
    text = repr(found)
    if gpu:
        assert found.rows == methods_for_all(USABLE_SHARE * 80 * GIB, "bf16")
        assert "✗" not in text, "an A100 can train each of them"
    else:
        assert text.count("✓") == 1 and "on the CPU too" in text
        assert text.count("✗ needs a GPU") == len(KNOWN) - 1


def test_checks_and_bases_are_one_kind_of_table() -> None:
    checks = preflight.Table([preflight.Check("disk", True, "fine")])._repr_html_()
    found = Table(methods_for_all(0))._repr_html_()
    assert checks.partition("</th>")[0] == found.partition("</th>")[0]
