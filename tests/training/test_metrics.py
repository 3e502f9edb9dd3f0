"""Curves: what stands in the files, and when a run has diverged."""

import csv

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgan.training.errors import Diverged, OutputError
from fastgan.training.folder import RunFolder
from fastgan.training.metrics import Curves


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def scalars(**values):
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def rows(folder):
    return list(csv.DictReader(folder.curves.read_text().splitlines()))


def write(folder, accelerator, steps, start=0):
    curves = Curves(folder, accelerator, images_per_step=8, step=start)
    for step in steps:
        curves.add(scalars(loss_d=step, loss_g=step / 4))
        if step % 2 == 0:
            curves.flush()
    return curves


def test_each_step_has_a_row(folder, accelerator):
    write(folder, accelerator, range(1, 5))
    assert [(row["step"], row["loss_d"], row["loss_g"]) for row in rows(folder)] == [
        ("1", "1", "0.25"),
        ("2", "2", "0.5"),
        ("3", "3", "0.75"),
        ("4", "4", "1"),
    ]


def test_images_per_second_counts_training_time_only(folder, accelerator, monkeypatch):
    clock = iter([0.0, 4.0, 4.0, 10.0, 12.0, 12.0])
    monkeypatch.setattr("fastgan.training.metrics.time.perf_counter", lambda: next(clock))
    curves = Curves(folder, accelerator, images_per_step=8)
    curves.add(scalars(loss=1))
    assert curves.flush()["images_per_s"] == 2  # 8 images from 0 s to 4 s
    curves.restart_clock()  # saving took from 4 s to 10 s
    curves.add(scalars(loss=1))
    assert curves.flush()["images_per_s"] == 4  # 8 images from 10 s to 12 s
    assert (curves.images, curves.seconds) == (16, 6)


def test_tensorboard_has_the_same_numbers(folder, accelerator):
    write(folder, accelerator, range(1, 5))
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss_d", "loss_g", "images_per_s"}
    assert [(e.step, e.value) for e in events.Scalars("loss_g")] == [(2, 0.5), (4, 1.0)]


def test_reopened_after_a_step_it_drops_what_came_later(folder, accelerator):
    write(folder, accelerator, range(1, 7))
    with open(folder.curves, "a") as file:
        file.write("7,7.0")  # cut short by a crash
    write(folder, accelerator, range(5, 7), start=4)
    assert [row["step"] for row in rows(folder)] == list("123456")
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [e.step for e in events.Scalars("loss_d")] == [2, 4, 6]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("", []),
        ("step,lo", []),
        ("step,loss\n1,1\n2,0.1234", ["1"]),
        ("step,loss\n1,1\n\0\0\0\0", ["1"]),
        ("step,loss\n1,1\n\0,\0\n", ["1"]),
    ],
    ids=["empty", "cut header", "cut value", "zeros", "row of zeros"],
)
def test_a_table_that_a_power_cut_left_is_continued(folder, accelerator, content, kept):
    folder.curves.write_text(content)
    write(folder, accelerator, range(3, 5), start=2)
    assert [row["step"] for row in rows(folder)] == [*kept, "3", "4"]


def test_opened_anew_it_starts_an_empty_table(folder, accelerator):
    write(folder, accelerator, range(1, 3))
    write(folder, accelerator, range(1, 3))
    assert [row["step"] for row in rows(folder)] == ["1", "2"]


@pytest.mark.parametrize(("at", "name"), [(30, "tensorboard/events"), (300, "curves.csv")])
def test_a_full_disk_is_named(folder, accelerator, full_disk, at, name):
    with full_disk(at=at), pytest.raises(OutputError, match=rf"^cannot write .*{name}.* \(File too large\)$"):
        curves = Curves(folder, accelerator, images_per_step=8)
        for _ in range(100):
            curves.add(scalars(loss=1))
        curves.flush()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_named(folder, accelerator, bad):
    curves = Curves(folder, accelerator, images_per_step=8)
    for value in (1, 2, bad, bad):
        curves.add(scalars(loss_d=value, grad_norm_d=0.25, grad_norm_g=value))
    with pytest.raises(Diverged, match=rf"^step 3: loss_d is {bad} \(grad_norm_d 0\.25, grad_norm_g {bad}\)$"):
        curves.flush()
