"""Test estimates from configs alone against what real tensors take."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPModel

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families import base, loading
from dreambooth_lib.training import fused_optimizer, memory_estimate, runs
from dreambooth_lib.training.allocation_counter import (
    IN_FLOAT32,
    AllocationCounter,
    CudaAutocast,
    make_fake,
)
from dreambooth_lib.training.flat_parameters import Bucket
from dreambooth_lib.training.memory_estimate import (
    _drawing_bytes,
    _estimate,
    estimate,
    suggest_savings,
)
from dreambooth_lib.training.memory_level import choose_level
from dreambooth_lib.training.part_sizes import module_bytes
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.trainable import Trainable, load, training_load_options
from tools.bases import configs

Make = Callable[..., TrainConfig]
FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "flux", "flux_2_klein", "z_image"]


def test_the_counter_counts_current_and_peak_bytes() -> None:
    with AllocationCounter() as counter:
        a = torch.zeros(1000)
        assert counter.current_bytes == 4000
        b = a + 1
        view = b[:10]
        assert counter.current_bytes == 8000
        del b
        assert counter.current_bytes == 8000  # the view keeps it alive
        del view
        assert counter.current_bytes == 4000
        (a * 2 + 1).sum()
    assert counter.peak_bytes == 12000


@pytest.fixture
def tiny_config(photos: str, make_config: Make, tiny_bases: Callable[[str], str]) -> Make:
    def make(family: str, **changes: Any) -> TrainConfig:
        return make_config(tiny_bases(family), photos, **({"resolution": 16} | changes))

    return make


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_estimated_from_the_configs_alone(
    family: str, method: str, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        family,
        method=method,
        lora_rank=1,
        train_text_encoder=family not in ("flux_2_klein", "z_image"),
    )
    # Z-Image has no float16.
    half, precision = torch.float16, "fp16"
    if family == "z_image":
        half, precision = torch.bfloat16, "bf16"
    loaded = load(config, **training_load_options(config, half))
    parts = [loaded.denoiser, *loaded.text_encoders, *loaded.frozen]
    # Some layers of T5 stay in float32 in any precision.
    expected = sum(p.nbytes for part in parts for p in part.parameters())
    trained = [
        p.numel() for part in parts[: 1 + len(loaded.text_encoders)] for p in part.parameters()
    ]
    # No weight may be loaded.
    monkeypatch.setattr(loading, "load_model", None)
    estimated = estimate(config, precision)
    if method == "full":
        assert estimated.weights == pytest.approx(expected, rel=0.02)  # and buffers
        unused = sum(p.numel() for p in loaded.unused_parameters())
        assert estimated.moments == pytest.approx((sum(trained) - unused) * (2 + 8 / 256), rel=0.01)
    else:
        added = estimated.moments / (2 + 8 / 256)
        assert 0 < added < 0.2 * sum(trained)
        assert estimated.weights == pytest.approx(expected + 4 * added, rel=0.02)


# At low memory the workspace of the CPU's convolutions would be a third of a tiny U-Net's.
@pytest.mark.parametrize(
    ("family", "memory"), [("sd1", "standard"), ("sd3", "standard"), ("sd3", "low")]
)
def test_working_memory_and_flops_are_those_of_a_real_training_step(
    family: str, memory: str, tiny_config: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fused_optimizer.FusedBackwardOptimizer, "LARGEST_BUCKET", 1
    )  # else a tiny model's gradients all fit
    monkeypatch.setattr(Bucket, "keep_gradients", lambda _: None)  # as on a GPU
    config = tiny_config(family, memory=memory, prior="distilled", optimizer="adamw")
    trainer = Trainer(runs.start(config.replace(prior="none"), tmp_path / "run"))
    batch = trainer.batches.at(0)
    rows = [0, 0, 1, 1]
    noised = type(batch.noised)(*(value[rows] for value in batch.noised))
    cond = {name: value[rows] for name, value in batch.cond.items()}
    with AllocationCounter(trainer.model) as counter:
        loss = trainer.model(noised.x_t, noised.t, cond, []).square().mean()
        trainer.optimizer.adam.step = lambda: None  # moments are counted separately
        trainer.optimizer.backward(loss)
        if memory == "low":
            trainer.optimizer.step()
    estimated = estimate(config, "no")
    # The CPU's convolutions need some workspace besides.
    assert estimated.working == pytest.approx(counter.peak_bytes, rel=0.15)
    assert estimated.flops == pytest.approx(counter.flops, rel=0.01)


def test_flops_are_those_of_torchs_own_counter() -> None:
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    )
    x = torch.randn(2, 3, 3, 3)
    with FlopCounterMode(display=False) as torch_counter:
        layers(x).sum().backward()
    with AllocationCounter() as counter:
        layers(x).sum().backward()
    assert counter.flops == torch_counter.get_total_flops() > 0


def test_each_memory_level_takes_less_than_the_one_before(tiny_config: Make) -> None:
    levels = [
        estimate(tiny_config("sd1", memory=memory, batch_size=1), "fp16").memory
        for memory in ("standard", "low", "lowest")
    ]
    assert levels == sorted(levels, reverse=True) and len(set(levels)) == 3


@pytest.mark.parametrize("large", [False, True])
def test_encoding_to_latents_is_counted_and_large_images_one_at_a_time(
    large: bool, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MAX_PIXELS", 16 * 16 * (1 if large else 8))
    _estimate.cache_clear()
    config = tiny_config("sd1", method="lora", lora_rank=1, prior="none")
    family = load(config, **training_load_options(config, torch.float32))
    with AllocationCounter() as counter:
        for weight in family.pipeline.vae.state_dict().values():
            counter.exclude(weight)
        for pixels in torch.zeros(8, 3, 16, 16).split(1 if large else 8):
            family.encode_images(pixels)
    estimated = estimate(config, "no")
    # The CPU's convolutions need some workspace besides.
    assert estimated.encoding - estimated.weights == pytest.approx(counter.peak_bytes, rel=0.25)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return Stable Diffusion 1.5's configs, in real sizes, without weights."""
    return configs("sd15", tmp_path_factory.mktemp("architectures") / "sd15")


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"memory": "standard"}, 9.33),
        ({"memory": "low"}, 5.90),
        ({"memory": "low", "train_text_encoder": True}, 6.61),
    ],
)
def test_the_estimate_is_close_to_what_an_h200_measured(
    settings: dict[str, Any], measured: float, sd15: str
) -> None:
    """Compare peaks in GiB, for one instance and one class image of 512 pixels in half precision.

    The whole base was in half precision, the autoencoder too, as it is in bfloat16. Without what a
    GPU's autocast does to norms the estimates would be 4.1 to 4.4% too low.
    """
    fields = {"validate_every": 0, "class_folder": "given", "optimizer": "adamw8bit"}
    config = TrainConfig(Subject("photos", "dog"), sd15, **(fields | settings))
    assert estimate(config, "bf16").memory / GIB == pytest.approx(measured, rel=0.04)


