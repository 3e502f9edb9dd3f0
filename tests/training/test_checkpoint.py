"""Checkpoints are whole or absent, and nothing else is taken for one."""

import pickle

import pytest
import torch

from fastgan.training import checkpoint
from fastgan.training.errors import InputError, OutputError


def test_what_was_saved_is_loaded_without_running_code(tmp_path):
    state = {"weights": {"a": torch.randn(3)}, "step": 7, "rng": [checkpoint.rng_state(torch.device("cpu"))]}
    checkpoint.save(tmp_path / "c.pt", state)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert loaded["step"] == 7
    assert torch.equal(loaded["weights"]["a"], state["weights"]["a"])
    torch.load(tmp_path / "c.pt", weights_only=True)


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_saving_leaves_what_was_there(tmp_path, monkeypatch, existing):
    path = tmp_path / "c.pt"
    if existing:
        checkpoint.save(path, {"step": 1})

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OutputError, match=r"^cannot write .*c\.pt \(disk full\)$"):
        checkpoint.save(path, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == (["c.pt"] if existing else [])
    if existing:
        assert checkpoint.load(path)["step"] == 1


@pytest.mark.parametrize("size", [10, 1000, 24_000, 100_000], ids="{} numbers".format)
def test_a_full_disk_is_named_wherever_it_fills(tmp_path, full_disk, size):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1})
    with full_disk(at=600), pytest.raises(OutputError, match=r"^cannot write .*c\.pt \(File too large\)$"):
        checkpoint.save(path, {"weights": torch.zeros(size), "more": [torch.zeros(5) for _ in range(100)]})
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    assert checkpoint.load(path)["step"] == 1


def test_the_new_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with checkpoint.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("code ran while a checkpoint was loaded",))


@pytest.mark.parametrize(
    "content",
    [b"", b"text", pickle.dumps({"a": 1}), pickle.dumps(Dangerous()), {"step": 1}, [1], torch.zeros(2), Dangerous()],
    ids=["empty", "text", "pickle", "dangerous pickle", "other dict", "list", "tensor", "dangerous"],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "c.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=r"c\.pt: not a fastgan checkpoint.*expected one written by `fastgan train`$"):
        checkpoint.load(path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="not a fastgan checkpoint"):
        checkpoint.load(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match=r"c\.pt: no checkpoint there"):
        checkpoint.load(tmp_path / "c.pt")


def test_random_state_is_restored():
    cpu = torch.device("cpu")
    state = checkpoint.rng_state(cpu)
    expected = torch.rand(3)
    checkpoint.set_rng_state(cpu, state)
    assert torch.equal(torch.rand(3), expected)
