"""Add LoRAs where peft finds quantizers that it cannot use."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from peft import import_utils

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.families import loading, quantizers
from dreambooth_lib.training import lora


def refuses(package: str) -> Callable[[], bool]:
    def check() -> bool:
        raise ImportError(f"Found an incompatible version of {package}")

    return check


class Broken(ModuleType):
    """A module whose native library does not load."""

    def __getattr__(self, name: str) -> Any:
        raise OSError(f"torchao.so: undefined symbol, asked for {name}")


def replace_check(patch: pytest.MonkeyPatch, name: str, check: Callable[[], bool]) -> None:
    """Replace a check in all of peft's modules."""
    for key, module in [*sys.modules.items()]:
        if key.partition(".")[0] == "peft" and name in vars(module):
            patch.setattr(module, name, check)


@pytest.fixture(params=["torchao too old", "torchao too new", "torchao broken", "gptqmodel"])
def unusable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a quantizer that keeps peft from adding a LoRA to a plain layer."""
    match request.param:
        case "torchao too old":
            replace_check(monkeypatch, "is_torchao_available", refuses("torchao"))
        case "gptqmodel":
            replace_check(monkeypatch, "is_gptqmodel_available", refuses("gptqmodel"))
        case kind:
            replace_check(monkeypatch, "is_torchao_available", lambda: True)
            monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
            if kind == "torchao broken":
                monkeypatch.setitem(sys.modules, "torchao.utils", Broken("torchao.utils"))
    # So that monkeypatch undoes what ignore_unusable replaces, too.
    replace_check(monkeypatch, "is_torchao_available", import_utils.is_torchao_available)
    quantizers.ignore_unusable.cache_clear()
    yield
    quantizers.ignore_unusable.cache_clear()


def plain_layer() -> Any:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), layer)


def test_a_lora_is_added_saved_and_merged(
    unusable: None, tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig],
    tmp_path: Any,
) -> None:  # fmt: skip
    with pytest.raises((ImportError, OSError)):
        plain_layer()
    config = make_config(tiny_sd1, photos, method="lora", lora_rank=2)
    family = loading.load_model(tiny_sd1)
    lora.add_lora(family, config)
    lora.save_lora(family, config, tmp_path)
    quantizers.ignore_unusable.cache_clear()
    assert not hasattr(loading.compose({str(tmp_path): 1.0}).denoiser, "peft_config")
    plain_layer()


def test_a_lora_is_composed(
    unusable: None, tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig],
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In a process that trains nothing."""
    config = make_config(tiny_sd1, photos, method="lora", lora_rank=2)
    with monkeypatch.context() as usable:
        for name in ("is_torchao_available", "is_gptqmodel_available"):
            replace_check(usable, name, lambda: False)
        family = loading.load_model(tiny_sd1)
        lora.add_lora(family, config)
        lora.save_lora(family, config, tmp_path)
    quantizers.ignore_unusable.cache_clear()
    assert loading.compose({str(tmp_path): 1.0}).denoiser is not None


def test_usable_quantizers_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_check(monkeypatch, "is_torchao_available", lambda: False)
    before = import_utils.is_torchao_available
    quantizers.ignore_unusable.cache_clear()
    quantizers.ignore_unusable()
    assert import_utils.is_torchao_available is before
    assert import_utils.is_gptqmodel_available() is False