def test_class_images_are_estimated_as_an_h200_measured_them(sd15: str) -> None:
    """Compare eight images of 512 pixels at once, with guidance, in pure half precision."""
    config = TrainConfig(Subject("photos", "dog"), sd15, prior_guidance_scale=7.5)
    family = loading.load_meta(sd15, resolution=config.resolution, dtype=torch.bfloat16, trained=())
    modules = [family.denoiser, *family.text_encoders, *family.frozen]
    peak = sum(module_bytes(module, None, torch.bfloat16) for module in modules)
    with FakeTensorMode():
        for module in modules:
            make_fake(module)
        model = Trainable(family, with_text=False).eval()
        peak += _drawing_bytes(family, model, family.default_batch_size, config, torch.float32)
    assert peak / GIB == pytest.approx(3.06, rel=0.1)


@pytest.mark.parametrize("name", ["group_norm", "layer_norm", "interpolate", "softmax"])
def test_what_a_gpus_autocast_computes_in_float32_is_counted_so(name: str) -> None:
    x = torch.zeros(2, 4, 8, 8, dtype=torch.float16)
    call: dict[str, Callable[[], torch.Tensor]] = {
        "group_norm": lambda: F.group_norm(x, 2),
        "layer_norm": lambda: F.layer_norm(x, [8]),
        "interpolate": lambda: F.interpolate(x, scale_factor=2.0),
        "softmax": lambda: x.softmax(-1),
    }
    with CudaAutocast(), torch.autocast("cpu", torch.float16):
        assert call[name]().dtype is torch.float32
    with CudaAutocast():
        assert call[name]().dtype is torch.float16, "only under autocast"


