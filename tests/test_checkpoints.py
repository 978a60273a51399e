"""Test saved states: they load unchanged, and no failure or kill ever loses the older one."""

import io
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dreambooth_lib.core.files import replace_file, replacing_folder
from dreambooth_lib.training import checkpoints
from dreambooth_lib.training.checkpoints import (
    drop_optimizer,
    load_state,
    round_weights,
    save_state,
    write_tensors,
)


def assert_equal(a: Any, b: Any) -> None:
    """Assert equal values of equal types; for tensors equal dtypes, shapes and bits."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_equal(*pair)
    else:
        assert a == b


NESTED: dict[str, Any] = {
    "numbers": {"int": 3, "big": 2**60, "float": 0.1 + 0.2, "tiny": 5e-324, "inf": math.inf},
    "plain": {"none": None, "yes": True, "no": False, "text": 'é "quoted"\n'},
    "optimizer": {
        "state": {0: {"step": torch.tensor(4.0)}, 12: {"step": torch.tensor(5.0)}},
        "param_groups": [{"betas": (0.9, 0.999), "params": [0, 12], "amsgrad": False}],
    },
    "nested tuples": ((1, (2.5, None)), [("a", torch.arange(3))]),
    "empty": {"dict": {}, "list": [], "tuple": (), "tensor": torch.zeros(0, 3), "text": ""},
    "dtypes": [
        torch.linspace(-3, 3, 7).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ]
    + [torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([True, False]), torch.tensor(7)],
}


def test_a_nested_state_loads_unchanged(tmp_path: Path) -> None:
    save_state(tmp_path / "s", NESTED)
    assert_equal(load_state(tmp_path / "s"), NESTED)


def test_an_empty_state_loads_unchanged(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {})
    assert load_state(tmp_path / "s") == {}


def test_transposed_sliced_and_shared_tensors_load_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "transposed": base.t(),
        "slice": base[:, 1:3],
        "expanded": torch.ones(1).expand(5),
        "base": base,
        "same": base,
        "parameter": torch.nn.Parameter(base.clone()),
    }
    save_state(tmp_path / "s", state)
    loaded = load_state(tmp_path / "s")
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name
        assert not loaded[name].requires_grad
    loaded["base"].zero_()
    assert loaded["same"].sum() == 66


def test_a_saved_state_does_not_change_later(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    save_state(tmp_path / "s", {"tensor": tensor})
    tensor.zero_()
    assert load_state(tmp_path / "s")["tensor"].tolist() == [1, 1, 1]


def test_mixed_keys_are_refused_with_their_path_and_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"/outer/inner.*int and str"):
        save_state(tmp_path / "s", {"outer": {"inner": {0: 1, "a": 2}}})
    assert list(tmp_path.iterdir()) == []


def test_two_tensors_of_one_path_are_both_saved(tmp_path: Path) -> None:
    state = {"a/b": torch.zeros(2), "a": {"b": torch.ones(2)}}
    save_state(tmp_path / "s", state)
    assert_equal(load_state(tmp_path / "s"), state)


def test_safetensors_reads_the_written_tensors(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),  # odd: what follows must be aligned
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "half": torch.randn(7).bfloat16(),
        "transposed": torch.randn(4, 2).t(),
        "number": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert_equal(dict(sorted(load_file(tmp_path / "x.safetensors").items())),
                 {name: value.contiguous() for name, value in sorted(tensors.items())})  # fmt: skip


def test_a_file_cut_short_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(io.BytesIO):
        def __exit__(self, *args: Any) -> None:
            with open(tmp_path / "x.safetensors", "wb") as file:
                file.write(self.getvalue()[:-1])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *args: Short())
        with pytest.raises(OSError, match="was cut short"):
            write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})


def test_tensors_are_copied_to_the_cpu_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: set[int] = set()
    most = 0
    real = torch.Tensor.to

    def counted(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        nonlocal most
        copied = real(tensor, *args, copy=True)  # as from a GPU
        alive.add(id(copied))
        weakref.finalize(copied, alive.discard, id(copied))
        most = max(most, len(alive))
        return copied

    monkeypatch.setattr(torch.Tensor, "to", counted)
    save_state(tmp_path / "s", {str(n): torch.full((4,), float(n)) for n in range(9)})
    monkeypatch.undo()
    assert 1 <= most <= 2
    assert load_state(tmp_path / "s")["8"].tolist() == [8, 8, 8, 8]


FULL: dict[str, Any] = {
    "step": 3,
    "model": {"w": torch.ones(2, 2)},
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 2)}}, "param_groups": [{"lr": 0.1}]},
}


def test_the_optimizers_state_can_be_dropped(tmp_path: Path) -> None:
    save_state(tmp_path / "s", FULL)
    assert_equal(load_state(tmp_path / "s"), FULL)
    drop_optimizer(tmp_path / "s")
    drop_optimizer(tmp_path / "s")
    rest = {"step": 3, "model": FULL["model"]}
    assert_equal(load_state(tmp_path / "s"), rest)
    assert_equal(load_state(tmp_path / "s", ("model", "optimizer")), {"model": FULL["model"]})


def test_rounding_halves_matrices_and_nothing_that_it_would_harm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(64, 64),
        "convolution": torch.randn(4, 4, 3, 3),
        "norm": torch.randn(64),
        "too large": torch.full((2, 2), 1e5),
        "bfloat16": torch.randn(2, 2).bfloat16(),
        "moments": torch.ones(2, 2, dtype=torch.uint8),
    }
    write_tensors(tmp_path / "a.safetensors", tensors)
    round_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    loaded = load_file(tmp_path / "b.safetensors")
    for name, value in tensors.items():
        rounded = name in ("matrix", "convolution")
        assert loaded[name].dtype is (torch.float16 if rounded else value.dtype), name
        assert torch.equal(loaded[name], value.half() if rounded else value), name


def test_a_newer_state_replaces_the_older_one_without_leftovers(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"value": 1, "gone": torch.ones(2)})
    save_state(tmp_path / "s", {"value": 2})
    assert load_state(tmp_path / "s") == {"value": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_failure_while_writing_tensors_keeps_the_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path / "s", {"value": torch.ones(2)})

    def failing(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "write_tensors", failing)
    with pytest.raises(OSError, match="no space"):
        save_state(tmp_path / "s", {"value": torch.zeros(2)})
    assert load_state(tmp_path / "s")["value"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_value_that_cannot_be_written_keeps_the_older_state(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"value": 1})
    with pytest.raises(TypeError):
        save_state(tmp_path / "s", {"value": object()})
    assert load_state(tmp_path / "s") == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


class Killed(BaseException):
    """Stands for a kill of the process: nothing runs after it."""


def killed_at_rename(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the ``number``-th rename (from 0) a kill: nothing happens from there on."""
    rename, calls = Path.rename, []

    def counting(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) > number:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counting)


