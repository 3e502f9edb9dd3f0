"""The training loop, one for all systems."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastgan.training import checkpoint
from fastgan.training.data import Turns
from fastgan.training.errors import Interrupted
from fastgan.training.folder import RunFolder
from fastgan.training.images import save_grid
from fastgan.training.metrics import Curves
from fastgan.training.system import System

LOOK_EVERY = 10
"""Steps between two looks at the losses. Each look waits for the device."""

KEPT: dict[str, type] = {
    "system": str,
    "settings": dict,
    "channels": int,
    "images": list,
    "step": int,
    "steps": int,
    "drawn": int,
    "rng": list,
}
"""What `Training.save` puts into a checkpoint, besides `System.kept`."""


@dataclass(frozen=True)
class Plan:
    """How far to train, and when to save. A step is what `System.step` does once."""

    steps: int
    steps_per_epoch: int
    checkpoint_every: int


class Training:
    """A system on its way through the data: what a checkpoint holds and `run` moves forward."""

    def __init__(self, system: System, batches: Turns, folder: RunFolder, plan: Plan, console: Console):
        self.system = system
        self.batches = batches
        self.folder = folder
        self.plan = plan
        self.console = console
        self.accelerator = system.accelerator
        self.step = 0
        self.saved: int | None = None
        self.grid = system.sample_grid(batches.sets)
        if self.accelerator.num_processes == 1:
            system.capture()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint: exactly, on the same device with the same number of processes. Of more or fewer each
        draws where all together had come to."""
        self.system.load_state_dict(state)
        self.step = self.saved = state["step"]
        draws, processes = self.system.draws, len(state["rng"])
        self.batches.seek(state["drawn"] // draws * processes // self.accelerator.num_processes * draws)
        rank = self.accelerator.process_index
        if rank < len(state["rng"]):
            checkpoint.set_rng_state(self.accelerator.device, state["rng"][rank])

    def save(self) -> None:
        """Replaces the folder's checkpoint by the present state."""
        state = {
            "system": self.system.name,
            "settings": asdict(self.system.settings),
            "channels": self.system.channels,
            "images": [images.pictures.count for images in self.batches.sets],
            "step": self.step,
            "steps": self.plan.steps,
            "drawn": self.batches.drawn,
            "rng": gather_object([checkpoint.rng_state(self.accelerator.device)]),
            **self.system.state_dict(),
        }
        if self.accelerator.is_main_process:
            checkpoint.save(self.folder.checkpoint, state)
        self.saved = self.step

    def run(self) -> Curves:
        """Trains to the plan's end, and saves there. On Ctrl-C or SIGTERM finishes the step, saves, raises `Interrupted`."""
        processes = self.accelerator.num_processes
        images_per_step = self.system.settings.batch_size * self.system.draws * processes
        curves = Curves(self.folder, self.accelerator, images_per_step, self.step)
        stop = False
        with stop_signals() as received, self._bar() as bar:
            task = bar.add_task("", total=self.plan.steps, completed=self.step, losses="")
            while self.step < self.plan.steps and not stop:
                self.system.begin_step(self.step, self.plan.steps)
                curves.add(self.system.step(self.batches))
                self.step += 1
                bar.update(task, completed=self.step)
                stop = self._agree(bool(received))
                epoch, rest = divmod(self.step, self.plan.steps_per_epoch)
                save = stop or self.step == self.plan.steps or self.step % self.plan.checkpoint_every == 0
                if save or rest == 0 or self.step % LOOK_EVERY == 0:
                    losses = self._shown(curves.flush())
                    bar.update(task, losses=losses)
                if rest == 0:
                    self._save_grid(self.folder.epoch_grid(epoch))
                    if not self.console.is_terminal:
                        self.console.print(f"epoch {epoch}, step {self.step} of {self.plan.steps}: {losses}")
                if save:
                    self.save()
                if save or rest == 0:
                    curves.restart_clock()
        if self.step < self.plan.steps:
            raise Interrupted(f"stopped after step {self.step}", received[0] if received else signal.SIGINT)
        self._save_grid(self.folder.final_grid)
        return curves

    @staticmethod
    def _shown(last: dict[str, float]) -> str:
        shown = [f"{name} {value:.3g}" for name, value in last.items() if name.startswith("loss")]
        return "  ".join([*shown, f"{last['images_per_s']:.0f} images/s"])

    def _agree(self, stop: bool) -> bool:
        """Whether any process was told to stop. Several ask each other only now and then, because that waits."""
        if self.accelerator.num_processes == 1:
            return stop
        if self.step % LOOK_EVERY:
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device), "sum"))

    def _save_grid(self, path: Path) -> None:
        if self.accelerator.is_main_process:
            grid = self.grid()
            save_grid(grid.images, path, grid.columns)

    def _bar(self) -> Progress:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """While open, Ctrl-C and SIGTERM (of a scheduler, say) go into the list instead of ending the process."""
    received: list[signal.Signals] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda it, _: received.append(signal.Signals(it))) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
