"""Real images: scikit-learn's digits, crops of its photographs, a folder, or a set from the Hugging Face hub.

They come as shuffled batches in [-1, 1], with their labels where a set has any.

Every image is turned as its EXIF data says, cropped to its central square and resized. Where all images of a set are
grayscale (16-bit and transparent ones included) batches have one channel, else three. Transparent pixels become white;
16-bit values are scaled, not clipped; of an animation the first frame counts.
"""

import io
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fastgan.training.errors import InputError, one_line
from fastgan.training.processes import Processes

IN_MEMORY = 2 << 30
"""Bytes up to which a set, once resized, is decoded at the start and kept. A larger one is decoded batch by batch.

Of a larger one only the files' headers are read at the start: an image whose pixels are broken is found when it is drawn.
Finding it sooner would take an epoch's decoding before the first step.
"""

CROPS = 2000
"""Crops of one photograph."""

KINDS = "digits, photos, a folder of images, or hf:NAME"
"""What `--data` takes, as an error names it."""

Pixels = NDArray[np.uint8]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """Image files as they came: how many, what to call each in an error, and how to open it."""

    count: int
    name: Callable[[int], str]
    open: Callable[[int], Image.Image]

    def read(self, row: int, use: Callable[[Image.Image], Any], option: str) -> Any:
        """What `use` makes of a picture. Raises the `InputError` that names it, and `option`, if that fails."""
        try:
            with self.open(row) as picture:
                return use(picture)
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them trip over
            raise InputError(f"{option}: cannot read image {self.name(row)} ({one_line(error)})") from error


class PictureSet(ABC):
    """Pictures that batches are drawn from. `option` is the one that named them, for errors."""

    channels: int
    labels: Rows | None = None
    """The numbers of their classes, if they have any."""

    def __init__(self, pictures: Pictures, option: str):
        self.pictures = pictures
        self.option = option
        self.pool = ThreadPoolExecutor(thread_name_prefix="decode")

    @abstractmethod
    def __len__(self) -> int:
        """Images in an epoch."""

    @abstractmethod
    def draw(self, rows: Rows, random: np.random.Generator) -> Pixels:
        """Images of one size in uint8, `(len(rows), channels, size, size)`. What chance decides `random` does."""

    def add_color(self) -> None:
        """Has three channels from now on, equal ones where there was one."""
        self.channels = 3


class ImageSet(PictureSet):
    """Pictures cropped and resized to one size: `images[rows]` is `(len(rows), channels, size, size)` in uint8."""

    def __init__(self, pictures: Pictures, size: int, option: str = "--data", labels: Rows | None = None):
        super().__init__(pictures, option)
        self.size = size
        self.labels = labels
        rows = range(len(self))
        self.channels = 1 if all(self.pool.map(self._is_gray, rows)) else 3
        self.pixels: Pixels | None = None
        if len(self) * self.channels * size * size <= IN_MEMORY:
            self.pixels = self._decode(rows)

    def __len__(self) -> int:
        return self.pictures.count

    def __getitem__(self, rows: Rows) -> Pixels:
        return self._decode(rows.tolist()) if self.pixels is None else self.pixels[rows]

    def draw(self, rows: Rows, random: np.random.Generator) -> Pixels:
        return self[rows]

    def add_color(self) -> None:
        super().add_color()
        if self.pixels is not None:
            self.pixels = np.broadcast_to(self.pixels, (len(self), 3, self.size, self.size))

    def _is_gray(self, row: int) -> bool:
        return is_gray(self.pictures.read(row, lambda picture: picture.mode, self.option))

    def _decode(self, rows: Sequence[int]) -> Pixels:
        pixels = np.empty((len(rows), self.channels, self.size, self.size), np.uint8)
        images = self.pool.map(lambda row: self.pictures.read(row, self._prepare, self.option), rows)
        for place, image in zip(pixels, images, strict=True):
            place[:] = image.reshape(self.size, self.size, self.channels).transpose(2, 0, 1)
        return pixels

    def _prepare(self, picture: Image.Image) -> Pixels:
        picture = normalize(picture, self.channels)
        return np.asarray(ImageOps.fit(picture, (self.size, self.size), Image.Resampling.BICUBIC))


