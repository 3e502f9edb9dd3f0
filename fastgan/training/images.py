"""Sample grids as PNG files, and scatter plots to put into them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import pad

from fastgan.training.checkpoint import atomic_write

GAP = 2
PLOT, DOT, SMOOTHING = 320, 2.5, 3
"""Pixels of a scatter plot's side and of a dot's radius, and how many times larger both are drawn first."""


class Grid(NamedTuple):
    """Images `(N, 1 or 3, H, W)` in [-1, 1], and how many stand in a row."""

    images: Tensor
    columns: int | None = None


def to_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Lays out `(N, 1 or 3, H, W)` images in [-1, 1] row by row, with a black gap around each; square by default."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    pixels = pad(to_pixels(images).cpu(), (0, GAP, 0, GAP, 0, 0, 0, rows * columns - len(images)))
    channels, height, width = pixels.shape[1:]
    tiles = pixels.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return _picture(pad(tiles.reshape(rows * height, columns * width, channels), (0, 0, GAP, 0, GAP, 0)))


def to_image(image: Tensor) -> Image.Image:
    """An image `(1, 1 or 3, H, W)` in [-1, 1]."""
    return _picture(to_pixels(image)[0].cpu().permute(1, 2, 0))


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, clipped."""
    return images.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte()


def _picture(pixels: Tensor) -> Image.Image:
    """uint8 of shape `(H, W, 1 or 3)`."""
    return Image.fromarray(pixels.squeeze(2).contiguous().numpy())


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Writes `to_grid(images)` as a PNG, whole or not at all."""
    with atomic_write(path) as file:
        to_grid(images, columns).save(file, format="PNG")


def scatter(points: Tensor, colors: Sequence[str]) -> Tensor:
    """A plot `(3, PLOT, PLOT)` in [-1, 1] of `(N, 2)` points on white, as large as fits. Pillow reads the colours."""
    points = points.detach().float().cpu()
    middle = (points.amin(0) + points.amax(0)) / 2
    reach = (points - middle).abs().max().clamp(min=1e-12)
    side, radius = PLOT * SMOOTHING, DOT * SMOOTHING
    places = side / 2 + (points - middle) / reach * (side / 2 - 2 * radius)
    picture = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    for (x, y), color in zip(places.tolist(), colors, strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    pixels = np.array(picture.resize((PLOT, PLOT), Image.Resampling.BOX))
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1)
