"""Test that a failing disk is named in a sentence, and harms nothing that was there."""

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import train
from hostile.faults import clean, fail_at, kinds_of, quietly
from hostile.methods import result
from hostile.run_folders import tiny_config
from hostile.stages import STAGES, prepare


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "material"
    with quietly():
        prepare(folder)
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_is_named_and_harms_nothing(name: str, material: Path, tmp_path: Path) -> None:
    moments, expected = clean(name, material, tmp_path / "disk")
    at = Random(name).choice(sorted(kinds_of(moments).values()))
    problem = fail_at(name, material, tmp_path / "disk", at, errno.ENOSPC, expected)
    assert problem == "", moments[at - 1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of little room, for what is written by code in Rust."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here ({error})")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_run_on_a_full_disk_goes_on_once_there_is_room(
    small_disk: Path, material: Path, tmp_path: Path
) -> None:
    config = tiny_config(material)
    list(train(runs.start(config, tmp_path / "room" / "run")))
    run = runs.start(config, small_disk / "run")
    with pytest.raises(DiskError, match=f"{small_disk}.*free some space"):
        list(train(run))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    list(train(runs.resume(run.folder)))
    assert result(small_disk) == result(tmp_path / "room")