def normalize(picture: Image.Image, channels: int) -> Image.Image:
    """The picture upright, in 8 bits, on white where it is transparent, and with `channels` 1 or 3."""
    picture = upright(picture)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("L" if channels == 1 else "RGB")


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF data turns it, in 8 bits."""
    return _to_8_bits(ImageOps.exif_transpose(picture))


def is_gray(mode: str) -> bool:
    return mode in {"1", "L", "LA", "La", "I"} or mode.startswith("I;16")


def _to_8_bits(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    return picture


def load_images(data: str, size: int, option: str = "--data") -> ImageSet:
    """Opens `data` at `size` x `size` pixels.

    `data` is "digits", "photos", "photos:china", "photos:flower", "hf:NAME" or a folder, searched with its subfolders.
    """
    return ImageSet(open_pictures(data, option), size, option)


def open_pictures(data: str, option: str, whole: bool = False) -> Pictures:
    """The pictures of `data`; of the photographs, crops, or the `whole` ones."""
    try:
        return _pictures(data, whole)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _pictures(data: str, whole: bool) -> Pictures:
    kind, colon, name = data.partition(":")
    if data in {"", "hf:"}:
        raise InputError(f"'{data}' names nothing; expected {KINDS}")
    if data == "digits":
        return _digits()
    if kind == "photos":
        photos = _photos(name if colon else None)
        return _whole(photos) if whole else _crops(photos)
    return _hub(name) if kind == "hf" and colon else _folder(Path(data))


def _digits() -> Pictures:
    from sklearn.datasets import load_digits

    pixels = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    return Pictures(len(pixels), lambda row: f"digit {row}", lambda row: Image.fromarray(pixels[row]))


def _photos(name: str | None) -> dict[str, Pixels]:
    """scikit-learn's photographs by their names, or the one called `name`."""
    from sklearn.datasets import load_sample_images

    sample = load_sample_images()
    photos = {Path(file).stem: photo for file, photo in zip(sample.filenames, sample.images, strict=True)}
    if name is not None and name not in photos:
        raise InputError(f"no photos:{name}; expected photos, {', '.join(f'photos:{each}' for each in photos)}")
    return photos if name is None else {name: photos[name]}


def _whole(photos: dict[str, Pixels]) -> Pictures:
    names = list(photos)
    return Pictures(len(names), lambda row: f"photos:{names[row]}", lambda row: Image.fromarray(photos[names[row]]))


