"""Sample grids as PNG files."""

import math
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from fastgan.training.checkpoint import atomic_write

GAP = 2


def to_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Lays out `(N, 1 or 3, H, W)` images in [-1, 1] row by row, with a black gap around each; square by default."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    pixels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte().cpu()
    pixels = pad(pixels, (0, GAP, 0, GAP, 0, 0, 0, rows * columns - len(images)))
    channels, height, width = pixels.shape[1:]
    tiles = pixels.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = pad(tiles.reshape(rows * height, columns * width, channels), (0, 0, GAP, 0, GAP, 0)).numpy()
    return Image.fromarray(grid[..., 0] if channels == 1 else grid)


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Writes `to_grid(images)` as a PNG, whole or not at all."""
    with atomic_write(path) as file:
        to_grid(images, columns).save(file, format="PNG")
