"""Whole runs: what they leave behind, that they continue exactly, and how they stop."""

import csv
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgan.training import checkpoint, data, dcgan, run
from fastgan.training.dcgan import DCGAN
from fastgan.training.errors import Diverged, InputError, Interrupted, OutputError
from fastgan.training.loop import KEPT


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "curves.csv").read_text().splitlines()))


def losses(out: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows(out)]


def assert_same(a, b, where="checkpoint"):
    """Bit for bit, whatever the nesting."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    assert_same(checkpoint.load(a / "checkpoint.pt"), checkpoint.load(b / "checkpoint.pt"))
    assert losses(a) == losses(b)
    grids = sorted(path.name for path in (a / "samples").iterdir())
    assert grids == sorted(path.name for path in (b / "samples").iterdir())
    for name in grids:
        assert (a / "samples" / name).read_bytes() == (b / "samples" / name).read_bytes(), name


def points(out: Path) -> list[tuple[int, float]]:
    """TensorBoard's curve of the generator's loss."""
    return [
        (event.step, event.value) for event in EventAccumulator(str(out / "tensorboard")).Reload().Scalars("loss_g")
    ]


def stop_at(step, monkeypatch, action):
    """Has `action` happen in the middle of training step `step`, counted from now."""
    original, calls = DCGAN.generator_step, []

    def generator_step(self, fake):
        calls.append(None)
        if len(calls) == step:
            action()
        return original(self, fake)

    monkeypatch.setattr(DCGAN, "generator_step", generator_step)


def test_a_run_leaves_a_grid_per_epoch_a_row_per_step_and_a_checkpoint(train, tmp_path):
    result = train(tmp_path / "new" / "out", epochs=2)
    out = result.folder.root
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "curves.csv", "samples", "tensorboard"}
    assert {path.name for path in (out / "samples").iterdir()} == {"epoch_0001.png", "epoch_0002.png", "final.png"}
    assert (out / "samples" / "final.png").read_bytes() == (out / "samples" / "epoch_0002.png").read_bytes()
    assert (out / "samples" / "final.png").read_bytes() != (out / "samples" / "epoch_0001.png").read_bytes()
    assert Image.open(out / "samples" / "final.png").size == (82, 82)
    assert [row["step"] for row in rows(out)] == [str(step) for step in range(1, 29)]
    names = ["step", "loss_d", "d_real", "d_fake", "grad_norm_d", "loss_g", "grad_norm_g", "images_per_s"]
    assert list(rows(out)[0]) == names
    state = checkpoint.load(out / "checkpoint.pt")
    assert state["step"] == result.steps == 28
    assert state.keys() == {"format", *KEPT, *DCGAN.kept}
    assert result.images_per_s * result.seconds == pytest.approx(28 * 128)


def test_the_seed_decides_the_run(train, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tmp_path / name, {"seed": seed}, steps=4)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a")[0] != losses(tmp_path / "c")[0]


@pytest.mark.parametrize("fuse", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"d_steps": 3, "label_smoothing": 0.1}, {"precision": "bf16"}],
    ids=["plain", "three d steps", "bf16"],
)
def test_a_resumed_run_continues_exactly(train, tmp_path, settings, fuse):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, settings | {"fuse": fuse}, steps=18)
    train(parts, settings | {"fuse": fuse}, steps=7)
    (parts / "samples" / "final.png").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    train(parts, resume=True, steps=18)
    assert_same_run(whole, parts)


STYLEGAN = {"image_size": 16, "batch_size": 128, "features": 4, "latent_dim": 5, "w_dim": 5, "phase_images": 512}
"""It fades in its last resolution from step 4 to step 8."""


@pytest.mark.parametrize("settings", [{}, {"penalty_every": 4}, {"precision": "bf16", "fuse": False}], ids=str)
@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_stylegan_continues_exactly_with_its_growth_and_averages(tmp_path, settings, step):
    for name, steps in (("whole", [10]), ("parts", [step, 10])):
        for number, until in enumerate(steps):
            AcceleratorState._reset_state(reset_partial_state=True)
            given = {} if number else STYLEGAN | settings
            run.train("stylegan", given, out=tmp_path / name, steps=until, device="cpu", resume=bool(number))
    state = checkpoint.load(tmp_path / "parts" / "checkpoint.pt")
    average, generator = state["networks"]["average"], state["networks"]["generator"]
    assert_same(average["w_avg"], generator["w_avg"])
    assert not torch.equal(average["mapping.1.weight"], generator["mapping.1.weight"])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_dry_run_of_a_stylegan_leaves_nothing(tmp_path):
    assert run.train("stylegan", STYLEGAN, out=tmp_path / "out", dry_run=True, device="cpu").steps == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("step", [1, 5, 14])
def test_a_stopped_run_finishes_the_step_saves_and_continues_exactly(train, tmp_path, monkeypatch, step, number):
    handler = signal.getsignal(number)  # ignored, where a shell runs the tests in the background
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, steps=16)
    with monkeypatch.context() as patch:
        stop_at(step, patch, lambda: os.kill(os.getpid(), number))
        message = rf"^stopped after step {step}; --resume continues .*checkpoint\.pt$"
        with pytest.raises(Interrupted, match=message) as error:
            train(parts, steps=16)
    assert error.value.signal is number
    assert checkpoint.load(parts / "checkpoint.pt")["step"] == step
    assert signal.getsignal(number) is handler
    assert train(parts, resume=True).steps == 16, "the goal is part of the checkpoint"
    assert_same_run(whole, parts)


def test_after_a_crash_the_run_continues_exactly_from_the_last_checkpoint(train, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, steps=16, checkpoint_every=4)

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        stop_at(12, patch, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(parts, steps=16, checkpoint_every=4)
    assert checkpoint.load(parts / "checkpoint.pt")["step"] == 8
    assert int(rows(parts)[-1]["step"]) > 8
    train(parts, resume=True, checkpoint_every=4)
    assert_same_run(whole, parts)
    assert points(whole) == points(parts)


KILLS = int(os.environ.get("FASTGAN_KILLS", "4"))


def saved_step(out):
    """Of the checkpoint, which must be whole if it is there."""
    path = out / "checkpoint.pt"
    return checkpoint.load(path)["step"] if path.exists() else 0


def shown_step(out):
    """The last whole row of the curves."""
    path = out / "curves.csv"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()[1:]
    return int(whole[-1].partition(",")[0]) if whole else 0


def kill_soon(train, out, chance):
    """Starts a run, or continues it, and kills it: soon after the start, or within some steps once it has saved."""

    def written():
        path = out / "checkpoint.pt"
        return path.stat().st_mtime_ns if path.exists() else 0

    before, written_before = saved_step(out), written()
    # A copy of this process, which has imported all: a process of its own would take seconds to get that far.
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(out,), kwargs=dict(steps=10**6, checkpoint_every=3, resume=before > 0)
    )
    process.start()
    if chance.random() < 0.7:
        while written() == written_before and process.is_alive():
            time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.2))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert saved_step(out) >= before
    assert shown_step(out) <= saved_step(out) + 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a copy of a process that has used CUDA cannot differentiate")
def test_a_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_happened(train, tmp_path):
    """`FASTGAN_KILLS=50` kills it so often."""
    whole, parts, chance = tmp_path / "whole", tmp_path / "parts", random.Random(0)
    train(tmp_path / "first", steps=1)  # what is imported late is here before the copies are made
    for _ in range(KILLS):
        kill_soon(train, parts, chance)
    steps = saved_step(parts) + 5
    train(parts, resume=saved_step(parts) > 0, steps=steps, checkpoint_every=3)
    train(whole, steps=steps, checkpoint_every=3)
    assert_same_run(whole, parts)
    assert points(whole) == points(parts)
    assert not list(parts.rglob("*.partial"))


def fill(disk):
    with pytest.raises(OSError, match="No space left"), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def test_a_disk_that_fills_leaves_the_last_good_checkpoint(train, tmp_path, small_disk, monkeypatch):
    whole, parts = tmp_path / "whole", small_disk / "parts"
    train(whole, steps=9, checkpoint_every=3)
    with monkeypatch.context() as patch:
        stop_at(5, patch, lambda: fill(small_disk))
        message = (
            r"^cannot write .* \(No space left on device\); the last good checkpoint: .*checkpoint\.pt \(step 3\)$"
        )
        with pytest.raises(OutputError, match=message):
            train(parts, steps=9, checkpoint_every=3)
    with pytest.raises(InputError, match=r"^--out: cannot write to .*parts \(No space left on device\)$"):
        train(parts, resume=True)
    (small_disk / "filler").unlink()
    train(parts, resume=True, checkpoint_every=3)
    assert_same_run(whole, parts)


def test_a_disk_that_is_read_only_is_told_before_training(train, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match=r"^--out: cannot write to .*out \(Read-only file system\)$"):
        train(small_disk / "out", steps=1)


def test_resuming_a_finished_run_changes_nothing(train, tmp_path):
    train(tmp_path, steps=3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(tmp_path, resume=True) is None
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_new_run_moves_the_one_before_aside(train, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path, steps=2).previous is None
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    assert train(tmp_path, {"seed": 1}, steps=2).previous == tmp_path / "previous-1"
    assert train(tmp_path, {"seed": 2}, steps=2).previous == tmp_path / "previous-2"
    assert (tmp_path / "previous-1" / "checkpoint.pt").read_bytes() == kept
    assert (tmp_path / "previous-1" / "samples" / "final.png").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(rows(tmp_path)) == 2


def everything_in(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def written(monkeypatch):
    """The names of the files that runs write whole."""
    names, original = [], checkpoint.os.replace

    def replace(partial, path):
        names.append(Path(path).name)
        original(partial, path)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    return names


def test_a_dry_run_writes_all_kinds_of_files_and_leaves_none(train, tmp_path, written):
    result = train(tmp_path / "new" / "out", dry_run=True, epochs=100)
    assert (result.steps, result.folder) == (2, None)
    assert set(written) == {"curves.csv", "final.png", "checkpoint.pt"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_a_dry_run_leaves_the_run_in_its_folder_as_it_was(train, tmp_path, monkeypatch, written, resume):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, steps=10)
    with monkeypatch.context() as patch:
        stop_at(4, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train(parts, steps=10)
    before = everything_in(parts)
    written.clear()
    assert train(parts, resume=resume, dry_run=True).steps == (6 if resume else 2)
    assert "checkpoint.pt" in written
    assert everything_in(parts) == before
    train(parts, resume=True)
    assert_same_run(whole, parts)


def test_a_dry_run_that_is_stopped_leaves_nothing_and_says_so(train, tmp_path, monkeypatch):
    stop_at(1, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=r"^stopped after step 1; a dry run keeps nothing$"):
        train(tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("every", "good"), [(2, r".*checkpoint\.pt \(step 4\)"), (9, "none, it came too early")])
def test_divergence_names_the_step_and_the_last_good_checkpoint(train, tmp_path, monkeypatch, every, good):
    def break_down():
        monkeypatch.setattr(dcgan, "cross_entropy", lambda logits, _: logits.mean() * torch.nan)

    stop_at(6, monkeypatch, break_down)
    norms = r"grad_norm_d \d\S*, grad_norm_g nan"
    with pytest.raises(Diverged, match=rf"^step 6: loss_g is nan \({norms}\); the last good checkpoint: {good}$"):
        train(tmp_path, steps=12, checkpoint_every=every)
    assert (tmp_path / "checkpoint.pt").exists() == (every == 2)
    if every == 2:
        assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 4


def test_fused_and_stock_runs_agree_and_are_compared(train, tmp_path):
    stock, fused = tmp_path / "stock", tmp_path / "fused"
    result = train(stock, steps=4)
    assert result.comparison is None
    result = train(fused, {"fuse": True}, steps=4)
    assert result.comparison.pairs >= 3
    assert result.comparison.speedup == result.comparison.stock / result.comparison.fused > 0
    states = [checkpoint.load(out / "checkpoint.pt") for out in (stock, fused)]
    for name in ("generator", "discriminator"):
        torch.testing.assert_close(states[0]["networks"][name], states[1]["networks"][name], rtol=1e-2, atol=1e-3)
    for a, b in zip(losses(stock), losses(fused), strict=True):
        assert {k: float(v) for k, v in a.items()} == pytest.approx({k: float(v) for k, v in b.items()}, rel=1e-2)


def test_the_other_side_of_the_comparison_is_stock_pytorch(train, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.training.run.compare", lambda fused, stock, *_: (fused.is_stock, stock.is_stock))
    assert train(tmp_path, {"fuse": True}, steps=1).comparison == (False, True)


def test_bf16_trains(train, tmp_path):
    train(tmp_path, {"precision": "bf16"}, steps=2)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert {value.dtype for value in state["networks"]["generator"].values()} == {torch.float32, torch.int64}


def test_a_folder_that_has_moved_can_be_resumed_and_another_cannot(train, tmp_path):
    for name, count in (("a", 4), ("other", 5)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("L", (8, 8), number).save(tmp_path / name / f"{number}.png")
    train(tmp_path / "out", {"data": str(tmp_path / "a"), "batch_size": 2}, steps=2)
    shutil.move(tmp_path / "a", tmp_path / "b")
    train(tmp_path / "out", {"data": str(tmp_path / "b")}, resume=True, steps=3)
    with pytest.raises(InputError, match=r"^--data: 5 images with 1 channels, but .* was trained on 4 with 1"):
        train(tmp_path / "out", {"data": str(tmp_path / "other")}, resume=True, steps=4)


def test_a_broken_image_in_a_set_too_large_to_decode_at_the_start(train, tmp_path, monkeypatch):
    images, settings = tmp_path / "images", {"data": str(tmp_path / "images"), "batch_size": 2}
    images.mkdir()
    for number in range(10):
        Image.effect_noise((64, 64), 50).save(images / f"{number}.png")
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    train(tmp_path / "whole", settings, steps=8, checkpoint_every=1)
    good = (images / "7.png").read_bytes()
    (images / "7.png").write_bytes(good[:500])
    message = r"^--data: cannot read image .*7\.png \(.*\); the last good checkpoint: .*checkpoint\.pt \(step 1\)$"
    with pytest.raises(InputError, match=message):
        train(tmp_path / "parts", settings, steps=8, checkpoint_every=1)
    (images / "7.png").write_bytes(good)
    train(tmp_path / "parts", resume=True, checkpoint_every=1)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "value", "given", "kept"),
    [
        ("image_size", 16, "--image-size 16", "--image-size 8"),
        ("batch_size", 64, "--batch-size 64", "--batch-size 128"),
        ("seed", 9, "--seed 9", "--seed 0"),
        ("lr", 0.1, "--lr 0.1", "--lr 0.0002"),
        ("precision", "bf16", "--precision bf16", "--precision fp32"),
        ("fuse", True, "--fuse", "--no-fuse"),
    ],
)
def test_a_resumed_run_keeps_its_settings(train, tmp_path, name, value, given, kept):
    train(tmp_path, steps=1)
    with pytest.raises(InputError, match=rf"^{given} does not fit .*checkpoint\.pt, trained with {kept}; a resumed"):
        train(tmp_path, {name: value}, resume=True, steps=2)


def test_a_checkpoint_of_another_system_is_refused(train, tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {"system": "biggan"})
    with pytest.raises(InputError, match=r"checkpoint\.pt: a checkpoint of biggan, expected one of dcgan$"):
        train(tmp_path, resume=True)
    names = "dcgan, wgan-gp, sngan, stylegan, cyclegan, srgan, dann"
    with pytest.raises(InputError, match=rf"checkpoint\.pt: a checkpoint of biggan, expected one of {names}$"):
        run.read_checkpoint(tmp_path / "checkpoint.pt")


TWO_PROCESSES = """
import os, sys
from pathlib import Path
from fastgan.training import checkpoint, data, run