def _crops(photos: dict[str, Pixels]) -> Pictures:
    """Square crops of photographs: always the same ones.

    They have random places, and sides from a quarter of the photograph's shorter side to all of it.
    """
    names = list(photos)
    places = np.random.default_rng(0).random((CROPS, 3))

    def crop(row: int) -> Image.Image:
        photo = photos[names[row // CROPS]]
        height, width = photo.shape[:2]
        scale, down, across = places[row % CROPS]
        side = round(min(height, width) * (1 + 3 * scale) / 4)
        top, left = round(down * (height - side)), round(across * (width - side))
        return Image.fromarray(photo[top : top + side, left : left + side])

    return Pictures(CROPS * len(names), lambda row: f"crop {row % CROPS} of photos:{names[row // CROPS]}", crop)


def image_files(path: Path) -> list[Path]:
    """Files in a folder and below that Pillow reads, by their names.

    Hidden ones do not count, nor do those in linked folders or archives.
    """
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def counts(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        return file.suffix.lower() in readable and not hidden and file.is_file()

    files = sorted(filter(counts, path.rglob("*"))) if os.path.isdir(path) else []
    if not files:
        raise InputError(f"no images found in {path} or below; archives are not opened")
    return files


def _folder(path: Path) -> Pictures:
    if not os.path.isdir(path):  # which, unlike pathlib's, takes names of any length
        raise InputError(f"{path} is no folder; expected {KINDS}")
    files = image_files(path)
    return Pictures(len(files), lambda row: str(files[row]), lambda row: Image.open(files[row]))


def _hub(name: str) -> Pictures:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry
    try:
        import datasets

        datasets.disable_progress_bars()
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # of its import, no network, no such name, access or split: each raises its own
        raise InputError(f"cannot load hf:{name} ({one_line(error)})") from error
    column = next((key for key, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise InputError(f"hf:{name} has no column of images, only {', '.join(table.features)}")
    return _table(table, column)


def _table(table: Any, column: str) -> Pictures:
    """A `datasets` table with an image column. Files are opened here, where an error can name them."""
    import datasets

    files = table.select_columns(column).cast_column(column, datasets.Image(decode=False))

    def name(row: int) -> str:
        return files[row][column]["path"] or f"number {row}"

    def open_picture(row: int) -> Image.Image:
        file = files[row][column]
        return Image.open(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"])

    return Pictures(len(files), name, open_picture)


class Labelled(NamedTuple):
    """A batch of a set that has labels: (N, C, size, size), and (N,) in int64."""

    images: Tensor
    labels: Tensor


class Batches(Iterator[Any]):
    """Shuffled batches without end, on the accelerator's device, in float32 from -1 to 1: tensors, or `Labelled`.

    Each epoch is a new order, decided by the seed and the epoch's number, and drops what does not fill a batch. So
    `drawn` is all there is to save: `seek` continues from there. Processes take alternate batches of one order. The
    next batch is read while the current one is used. Another `stream` has other orders.
    """

    def __init__(self, images: PictureSet, batch_size: int, seed: int, accelerator: Processes, stream: int = 0):
        together = batch_size * accelerator.num_processes
        if len(images) < together:
            raise InputError(f"--batch-size: {together} is more than the {len(images)} images in {images.option}")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.stream = stream
        self.accelerator = accelerator
        self.per_epoch = len(images) // together
        self.epoch = -1
        self.order: Rows
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.seek(0)

    def seek(self, drawn: int) -> None:
        """Goes to where `drawn` batches have been drawn."""
        self.drawn = drawn
        self.ahead = self.reader.submit(self._read, drawn)

    def __next__(self) -> Tensor | Labelled:
        pixels, labels = self.ahead.result()
        self.seek(self.drawn + 1)
        images = to_floats(self._to_device(pixels))
        return images if labels is None else Labelled(images, self._to_device(labels))

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor, device = torch.from_numpy(array), self.accelerator.device
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    def _read(self, number: int) -> tuple[Pixels, Rows | None]:
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            random = np.random.default_rng((self.seed, epoch, self.stream))
            self.epoch, self.order = epoch, random.permutation(len(self.images))
        start = (place * self.accelerator.num_processes + self.accelerator.process_index) * self.batch_size
        rows = self.order[start : start + self.batch_size]
        pixels = self.images.draw(rows, np.random.default_rng((self.seed, epoch, self.stream, start)))
        return pixels, None if self.images.labels is None else self.images.labels[rows]


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 as float32 from -1 to 1."""
    return pixels.float().div_(127.5).sub_(1)


class Turns(Iterator[Any]):
    """Batches of one data set after the other, in turn and without end: unaligned, for each has an order of its own.

    An epoch lasts until the largest set has been seen.
    """

    def __init__(self, sets: Sequence[PictureSet], batch_size: int, seed: int, accelerator: Processes):
        self.sets = sets
        self.parts = [Batches(images, batch_size, seed, accelerator, stream) for stream, images in enumerate(sets)]
        self.per_epoch = len(sets) * max(part.per_epoch for part in self.parts)
        self.drawn = 0

    def seek(self, drawn: int) -> None:
        """Goes to where `drawn` batches have been drawn, of all sets together."""
        self.drawn = drawn
        for place, part in enumerate(self.parts):
            part.seek((drawn + len(self.parts) - 1 - place) // len(self.parts))

    def __next__(self) -> Tensor | Labelled:
        part = self.parts[self.drawn % len(self.parts)]
        self.drawn += 1
        return next(part)
