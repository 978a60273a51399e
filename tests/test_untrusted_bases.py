"""Refuse bases and LoRAs that would run code or are damaged, in a sentence that names the file."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from dreambooth_lib.core.config import origin
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.families import loading
from dreambooth_lib.families.loading import BaseError
from dreambooth_lib.training.native_precision import native_precision

OWN = {"base": "toybox", "revision": None, "variant": None, "quantize": None, "word": None}


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def base(tiny_sd1: str, tmp_path: Path) -> Path:
    """Copy the tiny base."""
    return Path(shutil.copytree(tiny_sd1, tmp_path / "base"))


@pytest.fixture
def marker(tmp_path: Path) -> Callable[[str], Path]:
    """Write a module of a name that leaves a mark where it is imported; all must leave none."""

    def write(name: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom diffusers import UNet2DConditionModel as X"
        )
        return file

    return write


def refused(base: str | Path, *parts: str, **options: Any) -> str:
    """Return the sentence by which a base is refused, on loading and on reading its configs."""
    with pytest.raises(BaseError) as found:
        loading.load_model(str(base), **options)
    text = str(found.value)
    assert "\n" not in text and text.endswith(".") and "; " in text, text
    for part in parts:
        assert part in text, text
    return text


# What would run code


@pytest.mark.parametrize("place", ["base/unet/foreign.py", "importable.py"])
def test_an_index_that_names_a_module_is_refused_before_it_is_imported(
    place: str, base: Path, marker: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name = marker(place).stem
    monkeypatch.syspath_prepend(tmp_path)
    edit(base / "model_index.json", unet=[name, "X"])
    refused(base, str(base / "model_index.json"), f"'unet' by the module '{name}'")
    with pytest.raises(BaseError, match="by the module"):
        loading.load_meta(str(base))
    assert not (tmp_path / "ran").exists() and name not in sys.modules


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_module_in_a_part_of_the_librarys_own_name_is_not_imported(
    library: str, base: Path, marker: Callable[[str], Path], tmp_path: Path
) -> None:
    part = {"diffusers": "unet", "transformers": "text_encoder"}[library]
    file = marker(f"base/{part}/{library}.py")
    refused(base, str(file), "runs none")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("unet", ["diffusers", "AutoencoderKL"]),
        ("unet", ["diffusers", "DiffusionPipeline"]),
        ("scheduler", ["diffusers", "NoSuchScheduler"]),
        ("safety_checker", ["stable_diffusion.evil", "X"]),
        ("unet", ["diffusers", 5]),
        ("unet", ["diffusers"]),
        ("vae", "AutoencoderKL"),
    ],
)
def test_a_part_of_a_class_that_its_pipeline_does_not_take_is_refused(
    part: str, value: Any, base: Path
) -> None:
    edit(base / "model_index.json", **{part: value})
    refused(base, "base", part)


def test_an_index_of_the_released_models_passes(base: Path) -> None:
    edit(
        base / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        tokenizer=["transformers", "CLIPTokenizerFast"],
        scheduler=["diffusers", "PNDMScheduler"],
        image_encoder=[None, None],
    )
    loading.load_model(str(base))
    loading.load_meta(str(base))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("text_encoder/config.json", "auto_map", {"AutoModel": "foreign.X"}),
        ("tokenizer/tokenizer_config.json", "auto_map", {"AutoTokenizer": ["foreign.X", None]}),
        ("text_encoder/config.json", "attn_implementation", "owner/kernel"),
        ("unet/config.json", "auto_map", {"AutoModel": "foreign.X"}),
    ],
)
def test_a_config_that_names_code_is_refused(file: str, key: str, value: Any, base: Path) -> None:
    edit(base / file, **{key: value})
    refused(base, str(base / file), f"'{key}'")


def test_a_pipeline_class_with_code_of_its_own_is_refused(base: Path) -> None:
    edit(base / "model_index.json", _class_name=["pipeline", "Own"])
    refused(base, str(base / "model_index.json"))


# A LoRA's folder


@pytest.fixture
def lora_of(start_run: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Make the folder of a LoRA's weights, without training it."""
    from dreambooth_lib.training import lora, trainable

    def make(name: str, base: str | None = None) -> Path:
        run = start_run(name, "sd1", method="lora")
        config = run.config if base is None else run.config.replace(base=base)
        family = trainable.load_base(config)
        with torch.random.fork_rng():
            trainable.wrap_trained_parts(family, config)
            for parameter in lora.trained_parameters(family.denoiser):
                parameter.data.normal_(0, 0.1)
        (tmp_path / f"{name}-lora").mkdir()
        lora.save_lora(family, config, tmp_path / f"{name}-lora")
        return tmp_path / f"{name}-lora"

    return make


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("custom_pipeline", "."),
        ("trust_remote_code", True),
        ("use_safetensors", False),
        ("dtype", "float16"),
        ("base", None),
        ("base", ["toybox"]),
        ("revision", 5),
        ("variant", {}),
        ("quantize", "fp4"),
        ("word", ["<rex>"]),
    ],
)
def test_a_base_json_of_more_than_five_strings_is_refused(
    key: str, value: Any, tmp_path: Path, marker: Callable[[str], Path]
) -> None:
    marker("lora/pipeline.py")
    (tmp_path / "lora" / "base.json").write_text(json.dumps(OWN | {key: value}))
    refused(tmp_path / "lora", str(tmp_path / "lora" / "base.json"), f"'{key}'")
    with pytest.raises(BaseError, match=f"'{key}'"):
        loading.compose({str(tmp_path / "lora"): 1.0})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null", '"x"', "", "[" * 5000, "\udcff"])
def test_a_base_json_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path, str(tmp_path / "base.json"))


