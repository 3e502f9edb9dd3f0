"""Crops of whole pictures, drawn anew for every batch, and pictures that are kept for testing, of which no crop has a pixel.

Pictures keep their own sizes here. They are turned as their EXIF data says, lie on white where they are transparent, and
have three channels, equal ones where they are grayscale.
"""

from concurrent.futures import Executor

import numpy as np
from PIL import Image, ImageOps

from fastgan.training.data import IN_MEMORY, Pictures, PictureSet, Pixels, Rows, normalize
from fastgan.training.system import require

EPOCH = 2000
"""Crops of an epoch, about: of each picture in proportion to its pixels, but one at least."""

HELD_OUT = 10
"""One picture in so many is kept for testing. Of fewer the third quarter of each is, along its longer side."""

SMALLEST = 32
"""Pixels of a side of what is kept for testing."""


class WholeImages:
    """Pictures of any sizes: `images[row]` is `(3, H, W)` in uint8."""

    def __init__(self, pictures: Pictures, smallest: int, option: str, pool: Executor):
        self.pictures = pictures
        self.option = option
        rows = range(len(self))
        sizes = list(pool.map(lambda row: pictures.read(row, lambda picture: picture.size, option), rows))
        for row, (width, height) in enumerate(sizes):
            fits = min(width, height) >= smallest
            require(fits, option, f"{pictures.name(row)}, {width}x{height},", f"sides of {smallest} or more")
        self.areas = np.array([width * height for width, height in sizes])
        self.pixels: list[Pixels] | None = None
        if 3 * self.areas.sum() <= IN_MEMORY:
            self.pixels = list(pool.map(self._decode, rows))

    def __len__(self) -> int:
        return self.pictures.count

    def __getitem__(self, row: int) -> Pixels:
        return self._decode(row) if self.pixels is None else self.pixels[row]

    def _decode(self, row: int) -> Pixels:
        return self.pictures.read(row, lambda picture: np.array(normalize(picture, 3)).transpose(2, 0, 1), self.option)


class CropSet(PictureSet):
    """Square crops of pictures, at random places, mirrored or not along each axis and the diagonal.

    Those in `held_out` are for testing.
    """

    channels = 3

    def __init__(self, pictures: Pictures, size: int, option: str = "--data"):
        super().__init__(pictures, option)
        trained, tested = split(pictures)
        self.size = size
        self.whole = WholeImages(trained, size, option, self.pool)
        self.held_out = WholeImages(tested, SMALLEST, option, self.pool)
        areas = self.whole.areas
        self.places = np.repeat(np.arange(len(areas)), np.maximum(1, EPOCH * areas // areas.sum()))

    def __len__(self) -> int:
        return len(self.places)

    def draw(self, rows: Rows, random: np.random.Generator) -> Pixels:
        pixels = np.empty((len(rows), 3, self.size, self.size), np.uint8)
        pictures = self.pool.map(self.whole.__getitem__, self.places[rows].tolist())
        for place, picture in zip(pixels, pictures, strict=True):
            top, left = random.integers(np.array(picture.shape[1:]) - self.size + 1)
            crop = picture[:, top : top + self.size, left : left + self.size]
            down, across, diagonal = random.integers(2, size=3)
            crop = crop[:, :: 1 - 2 * down, :: 1 - 2 * across]
            place[:] = crop.transpose(0, 2, 1) if diagonal else crop
        return pixels


def split(pictures: Pictures) -> tuple[Pictures, Pictures]:
    """What is trained on, and what is tested with: the same for all runs."""
    rows = range(pictures.count)
    if len(rows) < HELD_OUT:
        return _parts(pictures, (0, 0.5), (0.75, 1)), _parts(pictures, (0.5, 0.75))
    return _chosen(pictures, [row for row in rows if row % HELD_OUT]), _chosen(pictures, list(rows[::HELD_OUT]))


def _chosen(pictures: Pictures, rows: list[int]) -> Pictures:
    return Pictures(len(rows), lambda row: pictures.name(rows[row]), lambda row: pictures.open(rows[row]))


def _parts(pictures: Pictures, *parts: tuple[float, float]) -> Pictures:
    """Of each picture the parts between two places along its longer side."""

    def name(row: int) -> str:
        start, end = parts[row % len(parts)]
        return f"{start:.0%} to {end:.0%} of {pictures.name(row // len(parts))}"

    def open_part(row: int) -> Image.Image:
        start, end = parts[row % len(parts)]
        with pictures.open(row // len(parts)) as picture:
            whole = ImageOps.exif_transpose(picture)
            width, height = whole.size
            if width >= height:
                return whole.crop((round(width * start), 0, round(width * end), height))
            return whole.crop((0, round(height * start), width, round(height * end)))

    return Pictures(pictures.count * len(parts), name, open_part)