@pytest.mark.parametrize("number", [0, 1])
def test_a_kill_at_either_rename_loses_no_state(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path / "s", {"value": 1})
    with monkeypatch.context() as patch:
        killed_at_rename(number, patch)
        with pytest.raises(Killed):
            save_state(tmp_path / "s", {"value": 2})
    assert load_state(tmp_path / "s")["value"] in (1, 2)
    save_state(tmp_path / "s", {"value": 3})
    assert load_state(tmp_path / "s") == {"value": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_failed_write_after_a_kill_between_the_renames_loses_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path / "s", {"value": 1})
    with monkeypatch.context() as patch:
        killed_at_rename(1, patch)
        with pytest.raises(Killed):
            save_state(tmp_path / "s", {"value": 2})
    with pytest.raises(TypeError):
        save_state(tmp_path / "s", {"value": object()})
    assert load_state(tmp_path / "s")["value"] in (1, 2)


def test_leftovers_of_a_killed_write_stay_out_of_the_next(tmp_path: Path) -> None:
    for leftover in (".s.partial", ".s.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stray").write_text("left by a kill")
    (tmp_path / "s").mkdir()
    save_state(tmp_path / "s", {"value": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == ["digests.json", "state.json", "tensors.safetensors"]


def test_a_folder_appears_only_once_it_is_complete(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "deep" / "folder") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("whole")
        assert not (tmp_path / "deep" / "folder").exists()
    assert (tmp_path / "deep" / "folder" / "sub" / "file").read_text() == "whole"


def test_a_file_is_replaced_completely_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep" / "file"
    replace_file(file, b"first")
    assert file.read_bytes() == b"first"
    write = Path.write_bytes

    def failing(path: Path, data: bytes) -> int:
        write(path, data[:2])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing)
        with pytest.raises(OSError, match="no space"):
            replace_file(file, b"second")
    assert file.read_bytes() == b"first"
    assert [path.name for path in file.parent.iterdir()] == ["file"], "nothing half is left"
    replace_file(file, b"third")
    assert file.read_bytes() == b"third"
    assert [path.name for path in file.parent.iterdir()] == ["file"]
