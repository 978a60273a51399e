"""Class images: a folder for each base, prompt and sampler; drawn once, topped up, never mixed."""

import hashlib
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_photos
from PIL import Image
from safetensors.torch import load_file, save_file

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.training import class_images, runs
from dreambooth_lib.training.class_images import class_images_folder, draw_class_images
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def family(tiny_sd1: str) -> Family:
    return loading.load_model(tiny_sd1)


@pytest.fixture
def config(tiny_sd1: str, photos: str, make_config: Make) -> TrainConfig:
    return make_config(tiny_sd1, photos, class_images=5)


def draw(config: TrainConfig, family: Family, folder: Path) -> dict[str, str]:
    """Draw a set and return its images by name, as digests of their bytes."""
    paths = list(draw_class_images(config, family, folder))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def record_drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record the prompt and seed of each image drawn from now on."""
    drawn: list[tuple[str, int]] = []
    generate = Family.generate

    def recording(family: Family, prompts: list[tuple[str, int]], *given: Any, **how: Any) -> Any:
        drawn.extend(prompts)
        return generate(family, prompts, *given, **how)

    monkeypatch.setattr(Family, "generate", recording)
    return drawn


def test_as_many_distinct_images_as_asked_for_are_drawn_of_the_class(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = record_drawn(monkeypatch)
    images = draw(config, family, tmp_path)
    assert len(set(images.values())) == 5
    assert [prompt for prompt, _ in drawn] == ["a dog"] * 5
    photos = read_photos(class_images_folder(config, family, tmp_path))
    assert [photo.image.size for photo in photos] == [(16, 16)] * 5


def test_a_complete_set_is_not_drawn_again(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw(config, family, tmp_path)
    drawn = record_drawn(monkeypatch)
    assert draw(config, family, tmp_path) == first
    assert drawn == []


def test_settings_that_change_no_class_image_share_the_set(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw(config, family, tmp_path)
    drawn = record_drawn(monkeypatch)
    changed = config.replace(
        steps=9,
        learning_rate=1.0,
        prior_weight=0.5,
        subject=Subject("elsewhere", "dog", identifier="sks"),
    )
    assert draw(changed, family, tmp_path) == first
    assert drawn == []


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": Subject("photos", "cat")},
        {"prior_inference_steps": 3},
        {"prior_guidance_scale": 2.0},
        {"seed": 1},
    ],
    ids=["prompt", "steps", "guidance", "seed"],
)
def test_each_setting_that_changes_the_images_gets_a_set_of_its_own(
    changes: dict[str, Any], config: TrainConfig, family: Family, tmp_path: Path
) -> None:
    config = config.replace(class_images=2)
    first = draw(config, family, tmp_path)
    other = draw(config.replace(**changes), family, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert first.values() != other.values()
    assert list(first.values()) != list(other.values())
    assert draw(config, family, tmp_path) == first


def test_other_weights_in_the_same_folder_get_a_set_of_their_own(
    tiny_sd1: str, photos: str, make_config: Make, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_sd1, base)
    config = make_config(str(base), photos, class_images=2)
    first = draw(config, loading.load_model(str(base)), tmp_path / "sets")
    (file,) = (base / "unet").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + 1
    save_file(tensors, file, {"format": "pt"})
    other = draw(config, loading.load_model(str(base)), tmp_path / "sets")
    assert len(list((tmp_path / "sets").iterdir())) == 2
    assert list(first.values()) != list(other.values())


def test_another_sampler_gets_a_set_of_its_own(
    config: TrainConfig, tiny_sd1: str, tmp_path: Path
) -> None:
    from diffusers import EulerDiscreteScheduler

    family = loading.load_model(tiny_sd1)
    ddim = class_images_folder(config, family, tmp_path)
    scheduler = EulerDiscreteScheduler.from_config(family.pipeline.scheduler.config)
    family.pipeline.scheduler = scheduler
    assert class_images_folder(config, family, tmp_path) != ddim


def test_only_deleted_images_are_drawn_again_and_identical_to_the_byte(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw(config, family, tmp_path)
    folder = class_images_folder(config, family, tmp_path)
    for number in (1, 3):
        (folder / f"{number:05d}.png").unlink()
    drawn = record_drawn(monkeypatch)
    assert draw(config, family, tmp_path) == first
    assert [seed for _, seed in drawn] == [1, 3]


def test_a_larger_count_adds_images_and_a_smaller_one_uses_fewer(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw(config.replace(class_images=3), family, tmp_path)
    drawn = record_drawn(monkeypatch)
    more = draw(config, family, tmp_path)
    assert [seed for _, seed in drawn] == [3, 4]
    assert {name: more[name] for name in first} == first
    assert list(draw(config.replace(class_images=2), family, tmp_path)) == list(first)[:2]
    assert [seed for _, seed in drawn] == [3, 4]


def test_images_do_not_depend_on_the_rest_of_their_batch(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pixels(folder: Path) -> np.ndarray:
        draw(config, family, folder)
        photos = read_photos(class_images_folder(config, family, folder))
        return np.stack([np.asarray(photo.image).astype(int) for photo in photos])

    together = pixels(tmp_path / "together")
    monkeypatch.setattr(Family, "default_batch_size", 2)
    apart = pixels(tmp_path / "apart")
    assert np.abs(together - apart).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


def test_two_processes_draw_disjoint_parts_of_the_same_set(
    config: TrainConfig, family: Family, tmp_path: Path
) -> None:
    parts = [
        [path.name for path in draw_class_images(config, family, tmp_path / "two", rank, 2)]
        for rank in (0, 1)
    ]
    assert sorted(parts[0] + parts[1]) == [f"{n:05d}.png" for n in range(5)]
    complete = draw(config, family, tmp_path / "one")
    assert [p.name for p in (tmp_path / "two").iterdir()] == [
        p.name for p in (tmp_path / "one").iterdir()
    ]
    folder = class_images_folder(config, family, tmp_path / "two")
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.png")} == (
        complete
    )


def test_a_generator_closed_early_leaves_only_whole_images_and_is_continued_later(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Family, "default_batch_size", 2)
    config = config.replace(class_images=9)
    drawing = draw_class_images(config, family, tmp_path)
    for _ in range(3):
        next(drawing)
    drawing.close()
    folder = class_images_folder(config, family, tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    whole = [f"{number:05d}.png" for number in range(6)]  # the third batch was drawn by then
    assert names == [*whole, "digests.jsonl", "manifest.json"]
    assert len(read_photos(folder)) == 6
    drawn = record_drawn(monkeypatch)
    assert len(draw(config, family, tmp_path)) == 9
    assert [seed for _, seed in drawn] == [6, 7, 8]


def test_an_interrupt_waits_for_what_is_being_written(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Family, "default_batch_size", 2)
    interrupted, generate, save = threading.Event(), Family.generate, class_images.save_png

    def interrupting(family: Family, prompts: list[tuple[str, int]], *a: Any, **how: Any) -> Any:
        if prompts[0][1] == 2:
            interrupted.set()
            raise KeyboardInterrupt
        return generate(family, prompts, *a, **how)

    def slow(image: Image.Image, path: Path) -> None:
        assert interrupted.wait(30)
        save(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(Family, "generate", interrupting)
        patch.setattr(class_images, "save_png", slow)
        with pytest.raises(KeyboardInterrupt):
            draw(config, family, tmp_path)
    folder = class_images_folder(config, family, tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00000.png", "00001.png", "digests.jsonl", "manifest.json"]
    assert len((folder / "digests.jsonl").read_text().splitlines()) == 2
    drawn = record_drawn(monkeypatch)
    assert len(draw(config, family, tmp_path)) == 5
    assert [seed for _, seed in drawn] == [2, 3, 4]


def test_images_are_written_beside_the_drawing_and_one_batch_at_most_waits(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Family, "default_batch_size", 2)
    waiting: list[int] = []  # images that wait as each batch is begun
    threads: set[int] = set()
    drawn, written, generate, save = 0, 0, Family.generate, class_images.save_png

    def counting(family: Family, prompts: list[tuple[str, int]], *a: Any, **how: Any) -> Any:
        nonlocal drawn
        waiting.append(drawn - written)
        images = generate(family, prompts, *a, **how)
        drawn += len(images)
        return images

    def saving(image: Image.Image, path: Path) -> None:
        nonlocal written
        threads.add(threading.get_ident())
        save(image, path)
        written += 1

    monkeypatch.setattr(Family, "generate", counting)
    monkeypatch.setattr(class_images, "save_png", saving)
    paths = list(draw_class_images(config.replace(class_images=9), family, tmp_path))
    assert [path.name for path in paths] == [f"{number:05d}.png" for number in range(9)]
    assert len(waiting) == 5 and max(waiting) <= 2
    assert threading.get_ident() not in threads


def test_a_failed_write_leaves_no_partial_image(
    config: TrainConfig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def failing(path: Path, data: bytes) -> int:
        if "00002" in path.name:
            write(path, data[: len(data) // 2])
            raise OSError("no space left")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing)
        with pytest.raises(OSError, match="no space"):
            draw(config, family, tmp_path)
    photos = read_photos(class_images_folder(config, family, tmp_path))
    assert [photo.name for photo in photos] == ["00000.png", "00001.png"]
    assert len(draw(config, family, tmp_path)) == 5


def test_drawing_class_images_leaves_the_global_generator_alone(
    config: TrainConfig, family: Family, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(config, family, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_users_own_class_images_are_used_and_none_are_drawn(
    tiny_sd1: str,
    photos: str,
    make_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = []
    drawn = record_drawn(monkeypatch)
    for name, colour in (("one", "red"), ("two", "navy")):
        own = tmp_path / name
        own.mkdir()
        Image.new("RGB", (32, 32), colour).save(own / "class.png")
        config = make_config(tiny_sd1, photos, steps=1, class_folder=str(own))
        (step,) = train(runs.start(config, tmp_path / f"run-{name}"))
        losses.append((step.instance_loss, step.prior_loss))
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]
    assert drawn == [] and not (tmp_path / "class_images").exists()


# The fast sampler.


def count_rows(module: torch.nn.Module) -> list[int]:
    """Record how many rows each call of a module has from now on."""
    calls: list[int] = []
    module.register_forward_hook(lambda *given: calls.append(len(given[2][0])))
    return calls


def test_by_default_a_few_steps_of_the_fast_sampler_draw_and_the_prompt_is_encoded_once(
    config: TrainConfig, tiny_sd1: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Family, "default_batch_size", 2)
    family, config = loading.load_model(tiny_sd1), config.replace(
        prior_inference_steps=None, prior_guidance_scale=None
    )  # fmt: skip
    evaluations, encoded = count_rows(family.denoiser), count_rows(family.text_encoders[0])
    draw(config, family, tmp_path)
    fast = family.inference.fast_steps
    assert fast is not None and 3 * fast <= family.inference.steps
    assert evaluations == [4] * fast + [4] * fast + [2] * fast, "images twice, for guidance"
    assert encoded == [2], "the class prompt and the empty one"
    made = json.loads((class_images_folder(config, family, tmp_path) / "manifest.json").read_text())
    assert (made["sampler"], made["inference_steps"]) == ("DPMSolverMultistepScheduler", fast)
    assert type(family.pipeline.scheduler).__name__ == "DDIMScheduler"


def test_steps_that_the_config_gives_are_those_of_the_bases_own_sampler(
    config: TrainConfig, tiny_sd1: str, tmp_path: Path
) -> None:
    family = loading.load_model(tiny_sd1)
    evaluations = count_rows(family.denoiser)
    draw(config.replace(prior_inference_steps=3, prior_guidance_scale=1.0), family, tmp_path)
    assert evaluations == [5] * 3, "one batch, without guidance"
    made = json.loads(next(tmp_path.glob("*/manifest.json")).read_text())
    assert (made["sampler"], made["inference_steps"]) == ("DDIMScheduler", 3)


def test_the_fast_samplers_images_do_not_depend_on_the_rest_of_their_batch(
    family: Family,
) -> None:
    def drawn(batch: int) -> np.ndarray:
        pairs = [("a dog", seed) for seed in range(4)]
        parts = [pairs[start : start + batch] for start in range(0, 4, batch)]
        images = [one for part in parts for one in family.generate(part, 5, 3.0, fast=True)]
        return np.stack([np.asarray(image).astype(int) for image in images])

    together = drawn(4)
    for batch in (1, 3):
        assert np.abs(together - drawn(batch)).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


def test_own_class_images_whose_captions_name_the_subject_are_told(
    start_run: Callable[..., Run], tmp_path: Path
) -> None:
    place = Path(save_photos(tmp_path / "own"))
    texts = ["a {} dog", "a dog", "the OHWX dog", "an ohwxian dog"]
    for number, text in enumerate(texts):
        (place / f"{number}.txt").write_text(text)
    run = start_run("run", "sd1", class_folder=str(place))
    with pytest.warns(UserWarning, match=r"2 captions .* such as that of 0.png, name the subject"):
        Trainer(run)
    (place / "0.txt").write_text("a dog, " + "dog " * 100)
    with pytest.warns(UserWarning, match=r"the caption of the class image 0\.png is too long"):
        Trainer(start_run("long", "sd1", class_folder=str(place)))
    for number in (0, 2):
        (place / f"{number}.txt").write_text("a dog")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*name the subject")
        Trainer(start_run("other", "sd1", class_folder=str(place)))
