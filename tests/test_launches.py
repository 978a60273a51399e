"""Counting launches, waits and bytes without a GPU: on single operations, then on a step."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools import launches
from tools.bench_gpu import save_photos
from tools.launch_counter import CHUNK, DEVICE, MAX_BLOCKS, counting, multi_tensor_launches
from tools.launches import LINES


@pytest.mark.parametrize(
    ("sizes", "lists", "expected"),
    [
        ([], 1, 0),
        ([0, 0], 1, 0),
        ([1], 1, 1),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 111 + [0] * 9, 1, 2),
        ([1] * 37, 4, 2),
        ([CHUNK * MAX_BLOCKS], 1, 1),
        ([CHUNK * MAX_BLOCKS + 1], 1, 2),
        # The first launch ends within the last tensor, which goes on in the second.
        ([1, CHUNK * MAX_BLOCKS], 1, 2),
        ([CHUNK * MAX_BLOCKS, *[1] * 110], 1, 2),
        ([CHUNK * MAX_BLOCKS + 1, *[1] * 109], 1, 2),
        ([CHUNK * MAX_BLOCKS + 1, *[1] * 110], 1, 3),
    ],
)
def test_launches_over_many_tensors_follow_the_limits(
    sizes: list[int], lists: int, expected: int
) -> None:
    assert multi_tensor_launches(sizes, lists) == expected


def test_scalars_of_each_tensor_leave_room_for_fewer() -> None:
    assert multi_tensor_launches([1] * 97, 1, with_scalars=True) == 2


def test_operations_are_counted_with_their_bytes() -> None:
    with counting() as counter:
        x = torch.empty(1000, device=DEVICE)
        counter.counts.clear()
        y = x.view(10, 100).t()  # no work
        y = y * 2  # reads and writes
        x.add_(1.0)  # reads and writes
        x.zero_()  # writes
        torch._foreach_add_([x] * 65, [x] * 65)  # two lists of 65
        z = torch.randn(3)  # the host's
        z += 1
    (counts,) = counter.counts.values()
    assert counts.operations == {"mul": 1, "add_": 1, "zero_": 1, "_foreach_add_": 2}
    assert counts.launches == 5 and not counts.waits
    assert counts.bytes == 4000 * (2 + 2 + 1 + 3 * 65)


def waits(code: str) -> list[str]:
    """Return what waits in a piece of code with x [4] on the GPU and z [4] on the host."""
    with counting() as counter:
        x, z = torch.empty(4, device=DEVICE), torch.empty(4)
        made = torch.Generator().manual_seed(0)
        counter.counts.clear()
        exec(code, {"torch": torch, "x": x, "z": z, "DEVICE": DEVICE, "made": made})
    return [why for one in counter.counts.values() for why, _ in one.waits.elements()]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x.sum().item()", ["a number read"]),
        ("float(x.sum())", ["a number read"]),
        ("bool(x.isfinite().all())", ["a number read"]),
        ("x.tolist()", ["numbers read"]),
        ("z.tolist(), z.sum().item()", []),
        ("x.cpu()", ["a copy from the GPU"]),
        ("x.to('cpu', non_blocking=True)", ["a copy from the GPU"]),
        ("z.to(DEVICE)", ["a copy to the GPU"]),
        ("z.to(DEVICE, non_blocking=True)", []),
        ("x.to(DEVICE), x.half()", []),
        ("x[[0, 1]]", ["a copy to the GPU"]),
        ("x[x > 0]", ["a mask's size"]),
        ("x[torch.arange(4, device=DEVICE) >= 2] + x[:2]", ["a mask's size"]),
        ("x[torch.arange(2, device=DEVICE)]", []),
        ("x.nonzero() if False else x.where(x > 0, 0)", []),
        ("torch.randn(4, generator=made)", []),
    ],
)
def test_waits_of_the_host_are_seen(code: str, expected: list[str]) -> None:
    assert waits(code) == expected


def test_tensors_of_both_sides_do_not_mix() -> None:
    with pytest.raises(Exception, match="same device"):
        waits("x + z")


def test_bitsandbytes_kernels_are_counted() -> None:
    with counting() as counter:
        from bitsandbytes.optim import AdamW8bit

        small, large = (torch.nn.Parameter(torch.empty(n, device=DEVICE)) for n in (100, 8192))
        adam = AdamW8bit([small, large])
        small.grad, large.grad = torch.empty_like(small), torch.empty_like(large)
        adam.step()
        counter.counts.clear()
        adam.step()
    (counts,) = counter.counts.values()
    assert counts.operations["optimizer_update_32bit"] == 1
    assert counts.operations["optimizer_update_8bit_blockwise"] == 1


@pytest.mark.parametrize("name", ["standard", "low", "lora-low"])
def test_a_step_is_counted_by_phase(name: str) -> None:
    found = launches.count(LINES[name].settings, tiny=True).counts
    for phase in ("batch", "forward", "backward", "optimizer step"):
        assert found[phase].launches > 0 and found[phase].bytes > 0
    assert found["backward"].launches > found["forward"].launches > found["batch"].launches
    lines = {where for one in found.values() for _, where in one.waits}
    assert "elsewhere" not in lines  # each wait is told with the library's line
    waits = [where for of in found.values() for _, where in of.waits.elements()]
    assert len(waits) == 1 and waits[0].endswith("read")  # of the losses


MASKED = {"background_weight": 0.1, "background_prior": True}
TOGETHER = {
    "LoRA": MASKED | {
        "method": "lora", "prior": "distilled", "prior_prompts": ("a cat", ""),
        "anchor_weight": 0.1, "class_folder": None, "lora_min_rank": 2,
        "train_text_encoder": True, "crop": "buckets",
        "resolution": 32, "batch_size": 2, "gradient_accumulation": 2,
    },
    "all weights": MASKED | {
        "prior": "distilled_images", "crop": "subject", "timestep_bias": 0.5, "prompt_chunks": 2,
        "ema_decay": 0.9, "anchor_weight": 0.1, "min_snr_gamma": 5.0, "prompt_dropout": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_what_a_step_may_use_lies_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor left behind on the host would end the step, as it would with a GPU."""

    def with_masks(work: Path, side: int) -> None:
        save_photos(work, side)
        for photo in (work / "instance").iterdir():
            mask = Image.new("L", (side, side))
            mask.paste(255, (side // 4, side // 4, side // 2, side // 2))
            mask.save(photo.with_name(f"{photo.stem}-masklabel.png"))

    monkeypatch.setattr(launches, "save_photos", with_masks)
    found = launches.count({"memory": "standard"} | TOGETHER[name], tiny=True).counts
    assert found["forward"].launches > 0


def test_the_command_makes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    launches.main(["--tiny", "--only", "standard", "--precision", "bf16"])
    table = capsys.readouterr().out
    assert "| SD 1.5, U-Net, standard | optimizer step | " in table
    assert "- waits of the host: " in table and "- launches of the optimizer: " in table
    found = json.loads((tmp_path / "outputs" / "launches.json").read_text())["standard"]
    assert found["forward"]["launches"] > 0
