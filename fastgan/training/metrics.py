"""Training curves: a row for every step in a CSV file, and for every block of steps in TensorBoard."""

import csv
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastgan.training.checkpoint import atomic_write
from fastgan.training.errors import Diverged
from fastgan.training.folder import RunFolder


class Curves:
    """Collects each step's scalars on the device and writes them in blocks, so that no step waits for them.

    Opened after `step`, it continues the files there and drops their rows past that step.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator, images_per_step: int, step: int = 0):
        self.csv_path = folder.curves
        self.accelerator = accelerator
        self.images_per_step = images_per_step
        self.step = step
        self.pending: list[Tensor] = []
        self.names: list[str] = []
        self.images = 0
        self.seconds = 0.0
        self.writer: SummaryWriter | None = None
        if accelerator.is_main_process:
            self.writer = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)
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
                name = self.names[finite.index(False)]
                raise Diverged(f"step {self.step + offset}: {name} is {row[finite.index(False)]}")
        return self._write([[*row, images / seconds] for row in rows])

    def _write(self, rows: list[list[float]]) -> dict[str, float]:
        names = [*self.names, "images_per_s"]
        numbered = enumerate(rows, start=self.step + 1)
        self.step += len(rows)
        last = dict(zip(names, rows[-1], strict=True))
        if self.writer:
            for name, value in last.items():
                self.writer.add_scalar(name, value, self.step)
            with open(self.csv_path, "a", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    table.writerow(["step", *names])
                table.writerows([step, *(f"{value:.6g}" for value in row)] for step, row in numbered)
        return last

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def _rows_until(path: Path, step: int) -> str:
    """The CSV file's header and whole rows up to `step`; nothing when there is no file, or no step to keep."""
    if not step or not path.exists():
        return ""
    header, *rows = path.read_text().splitlines(keepends=True)
    whole = (row for row in rows if row.count(",") == header.count(","))
    return "".join([header, *(row for row in whole if int(row.partition(",")[0]) <= step)])
