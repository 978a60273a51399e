"""Damaged base folders, LoRA folders and caches of embeddings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from conftest import drawings, save_base, save_clip

from dreambooth_lib.families import loading
from dreambooth_lib.metrics.encoders import Encoder, embed_files
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import train
from hostile.bench import Kind, Wrong
from hostile.mutate import damage_folder
from hostile.run_folders import tiny_config

#: Runs if a folder's own code is run, which leaves a file that the case then finds.
EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('')\n"
#: Keys that would have a loader run code or read other files.
LOADER_KEYS = {
    "trust_remote_code": True, "custom_pipeline": ".", "use_safetensors": False,
    "auto_map": {"AutoConfig": "evil.Evil"}, "_name_or_path": "../evil",
}  # fmt: skip


def prepare_base(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_base(folder / "base", "epsilon", attention_head_dim=2)


def prepare_lora(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = tiny_config(folder, method="lora", lora_rank=2, steps=2, prior="none")
    list(train(runs.start(config, folder / "run")))
    shutil.copytree(folder / "run" / "pipeline", folder / "lora")


def _load(name: str, use: Callable[[str], None]) -> Callable[[Random, Path, Path], None]:
    """Return a case that damages a model's folder and uses it; none of its code may run."""

    def case(rng: Random, material: Path, folder: Path) -> None:
        model = folder / name
        shutil.copytree(material / name, model)
        if rng.random() < 0.2:
            add_loader_keys(model, rng)
        else:
            damage_folder(model, rng)
        try:
            use(str(model))
        finally:
            if [*folder.rglob("ran")]:
                raise Wrong("ran code from the folder")

    return case


def add_loader_keys(model: Path, rng: Random) -> None:
    """Add keys to one of the folder's JSON files, and modules that they could name."""
    file = rng.choice(sorted(model.rglob("*.json")))
    key = rng.choice(sorted(LOADER_KEYS))
    content = json.loads(file.read_text()) | {key: LOADER_KEYS[key]}
    if file.name == "model_index.json":
        part = rng.choice(("unet", "vae", "scheduler", "_class_name"))
        content[part] = rng.choice((["evil", "Evil"], ["os", "system"], "evil", ["evil"]))
    file.write_text(json.dumps(content))
    for place in (model, *(path for path in model.iterdir() if path.is_dir())):
        for module in ("evil", "pipeline", "modeling"):
            (place / f"{module}.py").write_text(EVIL)


def use_base(model: str) -> None:
    """Read a base's size and settings, load it and draw with it."""
    loading.inspect_base(model)
    loading.base_inference(model)
    family = loading.load_model(model)
    family.generate([("a dog", 0)], 1, 1.0)


def use_lora(model: str) -> None:
    loading.warn_of_distillation(model)
    loading.load_model(model).generate([("a dog", 0)], 1, 1.0)


def prepare_embeddings(folder: Path) -> None:
    save_clip(folder / "clip")
    paths = []
    for number, image in enumerate(drawings(3)):
        paths.append(folder / f"{number}.png")
        image.save(paths[-1])
    torch.save(embed_files(Encoder(folder / "clip"), paths, folder / "cache"), folder / "rows.pt")


def embeddings(rng: Random, material: Path, folder: Path) -> None:
    """Embed images with a damaged cache: the rows are the encoder's own."""
    shutil.copytree(material / "cache", folder / "cache")
    damage_folder(folder / "cache", rng)
    encoder = Encoder(material / "clip")
    rows = embed_files(encoder, [material / f"{n}.png" for n in range(3)], folder / "cache")
    # A row depends a little on the others in its batch.
    if not torch.allclose(rows, torch.load(material / "rows.pt"), atol=1e-5):
        raise Wrong("the rows are others")


def prepare_encoder(folder: Path) -> None:
    save_clip(folder / "clip")


def use_encoder(model: str) -> None:
    encoder = Encoder(model)
    encoder.embed_images(drawings(1))
    encoder.embed_texts(["a dog"])


KINDS = (
    Kind("bases", prepare_base, _load("base", use_base), 200),
    Kind("loras", prepare_lora, _load("lora", use_lora), 200),
    Kind("encoders", prepare_encoder, _load("clip", use_encoder), 200),
    Kind("embeddings", prepare_embeddings, embeddings, 200),
)
