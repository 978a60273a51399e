"""State folders: what comes back, and that no failure or kill ever costs the older state."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_lib import state
from dreambooth_lib.state import load_state, replace_file, replacing_folder, save_state


def assert_equal(one: Any, other: Any) -> None:
    """Equal values of equal types, and for tensors of equal dtypes and bits."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


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


def test_a_nested_state_comes_back_the_same(tmp_path: Path) -> None:
    save_state(tmp_path / "s", NESTED)
    assert_equal(load_state(tmp_path / "s"), NESTED)


def test_an_empty_state_comes_back_the_same(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {})
    assert load_state(tmp_path / "s") == {}


def test_transposed_sliced_and_shared_tensors_come_back_by_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    given = {
        "transposed": base.t(),
        "slice": base[:, 1:3],
        "expanded": torch.ones(1).expand(5),
        "one": base,
        "same": base,
        "parameter": torch.nn.Parameter(base.clone()),
    }
    save_state(tmp_path / "s", given)
    got = load_state(tmp_path / "s")
    assert got.keys() == given.keys()
    for name, value in given.items():
        assert torch.equal(got[name], value), name
        assert not got[name].requires_grad
    got["one"].zero_()
    assert got["same"].sum() == 66


def test_saved_values_are_those_at_the_moment_of_saving(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    save_state(tmp_path / "s", {"tensor": tensor})
    tensor.zero_()
    assert load_state(tmp_path / "s")["tensor"].tolist() == [1, 1, 1]


def test_mixed_keys_are_refused_by_their_place_and_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"/outer/inner.*int and str"):
        save_state(tmp_path / "s", {"outer": {"inner": {0: 1, "a": 2}}})
    assert list(tmp_path.iterdir()) == []


def test_two_tensors_never_take_one_anothers_place(tmp_path: Path) -> None:
    given = {"a/b": torch.zeros(2), "a": {"b": torch.ones(2)}}
    save_state(tmp_path / "s", given)
    assert_equal(load_state(tmp_path / "s"), given)


def test_a_newer_state_replaces_the_older_one_and_leaves_no_leftovers(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"value": 1, "gone": torch.ones(2)})
    save_state(tmp_path / "s", {"value": 2})
    assert load_state(tmp_path / "s") == {"value": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_failure_while_tensors_are_written_leaves_the_older_state_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path / "s", {"value": torch.ones(2)})

    def failing(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(state, "write_tensors", failing)
    with pytest.raises(OSError, match="no space"):
        save_state(tmp_path / "s", {"value": torch.zeros(2)})
    assert load_state(tmp_path / "s")["value"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_value_that_cannot_be_written_leaves_the_older_state_whole(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"value": 1})
    with pytest.raises(TypeError):
        save_state(tmp_path / "s", {"value": object()})
    assert load_state(tmp_path / "s") == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


class Killed(BaseException):
    """Stands for the process's end at one point: nothing after it runs."""


def killed_at_rename(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the ``number``-th rename (from 0) and everything after it does not happen."""
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


def test_saving_after_a_kill_between_the_renames_and_failing_loses_no_state(
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


def test_leftovers_of_a_killed_write_do_not_get_into_the_next(tmp_path: Path) -> None:
    for leftover in (".s.partial", ".s.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stray").write_text("left by a kill")
    (tmp_path / "s").mkdir()
    save_state(tmp_path / "s", {"value": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == ["state.json", "tensors.safetensors"]


def test_a_folder_appears_only_once_it_is_filled(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "deep" / "folder") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("whole")
        assert not (tmp_path / "deep" / "folder").exists()
    assert (tmp_path / "deep" / "folder" / "sub" / "file").read_text() == "whole"


def test_a_file_is_replaced_whole_or_not_at_all(
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
