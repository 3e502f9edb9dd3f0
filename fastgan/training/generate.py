"""Images from a checkpoint: samples, walks from one latent to another and mixed styles; or images translated or upscaled."""

import math
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from fastgan.training.checkpoint import atomic_write
from fastgan.training.cyclegan import CycleGAN, Direction
from fastgan.training.data import image_files, is_gray, normalize, to_floats, upright
from fastgan.training.errors import InputError, one_line
from fastgan.training.folder import RunFolder, check_writable
from fastgan.training.images import save_grid, to_image
from fastgan.training.latent import LatentSystem
from fastgan.training.run import SYSTEMS, make_accelerator, read_checkpoint, restore
from fastgan.training.srgan import SRGAN, upscale
from fastgan.training.stylegan import StyleGAN
from fastgan.training.system import System, require, require_count

CHUNK = 64
STRIPS, FRAMES = 4, 12
SMALLEST = 8
"""Pixels of a side that CycleGAN's generators need: their innermost map is then of 2, which reflects and has a variance."""

ROWS, COLUMNS = 5, 8
"""Of the matrix of mixed styles."""


def generate(
    checkpoint: Path,
    out: Path | None = None,
    num: int = 64,
    seed: int = 0,
    truncation: float | None = None,
    style_mix: bool = False,
) -> list[Path]:
    """Writes `samples.png` (`num` images) and `interpolation.png` to `out`, by default `generated` beside `checkpoint`.

    `checkpoint` may also be a run's folder. The same seed gives the same images. Of a StyleGAN, `truncation` draws all
    styles towards the mean, and `style_mix` writes `style-mix.png` too: images with the coarse styles of the first in
    their row and the fine styles of the first in their column.
    """
    require_count("--num", num)
    require(0 <= seed < 2**63, "--seed", seed, "from 0 to 2**63 - 1")
    require(truncation is None or math.isfinite(truncation), "--truncation", truncation, "a number, 1 for none")
    system, checkpoint = _load(checkpoint)
    if not isinstance(system, LatentSystem):
        raise InputError(f"{checkpoint}: {system.name} starts from images; name one, or a folder of them, by --input")
    for option, given in (("--truncation", truncation is not None), ("--style-mix", style_mix)):
        fits = isinstance(system, StyleGAN) or not given
        require(fits, option, f"a checkpoint of {system.name}", f"one of {StyleGAN.name}")
    if isinstance(system, StyleGAN) and truncation is not None:
        system.truncation = truncation
    out = _output(out, checkpoint)
    random = torch.Generator().manual_seed(seed)
    samples = [system.sample(noise) for noise in system.noise(num, random).split(CHUNK)]
    starts, ends = system.noise(STRIPS, random), system.noise(STRIPS, random)
    walks = [system.walk(start, end, FRAMES) for start, end in zip(starts, ends, strict=True)]
    paths = [out / "samples.png", out / "interpolation.png"]
    save_grid(torch.cat(samples), paths[0])
    save_grid(torch.cat(walks), paths[1], columns=FRAMES)
    if isinstance(system, StyleGAN) and style_mix:
        paths.append(out / "style-mix.png")
        matrix = system.style_matrix(system.noise(ROWS, random), system.noise(COLUMNS, random))
        save_grid(matrix, paths[-1], columns=COLUMNS + 1)
    return paths


