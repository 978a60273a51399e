"""Tiny random bases on disk in diffusers' layout, small photos, and configs of a few steps."""

import os

# These are tests of the arithmetic on a CPU: float32, bit for bit. A GPU is hidden from them, from
# what they start and from the workers, before torch can look for one.
if not os.environ.get("DREAMBOOTH_TEST_ON_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores as they are
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bases as tiny_bases_of
import torch
from accelerate import PartialState
from fake_colab import fake_colab as fake_colab
from fake_hub import _served as _served
from fake_hub import fake_hub as fake_hub
from fake_hub import never_wait
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training import runs
from dreambooth_lib.training.runs import Run

WORDS = ("a", "dog", "cat", "ohwx", "on", "the", "beach", "in", "snow", "photo", "of", "red")
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 12  # tokens, start and end included
WIDTH = 16  # of the text encoder


def pytest_sessionstart() -> None:
    """Make the process's state while this machine is what it is.

    A test that pretends to have a GPU would make one that stays. Not at the import, which the
    workers of :mod:`hostile` share: some of them join a group.
    """
    PartialState()


_frozen: list[str] = []  # the newest test file


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave what earlier files made to itself: models are freed by collecting garbage.

    Each time takes a quarter of a second where half a million imported objects are looked at.
    """
    if item.location[0] not in _frozen:
        _frozen[:] = [item.location[0]]
        gc.collect()
        gc.freeze()


def save_tokenizer(folder: Path) -> None:
    """Save a real CLIPTokenizer with each of WORDS as one token, merged from its last letter."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in WORDS:
        ending = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            if letter + ending not in vocabulary:
                merges.append(f"{letter} {ending}")
                vocabulary.append(letter + ending)
            ending = letter + ending
    vocabulary += [START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_base(folder: Path, prediction_type: str, seed: int = 0, **unet: Any) -> str:
    """Write a random Stable Diffusion pipeline of 16 x 16 pictures; returns its path."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    save_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    tokenizer = CLIPTokenizer.from_pretrained(folder.with_name(f"{folder.name}-tokenizer"))
    torch.manual_seed(seed)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.7,
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            norm_num_groups=4,
            **unet,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return str(folder)


def save_photos(folder: Path, count: int = 4) -> str:
    """Distinct pictures of a coloured shape each; returns the folder's path."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        ground, colour = (tuple(int(v) for v in rng.integers(256, size=3)) for _ in range(2))
        image = Image.new("RGB", (24, 20), ground)
        left, top = (int(v) for v in rng.integers(1, 8, size=2))
        draw = ImageDraw.Draw(image)
        (draw.ellipse if number % 2 else draw.rectangle)((left, top, left + 9, top + 9), colour)
        image.save(folder / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def _no_waits_for_the_hub() -> None:
    never_wait()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a shell's foreground: what starts in the background or under nohup ignores signals."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base that predicts epsilon, as Stable Diffusion 1 does."""
    return save_base(tmp_path_factory.mktemp("bases") / "sd1", "epsilon", attention_head_dim=2)


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base that predicts v with linear projections and heads by level, as version 2 does."""
    heads = {"attention_head_dim": [2, 4], "use_linear_projection": True}
    return save_base(tmp_path_factory.mktemp("bases") / "sd2", "v_prediction", seed=1, **heads)


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory, tiny_sd1: str, tiny_sd2: str) -> Any:
    """The path of a tiny base by family, written when it is first asked for."""
    from transformers import CLIPTokenizer

    folder, made = tmp_path_factory.mktemp("families"), {"sd1": tiny_sd1, "sd2": tiny_sd2}

    def base(name: str) -> str:
        if name not in made:
            save_tokenizer(folder / f"{name}-tokenizer")
            clip = CLIPTokenizer.from_pretrained(folder / f"{name}-tokenizer")
            getattr(tiny_bases_of, f"save_{name}")(folder / name, clip, WORDS)
            made[name] = str(folder / name)
        return made[name]

    return base


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_photos(tmp_path_factory.mktemp("photos") / "rex")


@pytest.fixture(scope="session")
def make_config() -> Callable[..., TrainConfig]:
    def make(base: str, photos: str, **changes: Any) -> TrainConfig:
        fields: dict[str, Any] = {
            "subject": Subject(photos, "dog"),
            "steps": 4,
            "batch_size": 2,
            "class_images": 4,
            "prior_inference_steps": 2,
            "validation_inference_steps": 2,
            "learning_rate": 1e-3,
            "validate_every": 0,
        }
        return TrainConfig(base=base, **(fields | changes))

    return make


@pytest.fixture
def start_run(
    tmp_path: Path,
    photos: str,
    make_config: Callable[..., TrainConfig],
    tiny_bases: Callable[[str], str],
) -> Callable[..., Run]:
    """Return a function that starts a two-step run of a name on a family's tiny base."""

    def start(name: str, family: str, **changes: Any) -> Run:
        fields = {"steps": 2, "resolution": 16, "lora_rank": 2, "checkpoint_every": 1}
        config = make_config(tiny_bases(family), photos, **(fields | changes))
        return runs.start(config, tmp_path / name)

    return start


# What scores pictures: tiny random encoders, and pictures of several shapes for them.

_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 2}  # fmt: skip


def drawings(count: int, seed: int = 0) -> list[Image.Image]:
    """Random pictures of several shapes, smooth enough for a resize to mean something."""
    generator = np.random.default_rng(seed)
    shapes = [(40, 56), (64, 64), (90, 33)]
    coarse = [generator.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(c).resize(shapes[i % 3]) for i, c in enumerate(coarse)]


def save_clip(folder: Path) -> Path:
    """Write a tiny random CLIP with its tokenizer and preprocessing; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), "do", "dog</w>"]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    text = _TOWER | {
        "vocab_size": len(symbols), "max_position_embeddings": 12, "pad_token_id": len(symbols) - 1,
        "bos_token_id": len(symbols) - 2, "eos_token_id": len(symbols) - 1,
    }  # fmt: skip
    vision = _TOWER | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    CLIPModel(config).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": 32}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.25],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    ViTModel(ViTConfig(**_TOWER, image_size=28, patch_size=7)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> Encoder:
    return Encoder(clip_folder)


@pytest.fixture(scope="session")
def dino(dino_folder: Path) -> Encoder:
    return Encoder(dino_folder)