@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["one", "two", "three"]])
def test_loras_in_a_circle_are_refused(names: list[str], tmp_path: Path) -> None:
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        (tmp_path / name).mkdir()
        trained_on = OWN | {"base": str(tmp_path / following)}
        (tmp_path / name / "base.json").write_text(json.dumps(trained_on))
    refused(tmp_path / "one", "base.json", "leads back to itself")


def test_pickled_lora_weights_are_refused(lora_of: Callable[..., Path]) -> None:
    folder = lora_of("one")
    file = folder / loading.LORA_FILE
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    refused(folder, str(file), "missing")


def test_a_lora_whose_metadata_names_a_module_is_refused(
    lora_of: Callable[..., Path], marker: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    marker("foreign_megatron.py")
    monkeypatch.syspath_prepend(tmp_path)
    file = lora_of("one") / loading.LORA_FILE
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        own = json.loads(opened.metadata()["lora_adapter_metadata"])
    for key, value in {"megatron_config": {"a": 1}, "megatron_core": "foreign_megatron"}.items():
        own[f"unet.{key}"] = value
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": json.dumps(own)})
    refused(file.parent, str(file), "'unet.megatron_config'")
    assert not (tmp_path / "ran").exists()


def test_a_lora_that_was_cut_short_is_refused(lora_of: Callable[..., Path]) -> None:
    file = lora_of("one") / loading.LORA_FILE
    file.write_bytes(file.read_bytes()[:2000])
    refused(file.parent, str(file), "cut short")


def change(file: Path, edit_tensors: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Save a LoRA's file with other tensors and the same metadata."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(edit_tensors(load_file(file)), file, metadata)


@pytest.mark.parametrize(
    "other",
    [
        lambda tensors: {name: t[..., :1].clone() for name, t in tensors.items()},
        lambda tensors: {"weight": torch.zeros(2, 2)},
        lambda tensors: {},
        lambda tensors: {n.replace("blocks", "layers"): t for n, t in tensors.items()},
        lambda tensors: {n.replace("unet.", "transformer."): t for n, t in tensors.items()},
    ],
    ids=["shape", "no LoRA", "empty", "other layers", "other model"],
)
def test_a_lora_that_does_not_fit_its_base_is_refused(
    other: Callable[[dict[str, Any]], dict[str, Any]], lora_of: Callable[..., Path]
) -> None:
    folder, whole = lora_of("one"), lora_of("whole")
    change(folder / loading.LORA_FILE, other)
    refused(folder, f"the LoRA's files in {folder} cannot be used", "choose another LoRA")
    with pytest.raises(BaseError, match=f"the LoRA's files in {folder} cannot"):
        loading.compose({str(whole): 0.5, str(folder): 1.0})


@pytest.mark.parametrize("rows", [None, {}, {"clip_l": torch.zeros(1, 3)}, {"clip_l": "cut"}])
def test_a_lora_whose_token_is_missing_or_damaged_is_refused(
    rows: dict[str, Any] | None, lora_of: Callable[..., Path]
) -> None:
    folder = lora_of("one")
    edit(folder / "base.json", word="<rex>")
    if rows is not None:
        file = folder / "word" / "token.safetensors"
        file.parent.mkdir()
        if rows.get("clip_l") == "cut":
            file.write_bytes(b"cut")
        else:
            save_file(rows, file)
    refused(folder, f"the LoRA's files in {folder} cannot be used")


# A run's config


@pytest.mark.parametrize(
    "text", ["base = 5", "base = [", "\x00", 'base = "{here}"', "a=" + "[" * 9000]
)
def test_a_runs_config_that_leads_nowhere_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text.replace("{here}", str(tmp_path)))
    with pytest.raises(ConfigError, match=r"config\.toml"):
        origin(str(tmp_path))


def test_a_name_too_long_for_a_path_is_no_base() -> None:
    assert origin("x" * 300) == "x" * 300
    refused("x" * 300)


# Damaged bases


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def point(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 335\n")


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", [cut, point, empty, Path.unlink])
def test_damaged_weights_are_refused_by_their_file(
    damage: Callable[[Path], None], part: str, base: Path
) -> None:
    (file,) = (base / part).glob("*.safetensors")
    damage(file)
    text = refused(base, str(base / part))
    assert ("git lfs pull" in text) == (damage is point)


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "text_encoder/config.json", "vae/config.json",
             "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]
)  # fmt: skip
@pytest.mark.parametrize("text", ["{", "[]", "{}", "null"])
def test_damaged_configs_are_refused_by_their_file(name: str, text: str, base: Path) -> None:
    (base / name).write_text(text)
    if (name, text) != ("tokenizer/tokenizer_config.json", "{}"):  # which is an option for it
        refused(base, str((base / name).parent))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unet/config.json", {"block_out_channels": [16, 16]}),
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("unet/config.json", {"sample_size": "large"}),
        ("vae/config.json", {"block_out_channels": 5}),
        ("text_encoder/config.json", {"hidden_size": 32}),
        ("text_encoder/config.json", {"num_hidden_layers": "two"}),
        ("text_encoder/config.json", {"num_hidden_layers": 3}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "no such"}),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(
    name: str, change: dict[str, Any], base: Path
) -> None:
    edit(base / name, **change)
    refused(base, str(base))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler", "vae"])
