"""Images from a checkpoint: a grid of samples, walks from one latent to another, and styles of one in those of others."""

import math
from pathlib import Path

import torch

from fastgan.training.folder import RunFolder, check_writable
from fastgan.training.images import save_grid
from fastgan.training.latent import LatentSystem
from fastgan.training.run import SYSTEMS, make_accelerator, read_checkpoint, restore
from fastgan.training.stylegan import StyleGAN
from fastgan.training.system import require

CHUNK = 64
STRIPS, FRAMES = 4, 12

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
    require(num >= 1, "--num", num, "1 or more")
    require(0 <= seed < 2**63, "--seed", seed, "from 0 to 2**63 - 1")
    if checkpoint.is_dir():
        checkpoint = RunFolder(checkpoint).checkpoint
    state = read_checkpoint(checkpoint)
    for option, given in (("--truncation", truncation is not None), ("--style-mix", style_mix)):
        fits = state["system"] == StyleGAN.name or not given
        require(fits, option, f"a checkpoint of {state['system']}", f"one of {StyleGAN.name}")
    require(truncation is None or math.isfinite(truncation), "--truncation", truncation, "a number, 1 for none")
    out = out or checkpoint.parent / "generated"
    check_writable(out)
    system_type = SYSTEMS[state["system"]]
    settings = system_type.settings_type(**state["settings"])
    system = system_type(settings, state["channels"], make_accelerator("cpu", "fp32"))
    restore(system, state, checkpoint)
    assert isinstance(system, LatentSystem)
    if isinstance(system, StyleGAN) and truncation is not None:
        system.truncation = truncation

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