def test_those_operations_are_on_torchs_own_list_for_cuda() -> None:
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    listed = re.findall(r"_\((\w+)(?:, \w+)?\)", header.read_text().partition("FORALL_FP32(")[2])
    names = {func.__name__.replace("interpolate", "upsample_nearest2d") for func in IN_FLOAT32}
    assert names <= set(listed), names - set(listed)


def test_norms_take_more_in_mixed_precision_and_no_more_without(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("sd1", prior="none", memory="standard")
    with_norms = [estimate(config, precision).working for precision in ("fp16", "no")]
    monkeypatch.setattr("dreambooth_lib.training.allocation_counter.IN_FLOAT32", set())
    _estimate.cache_clear()
    without = [estimate(config, precision).working for precision in ("fp16", "no")]
    _estimate.cache_clear()
    assert with_norms[0] > 1.02 * without[0] and with_norms[1] == without[1]


def test_the_scorer_is_counted_where_it_is_on_the_gpu(tiny_config: Make, clip_folder: Path) -> None:
    fields = {"validate_every": 2, "scorer": str(clip_folder), "memory": "standard"}
    expected = sum(p.nbytes for p in CLIPModel.from_pretrained(clip_folder).parameters())
    estimated = estimate(tiny_config("sd1", **fields), "fp16")
    assert estimated.scoring == pytest.approx(expected, rel=0.01)
    assert estimated.memory >= estimated.weights + estimated.moments + estimated.working + expected
    assert estimate(tiny_config("sd1", **(fields | {"memory": "low"})), "fp16").scoring == 0
    assert estimate(tiny_config("sd1", memory="standard"), "fp16").scoring == 0
    on_hub = estimate(
        tiny_config("sd1", **(fields | {"scorer": "openai/clip-vit-base-patch32"})), "fp16"
    )
    assert on_hub.scoring == 4 * 151_277_313
    both = tiny_config("sd1", **(fields | {"image_scorer": "facebook/dinov2-small"}))
    assert estimate(both, "fp16").scoring == estimated.scoring + 4 * 22_056_576


def test_drawing_class_images_is_counted(tiny_config: Make) -> None:
    config = tiny_config("sd1", memory="low", method="lora", lora_rank=1)
    drawn = estimate(config, "fp16")
    from_folder = estimate(config.replace(class_folder="photos"), "fp16")
    assert drawn.preparing > from_folder.preparing == from_folder.weights
    assert drawn.memory == drawn.preparing > from_folder.memory


def test_a_teacher_is_copied_before_it_is_rounded(tiny_config: Make) -> None:
    estimated = estimate(tiny_config("sd1", prior="distilled", memory="standard"), "fp16")
    denoiser = loading.load_model(tiny_config("sd1").base).denoiser
    weights = sum(p.nbytes for p in denoiser.parameters())  # once as it trains, half as a teacher
    assert estimated.preparing == pytest.approx(estimated.weights - weights / 2 + weights, rel=0.01)


def test_layers_that_are_never_quantized_are_counted_at_full_size(tiny_config: Make) -> None:
    """Test that T5's layers that overflow float16 are not quantized, in bfloat16 neither."""
    config = tiny_config(
        "sd3", method="lora", lora_rank=1, quantize="nf4", memory="low", prior="none"
    )
    encoder = loading.load_model(config.base).pipeline.text_encoder_3
    layers = {n: m for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    unpacked = sum(m.weight.numel() for n, m in layers.items() if n.endswith(".wo"))
    packed = sum(m.weight.numel() for m in layers.values()) - unpacked
    rest = sum(p.numel() for p in encoder.parameters()) - packed - unpacked
    counted = module_bytes(encoder.bfloat16(), 0.5, torch.bfloat16)
    assert counted == pytest.approx(2 * (unpacked + rest) + packed / 2, rel=0.01)


def test_a_loras_gradients_exist_together_at_any_level(tiny_config: Make) -> None:
    """Test that a LoRA's gradients, which are small, are not stepped one by one."""
    config = tiny_config("sd3", method="lora", lora_rank=64, prior="none", memory="low")
    estimated = estimate(config, "fp16")
    numbers = estimated.moments / (2 + 8 / 256)
    assert estimated.working > 4 * numbers


def test_drawing_validation_images_is_counted(tiny_config: Make) -> None:
    config = tiny_config("sd1", memory="low", method="lora", lora_rank=1, validate_every=2)
    estimated = estimate(config, "no")
    family = load(config, **training_load_options(config, torch.float32))
    with torch.no_grad(), AllocationCounter() as counter:
        for module in (family.denoiser, *family.text_encoders, family.pipeline.vae):
            for weight in module.state_dict().values():
                counter.exclude(weight)
        family.generate([("a dog", seed) for seed in range(family.batch_size_in_training)], 1, 3.0)
    # The pipeline also makes noise, and pixels from latents.
    assert estimated.validating == pytest.approx(counter.peak_bytes, rel=0.25)
    assert estimated.memory >= estimated.weights + estimated.moments + estimated.validating
    assert estimate(config.replace(validate_every=0), "no").validating == 0


def test_the_teacher_of_the_distilled_prior_is_counted(tiny_config: Make) -> None:
    plain, distilled = (
        estimate(tiny_config("sd1", prior=prior), "fp16").weights
        for prior in ("generated", "distilled")
    )
    assert distilled > plain
    anchored = tiny_config("sd1", anchor_weight=1.0)
    assert estimate(anchored).moments > estimate(anchored.replace(anchor_weight=None)).moments
    lora = [estimate(tiny_config("sd1", prior=p, method="lora"), "fp16").weights
            for p in ("generated", "distilled")]  # fmt: skip
    assert lora[0] == lora[1]


@pytest.mark.parametrize("family", FAMILIES[:-1])  # Z-Image has no float16
def test_bfloat16_weights_compute_in_float16_or_are_refused(family: str, tiny_config: Make) -> None:
    config = tiny_config(family)
    lowest = config.replace(memory="lowest")
    assert estimate(lowest, "bf16").memory > 0
    if family == "sd3":
        with pytest.raises(ConfigError, match=r"memory is 'lowest'.* cannot compute.*float16; set"):
            estimate(lowest, "fp16")
        low = choose_level([config.replace(mixed_precision="fp16")], 1)
        assert low == {"memory": "low"}
        assert "'lowest'" not in suggest_savings(config, "fp16")
    else:
        assert estimate(lowest, "fp16").memory > 0


def test_savings_are_suggested_with_the_memory_they_take(tiny_config: Make) -> None:
    config = tiny_config("sd1", memory="standard", batch_size=4, lora_rank=1)
    text = suggest_savings(config, "fp16")
    size, some = r"\([\d.]+ GiB\)", r"[\d.]+ GiB"
    low, lowest = f"memory='low' {size}", f"memory='lowest' {size}"
    lora = f"start a new run with method='lora' {size}"
    assert re.fullmatch(
        f"which needs about {some}; resume with {low} or {lowest}, or {lora}", text
    ), text
    large = config.replace(resolution=64)
    assert "resolution=32 (" in suggest_savings(large, "fp16", room=0).split("; ")[1].split(", ")[0]
    assert suggest_savings(large, "fp16").count(" GiB)") == 3, "no more than these were needed"


@pytest.mark.parametrize(
    ("saving", "expected"),
    [
        ([], "choose a smaller base, or use a GPU with more memory"),
        (["memory"], "resume with memory='low' (1.0 GiB) or memory='lowest' (1.0 GiB)"),
        (["resolution"], "resume with resolution=32 (1.0 GiB)"),
        (["quantize"], "start a new run with quantize='nf4' (1.0 GiB)"),
        (["quantize", "resolution"], "resume with resolution=32 (1.0 GiB), or start a new run with "
         "quantize='nf4' (1.0 GiB)"),
    ],
)  # fmt: skip
def test_savings_of_a_lora_read_well_whichever_there_are(
    saving: list[str], expected: str, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("sd1", memory="standard", method="lora", resolution=64)

    def fake(one: TrainConfig, precision: str) -> SimpleNamespace:
        less = any(getattr(one, name) != getattr(config, name) for name in saving)
        return SimpleNamespace(memory=GIB if less else 2 * GIB)

    monkeypatch.setattr(memory_estimate, "estimate", fake)
    assert suggest_savings(config, "fp16") == f"which needs about 2.0 GiB; {expected}"