def transform(
    checkpoint: Path, source: Path, out: Path | None = None, direction: Direction | None = None
) -> list[Path]:
    """Writes a PNG of an image file, or of each one in a folder and below, to the same place below `out`.

    A CycleGAN translates each image at its own size, from A to B unless `direction` says otherwise. An SRGAN upscales it;
    what is grayscale stays so, and transparency is kept, upscaled bicubically. `out` is by default `generated` beside
    `checkpoint`, which may also be a run's folder. All images are read once before the first is written: a broken one
    raises `InputError`, and nothing is written.
    """
    require(direction in {None, "a2b", "b2a"}, "--direction", direction, "a2b or b2a")
    system, checkpoint = _load(checkpoint)
    read: Callable[[Path], Any]
    result: Callable[[Any], Image.Image]
    if isinstance(system, CycleGAN):
        read, result = partial(_read_image, system.channels), partial(_translated, system, direction or "a2b")
    elif isinstance(system, SRGAN):
        require(direction is None, "--direction", f"a checkpoint of {system.name}", f"one of {CycleGAN.name}")
        read, result = _read_layers, partial(_upscaled, system)
        system.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # much faster on a CPU
    else:
        raise InputError(f"--input: {checkpoint} is of {system.name}, which makes images from noise, not from images")
    is_file = os.path.isfile(source)  # which, unlike pathlib's, takes names of any length
    folder = source.parent if is_file else source
    try:
        files = [source] if is_file else image_files(source)
    except InputError as error:
        raise InputError(f"--input: {error}") from error
    for file in files:
        read(file)
    if out and out.resolve() == folder.resolve():
        raise InputError(f"--out: {out} is the folder of --input; expected another")
    out = _output(out, checkpoint)
    stems = Counter(file.with_suffix("") for file in files)
    paths = []
    for file in files:
        name = file.with_suffix("") if stems[file.with_suffix("")] == 1 else file
        path = out / f"{name.relative_to(folder)}.png"
        with atomic_write(path) as png:
            result(read(file)).save(png, format="PNG")
        paths.append(path)
    return paths


def _load(checkpoint: Path) -> tuple[System, Path]:
    """The system of a checkpoint or of a run's folder, and the checkpoint."""
    if os.path.isdir(checkpoint):
        checkpoint = RunFolder(checkpoint).checkpoint
    state = read_checkpoint(checkpoint)
    system_type = SYSTEMS[state["system"]]
    settings = system_type.settings_type(**state["settings"])
    system = system_type(settings, state["channels"], make_accelerator("cpu", "fp32"))
    if not isinstance(system, (LatentSystem, CycleGAN, SRGAN)):
        raise InputError(f"{checkpoint}: {system.name} makes no images")
    restore(system, state, checkpoint)
    return system, checkpoint


def _output(out: Path | None, checkpoint: Path) -> Path:
    out = out or checkpoint.parent / "generated"
    check_writable(out)
    return out


def _read(file: Path, use: Callable[[Image.Image], Any]) -> Any:
    """What `use` makes of an image file."""
    try:
        with Image.open(file) as picture:
            return use(picture)
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them trip over
        raise InputError(f"--input: cannot read image {file} ({one_line(error)})") from error


# ── CycleGAN ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_image(channels: int, file: Path) -> Tensor:
    """An image file as `(1, channels, H, W)` from -1 to 1."""
    pixels = _read(file, lambda picture: np.array(normalize(picture, channels)))
    height, width = pixels.shape[:2]
    require(min(height, width) >= SMALLEST, "--input", f"{file}, {width}x{height},", f"sides of {SMALLEST} or more")
    return to_floats(torch.from_numpy(pixels).view(1, height, width, channels).permute(0, 3, 1, 2))


def _translated(system: CycleGAN, direction: Direction, image: Tensor) -> Image.Image:
    """The translation, of any size: the border is repeated up to what the generator halves, and cut off again."""
    height, width = image.shape[2:]
    multiple = system.generators[direction].multiple
    padded = pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    with torch.no_grad():
        (fake,) = system.translate(direction, padded)
    return to_image(fake[..., :height, :width])


# ── SRGAN ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Layers(NamedTuple):
    """A picture in RGB, its transparency if it has any, and whether it was grayscale."""

    color: Image.Image
    alpha: Image.Image | None
    gray: bool


def _read_layers(file: Path) -> Layers:
    def layers(picture: Image.Image) -> Layers:
        gray, picture = is_gray(picture.mode), upright(picture)
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        return Layers(picture.convert("RGB"), alpha, gray)

    return _read(file, layers)


def _upscaled(system: SRGAN, layers: Layers) -> Image.Image:
    pixels = torch.from_numpy(np.array(layers.color)).permute(2, 0, 1)[None]
    large = upscale(system.generator, pixels)[0]
    picture = Image.fromarray(large.permute(1, 2, 0).contiguous().numpy())
    if layers.gray:
        picture = picture.convert("L")
    if layers.alpha:
        picture.putalpha(layers.alpha.resize(picture.size, Image.Resampling.BICUBIC))
    return picture