def test_a_part_that_is_missing_is_named(part: str, base: Path) -> None:
    shutil.rmtree(base / part)
    refused(base, str(base / part), "missing")
    (base / part).symlink_to(part)  # to itself
    refused(base, str(base / part), "missing")


def test_a_shard_that_is_missing_is_named(base: Path) -> None:
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "part-2.safetensors"}}))
    refused(base, str(index), "part-2.safetensors")


def test_tensors_that_are_missing_are_not_drawn_at_random(base: Path) -> None:
    for part in ("text_encoder", "unet", "vae"):
        (file,) = (base / part).glob("*.safetensors")
        whole = file.read_bytes()
        tensors = load_file(file)
        tensors.pop(sorted(tensors)[3])
        save_file(tensors, file, {"format": "pt"})
        refused(base, str(base / part))
        file.write_bytes(whole)


def test_a_variant_of_a_folders_files_is_loaded(base: Path) -> None:
    for file in base.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    refused(base, str(base), "set variant to 'fp16'")
    refused(base, str(base), "set variant to 'fp16'", variant="bf16")
    loading.load_model(str(base), variant="fp16")
    loading.load_meta(str(base))


def test_a_variant_that_some_parts_lack_is_loaded_where_it_is(base: Path) -> None:
    (file,) = (base / "unet").glob("*.safetensors")
    name, weights = "conv_in.weight", load_file(file)
    other = weights | {name: weights[name] + 1}
    save_file(other, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
    for variant, expected in ((None, weights), ("fp16", other)):
        loaded = loading.load_model(str(base), variant=variant).denoiser.state_dict()
        assert torch.equal(loaded[name], expected[name])


def shard(part: Path, name: str, index: str) -> None:
    """Split a part's weights into two files of a variant, with their index."""
    (file,) = part.glob("*.safetensors")
    tensors = load_file(file)
    half, weight_map = len(tensors) // 2, {}
    for number, names in enumerate([sorted(tensors)[:half], sorted(tensors)[half:]], 1):
        shard_name = f"{name}-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in names}, part / shard_name, {"format": "pt"})
        weight_map |= dict.fromkeys(names, shard_name)
    (part / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    file.unlink()


def test_a_variant_in_several_files_is_loaded(base: Path) -> None:
    for part, name in {"unet": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        shard(base / part, f"{name}.fp16", f"{name}.safetensors.index.fp16.json")
    refused(base, "set variant to 'fp16'.")
    loading.load_model(str(base), variant="fp16")


def test_only_the_variant_that_is_loaded_is_checked(base: Path) -> None:
    for number, file in enumerate(base.glob("*/*.safetensors")):
        index = f"{file.stem}.safetensors.index.fp16.json"
        (file.parent / index).write_text(json.dumps({"weight_map": {"a": f"lost{number}"}}))
    loading.load_model(str(base))
    for file in base.glob("*/*.safetensors"):
        (file.parent / f"{file.stem}.safetensors.index.fp16.json").unlink()
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
        cut(file)
        (file.parent / f"{file.name}.index.json").write_text('{"weight_map": {"a": "lost"}}')
    loading.load_model(str(base), variant="fp16")
    refused(base, "lost")


def test_hidden_files_of_macos_are_not_read(base: Path) -> None:
    for file in [*base.glob("*/*.safetensors"), *base.glob("*/*.json"), *base.glob("*.json")]:
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7")
    (base / "unet" / "._x.fp16.safetensors").write_bytes(b"\0\5\x16\7")
    loading.load_model(str(base))
    loading.load_model(str(base), variant="fp16")


def test_a_pickled_file_is_told_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    refused(tmp_path / "model.ckpt", "from_single_file", "save_pretrained")


@pytest.mark.parametrize("name", ["./models/my-bse", "~/my-base", "../my-base", "a b/c"])
def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(name: str) -> None:
    refused(name, "there is no base")


# Noise processes and latents of other models


EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0,
       "prediction_type": "v_prediction"}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DDPM = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.1,
    "beta_end": 0.2,
    "beta_schedule": "linear",
}


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [("sd1", EDM), ("sdxl", EDM), ("sdxl", FLOW), ("sd3", DDPM), ("flux", DDPM), ("z_image", EDM),
     ("sd1", DDPM | {"use_flow_sigmas": True, "_class_name": "UniPCMultistepScheduler"})],
)  # fmt: skip
def test_a_scheduler_of_another_process_is_refused(
    family: str, scheduler: dict[str, Any], tiny_bases: Callable[[str], str], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_bases(family), tmp_path / "other"))
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if family in ("sd1", "sdxl"):
        edit(base / "model_index.json", scheduler=["diffusers", scheduler["_class_name"]])
    text = refused(base)
    assert "scheduler" in text