out, other, drawn = map(Path, sys.argv[1:])
rank, draw = os.environ["RANK"], data.ImageSet.draw

def note(self, rows, random):
    with open(drawn / rank, "a") as file:
        print(*rows, file=file)
    return draw(self, rows, random)

data.ImageSet.draw = note
if rank != "0":
    run.check_writable = checkpoint.atomic_write = None  # whoever writes is the first
settings = {"image_size": 8, "batch_size": 128, "features": 4, "fuse": False}
run.train("dcgan", settings, out=out, steps=11)
run.train("dcgan", {}, out=other, steps=8, resume=True)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_make_one_run(train, tmp_path):
    out, other, drawn, script = (tmp_path / name for name in ("out", "other", "drawn", "script.py"))
    script.write_text(TWO_PROCESSES)
    drawn.mkdir()
    train(other, steps=4)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--main_process_port=0"]  # any that is free
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, script, out, other, drawn], check=True, timeout=300, env=environment)

    assert [row["step"] for row in rows(out)] == [str(step) for step in range(1, 12)]
    assert {path.name for path in (out / "samples").iterdir()} == {"epoch_0001.png", "final.png"}
    state = checkpoint.load(out / "checkpoint.pt")
    first, second = (rng["cpu"] for rng in state["rng"])
    assert not torch.equal(first, second), "each process has noise of its own"
    assert state["drawn"] == 11
    epoch = [row for rank in "01" for batch in (drawn / rank).read_text().splitlines()[:7] for row in batch.split()]
    assert len(set(epoch)) == len(epoch) == 7 * 2 * 128, "they share an epoch's images, and none is drawn twice"

    # One process drew 4 batches, two 4 more each, and one goes on: each where the images before it end.
    assert checkpoint.load(other / "checkpoint.pt")["drawn"] == 4 // 2 + 4
    AcceleratorState._reset_state(reset_partial_state=True)
    train(other, resume=True, steps=10)
    assert checkpoint.load(other / "checkpoint.pt")["drawn"] == 2 * 6 + 2
    assert [row["step"] for row in rows(other)] == [str(step) for step in range(1, 11)]
