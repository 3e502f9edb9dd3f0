"""Where a run's files lie."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgan.training.errors import InputError, writing


class RunFolder:
    """The layout under `--out`: checkpoint, curves and samples."""

    def __init__(self, root: Path):
        self.root = root
        self.checkpoint = root / "checkpoint.pt"
        self.curves = root / "curves.csv"
        self.tensorboard = root / "tensorboard"
        self.samples = root / "samples"

    def epoch_grid(self, epoch: int) -> Path:
        return self.samples / f"epoch_{epoch:04d}.png"

    @property
    def final_grid(self) -> Path:
        return self.samples / "final.png"

    def set_aside(self) -> Path | None:
        """Moves the files of an earlier run into `previous-1` (or the next free number); returns where, if any."""
        files = [p for p in (self.checkpoint, self.curves, self.tensorboard, self.samples) if p.exists()]
        if not files:
            return None
        number = 1
        while (previous := self.root / f"previous-{number}").exists():
            number += 1
        with writing(previous):
            previous.mkdir()
            for path in files:
                path.rename(previous / path.name)
        return previous

    @contextmanager
    def scratch(self) -> Iterator["RunFolder"]:
        """A run's folder of its own below this one, for as long as it is open. Nothing of it stays."""
        with _made(self.root), tempfile.TemporaryDirectory(prefix=".dry-run-", dir=self.root) as root:
            yield RunFolder(Path(root))


def check_writable(folder: Path) -> None:
    """Raises `InputError` unless files can be made in `folder`, which need not exist. Leaves nothing behind."""
    try:
        with _made(folder), tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))  # a full disk still takes an empty file
    except OSError as error:
        raise InputError(f"--out: cannot write to {folder} ({error.strerror})") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes `folder` if it is not there; what was made for it goes again when this closes, unless something is in it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