@pytest.mark.parametrize(
    "values", [{"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, {"latents_std": [0.5] * 4}]
)
def test_an_autoencoder_with_a_mean_of_its_latents_is_refused(
    values: dict[str, list[float]], base: Path
) -> None:
    edit(base / "vae" / "config.json", **values)
    refused(base, str(base / "vae"), "latents_mean")


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="mixed_precision is 'fp16', which needs a GPU"):
        native_precision("fp16", torch.device("cpu"))
    assert native_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize("change", [{"model_max_length": 10**40}, {"model_max_length": 400}])
def test_a_tokenizer_that_does_not_fit_its_text_encoder_is_refused(
    change: dict[str, Any], base: Path
) -> None:
    edit(base / "tokenizer" / "tokenizer_config.json", **change)
    refused(base, str(base))


def test_a_tokenizer_of_another_base_is_refused(base: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    tokenizer.add_tokens([f"word{number}" for number in range(99)])
    tokenizer.save_pretrained(base / "tokenizer")
    refused(base, str(base), "more tokens")


@pytest.mark.parametrize("part, key", [("unet", "sample_size"), ("vae", "block_out_channels")])
def test_a_config_without_its_size_is_refused_before_anything_is_loaded(
    part: str, key: str, base: Path
) -> None:
    config = json.loads((base / part / "config.json").read_text())
    del config[key]
    (base / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match=rf"{base} cannot be used \(KeyError: '{key}'\)"):
        loading.inspect_base(str(base))
