"""Damaged configs and tables of a data set."""

from pathlib import Path
from random import Random

from conftest import save_photos

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation.dreambench import load_benchmark
from dreambooth_lib.notebook import drive_restore
from dreambooth_lib.training import runs
from hostile.bench import Kind, Wrong
from hostile.mutate import damage_bytes, damage_toml

CONFIGS: tuple[dict[str, object], ...] = (
    {},
    {"method": "lora", "lora_rank": 2, "train_text_encoder": True, "ema_decay": 0.9},
    {"base": "a/b", "revision": "main", "resolution": 64, "prior": "none", "validate_every": 0},
    {"early_stop": True, "prior": "distilled", "memory": "low", "lr_schedule": "cosine"},
)


def prepare_configs(folder: Path) -> None:
    folder.mkdir(parents=True)
    photos = save_photos(folder / "photos")
    for number, settings in enumerate(CONFIGS):
        config = TrainConfig(Subject(photos, "dog"), **settings)
        (folder / f"{number}.toml").write_text(config.to_toml())


def config(rng: Random, material: Path, folder: Path) -> None:
    """Look for interrupted runs, which never raises, and open the damaged one."""
    run = folder / "run"
    run.mkdir()
    source = rng.choice(sorted(material.glob("*.toml")))
    (run / "config.toml").write_bytes(damage_toml(source.read_bytes(), rng))
    try:
        drive_restore.find_interrupted(True, [folder], material / "photos", "dog", "toybox")
    except Exception as error:
        raise Wrong(f"find_interrupted raised {type(error).__name__}: {error}") from error
    read = TrainConfig.from_toml(run / "config.toml")
    (folder / "again.toml").write_text(read.to_toml())
    if TrainConfig.from_toml(folder / "again.toml") != read:
        raise Wrong("written and read again, the config is another")
    runs.resume(run).checkpoints()


TABLE = """Classes

subject_name,class
dog,dog
teapot,teapot

Object Prompts
prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
]

Live Subject Prompts
prompt_list = [
'a {0} {1} wearing a hat'.format(unique_token, class_token),
]
"""


def prepare_table(folder: Path) -> None:
    for name in ("dog", "teapot"):
        save_photos(folder / name, 1)
    (folder / "prompts_and_classes.txt").write_text(TABLE)


def table(rng: Random, material: Path, folder: Path) -> None:
    """Read a data set with a damaged table: its subjects are folders in it."""
    for name in ("dog", "teapot"):
        (folder / name).mkdir()
    text = (material / "prompts_and_classes.txt").read_bytes()
    if rng.random() < 0.5:
        text = damage_bytes(text, rng)
    else:
        row = rng.choice(
            (b"../../x,dog", b"\x1b[31m,dog", b"dog,cat\x00", b",", b"dog,dog", b"\xff,a")
        )
        text = text.replace(b"dog,dog", b"dog,dog\n" + row)
    (folder / "prompts_and_classes.txt").write_bytes(text)
    benchmark = load_benchmark(folder)
    for subject in benchmark.subjects:
        if Path(subject.photos).resolve().parent != folder.resolve():
            raise Wrong(f"the subject {subject.name!r} is outside the folder")
        benchmark.prompts_for(subject)


KINDS = (
    Kind("configs", prepare_configs, config, 2_000),
    Kind("tables", prepare_table, table, 1_000),
)
