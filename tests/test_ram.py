"""Check how the RAM of a run is measured, and that it stays low."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import ram
from tools.ram import GB, TooMuch, watch

MB = 10**6


def validation(code: str, tmp_path: Path, limit: float = 4 * GB) -> dict[str, int]:
    """Return the bytes that a piece of code, which measures "it", held before and at most."""
    command = [sys.executable, "-c", code, str(tmp_path)]
    return watch(command, limit, tmp_path / "log")["it"]


def test_a_checkpoint_is_written_without_a_copy_of_what_it_holds(tmp_path: Path) -> None:
    found = validation(
        """
import sys, torch
from dreambooth_lib.training.checkpoints import save_state
from tools.ram import measured
state = {"model": {str(i): torch.rand(10_000_000) for i in range(10)}}
with measured("it"):
    save_state(sys.argv[1] + "/state", state)
""",
        tmp_path,
    )
    assert found["before"] > 400 * MB
    assert found["peak"] - found["before"] < 100 * MB


def test_what_a_process_holds_for_a_moment_is_seen_and_mapped_files_are_not(
    tmp_path: Path,
) -> None:
    found = validation(
        """
import mmap, sys, time
from tools.ram import measured
with open(sys.argv[1] + "/large", "wb") as file:
    file.truncate(300_000_000)
with measured("it"):
    with open(sys.argv[1] + "/large", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert sum(mapped[::4096]) == 0
    held = b"1" * 100_000_000
    time.sleep(0.1)
    del held
""",
        tmp_path,
    )
    assert 95 * MB < found["peak"] - found["before"] < 150 * MB


def test_more_than_the_limit_ends_the_process_in_a_sentence(tmp_path: Path) -> None:
    code = """
import time
from tools.ram import measured
held = b"1" * 100_000_000  # before it is measured: not counted against the limit
del held
with measured("it"):
    held = b"1" * 100_000_000
    time.sleep(60)
"""
    with pytest.raises(TooMuch, match=r"'it' holds 0\.1 GB of memory, and may hold 0\.1; its"):
        validation(code, tmp_path, 90 * MB)


def test_a_process_that_fails_leaves_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        validation("raise ImportError('no such thing')", tmp_path)


def test_what_lies_on_the_device_is_no_memory_and_a_copy_of_it_is(tmp_path: Path) -> None:
    found = validation(
        """
import sys, time, torch
from pathlib import Path
from tools.ram import measured
from tools.ram_jobs import Device
model = torch.nn.Linear(5_000, 10_000, bias=False)  # 200 MB
device = Device(Path(sys.argv[1]))
device.hold(model)
with measured("it"), device:
    assert model.weight.sum() == 0
    copy = model.weight.detach().cpu()
    time.sleep(0.05)
    del copy
    copy = model.weight.detach().to("cpu", torch.float32)
    time.sleep(0.05)
    same = model.weight.detach().to(torch.float32)  # moves nothing
    assert same.data_ptr() == model.weight.data_ptr() != copy.data_ptr()
""",
        tmp_path,
    )
    assert found["before"] < 600 * MB
    assert 190 * MB < found["peak"] - found["before"] < 260 * MB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_all_jobs_make_a_table(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-m", "tools.ram", "--tiny", "--work", str(tmp_path)]
    subprocess.run([*command, "--only", name], check=True)
    found = json.loads((tmp_path / "table.json").read_text())[name]
    assert list(found) == list(ram.ROWS) and not any("error" in of for of in found.values())
    assert all(0 < of["peak"] < GB for of in found.values())
    assert found["checkpoint"]["bytes"] < found["checkpoint"]["runs"]
    assert 0 < found["export"]["bytes"] < found["keep"]["bytes"]
    assert "none" not in (tmp_path / "table.md").read_text()
    assert not (tmp_path / name).exists()  # it is large


def test_a_job_that_takes_too_much_is_told_and_the_table_has_the_others() -> None:
    peaks = {row: {"peak": GB, "bytes": GB, "runs": GB} for row in ram.ROWS}
    table = ram.markdown({"sd15": peaks | {"keep": {"error": "'keep' holds 11.0 GB"}}})
    assert "| load the base to train it | 1.00 |" in table
    assert "| save a checkpoint as a model with its zip | none |" in table
    assert "- SD 1.5, full model, save a checkpoint as a model with its zip: 'keep' holds" in table


def test_files_of_zeros_are_read_as_weights_and_take_no_room(tmp_path: Path) -> None:
    from dreambooth_lib.families import loading
    from tools import architectures

    architectures.save(architectures.ALL["sd15"], tmp_path / "base", tiny=True, zeros=True)
    family = loading.load_model(str(tmp_path / "base"))
    assert all(torch.count_nonzero(one) == 0 for one in family.denoiser.parameters())
    architectures._write_zeros({"w": torch.Size([10**7])}, torch.float32, tmp_path / "w")
    stat = (tmp_path / "w").stat()
    assert stat.st_size > 40 * MB > 512 * stat.st_blocks
