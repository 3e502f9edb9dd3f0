"""Training curves: a row for every step in a CSV file, and for every block of steps in TensorBoard."""

import csv
import io
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from fastgan.training.checkpoint import atomic_write
from fastgan.training.errors import Diverged, writing
from fastgan.training.folder import RunFolder


class Curves:
    """Collects each step's scalars on the device and writes them in blocks, so that no step waits for them.

    Opened after `step`, it continues the files there and drops their rows past that step.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator, images_per_step: int, step: int = 0):
        self.folder = folder
        self.accelerator = accelerator
        self.images_per_step = images_per_step
        self.step = step
        self.pending: list[Tensor] = []
        self.names: list[str] = []
        self.images = 0
        self.seconds = 0.0
        self.events: EventFile | None = None
        if accelerator.is_main_process:
            self.events = EventFile(folder.tensorboard, step)
            kept = _rows_until(folder.curves, step)
            with atomic_write(folder.curves) as file:
                file.write(kept.encode())
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the time since the last `flush` out of images/s: saving is not training."""
        self.since = time.perf_counter()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Takes the next step's scalars."""
        self.names = list(metrics)
        self.pending.append(torch.stack(list(metrics.values())))

    def flush(self) -> dict[str, float]:
        """Writes what was added, and returns its last row. Raises `Diverged` at the first step that is not finite."""
        block = torch.stack(self.pending)
        if self.accelerator.num_processes > 1:
            block = self.accelerator.reduce(block, "mean")
        rows = block.tolist()
        seconds = time.perf_counter() - self.since
        images = len(rows) * self.images_per_step
        self.images += images
        self.seconds += seconds
        self.pending.clear()
        self.restart_clock()
        for offset, (row, finite) in enumerate(zip(rows, block.isfinite().tolist(), strict=True), start=1):
            if not all(finite):
                named = list(zip(self.names, row, strict=True))
                name, value = named[finite.index(False)]
                norms = ", ".join(f"{name} {value:.3g}" for name, value in named if name.startswith("grad_norm"))
                raise Diverged(f"step {self.step + offset}: {name} is {value} ({norms})")
        return self._write([[*row, images / seconds] for row in rows])

    def _write(self, rows: list[list[float]]) -> dict[str, float]:
        names = [*self.names, "images_per_s"]
        numbered = enumerate(rows, start=self.step + 1)
        self.step += len(rows)
        last = dict(zip(names, rows[-1], strict=True))
        if self.events:
            self.events.add(self.step, last)
            with writing(self.folder.curves), open(self.folder.curves, "a", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    table.writerow(["step", *names])
                table.writerows([step, *(f"{value:.6g}" for value in row)] for step, row in numbered)
        return last


class EventFile:
    """A TensorBoard event file that continues those in `folder` after `step`: it hides what they have past that.

    Each call writes and closes it. torch's `SummaryWriter` writes in a thread, whose failure nobody could catch.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / f"events.out.tfevents.{time.time_ns()}"  # TensorBoard reads in the order of names
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
        self._append(
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)),
        )

    def add(self, step: int, scalars: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _append(self, *events: Event) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        with writing(self.path), open(self.path, "ab") as file:
            file.write(records.getvalue())


def _rows_until(path: Path, step: int) -> str:
    """The CSV file's header and whole rows up to `step`; nothing when there is no file, or no step to keep.

    After a power cut the file may be shorter than the checkpoint says, or end in anything.
    """
    if not step or not path.exists():
        return ""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    header = lines[0] if lines and lines[0].endswith("\n") else ""
    whole = (row for row in lines[1:] if row.endswith("\n") and row.count(",") == header.count(","))
    numbered = ((row.partition(",")[0], row) for row in whole)
    return "".join([header, *(row for number, row in numbered if number.isdecimal() and int(number) <= step)])
