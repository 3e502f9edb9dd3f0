"""Images from a checkpoint: a grid of samples, and walks from one latent to another."""

from pathlib import Path

import torch
from torch import Tensor

from fastgan.training.folder import RunFolder, check_writable
from fastgan.training.images import save_grid
from fastgan.training.run import SYSTEMS, make_accelerator, read_checkpoint, restore
from fastgan.training.system import require

CHUNK = 64
STRIPS, FRAMES = 4, 12


def generate(checkpoint: Path, out: Path | None = None, num: int = 64, seed: int = 0) -> list[Path]:
    """Writes `samples.png` (`num` images) and `interpolation.png` to `out`, by default `generated` beside `checkpoint`.

    `checkpoint` may also be a run's folder. The same seed gives the same images.
    """
    require(num >= 1, "--num", num, "1 or more")
    require(0 <= seed < 2**63, "--seed", seed, "from 0 to 2**63 - 1")
    if checkpoint.is_dir():
        checkpoint = RunFolder(checkpoint).checkpoint
    state = read_checkpoint(checkpoint)
    out = out or checkpoint.parent / "generated"
    check_writable(out)
    system_type = SYSTEMS[state["system"]]
    settings = system_type.settings_type(**state["settings"])
    system = system_type(settings, state["channels"], make_accelerator("cpu", "fp32"))
    restore(system, state, checkpoint)

    random = torch.Generator().manual_seed(seed)
    samples = [system.sample(noise) for noise in system.noise(num, random).split(CHUNK)]
    starts, ends = system.noise(STRIPS, random), system.noise(STRIPS, random)
    walk = torch.cat([slerp(start, end, FRAMES) for start, end in zip(starts, ends, strict=True)])
    paths = [out / "samples.png", out / "interpolation.png"]
    save_grid(torch.cat(samples), paths[0])
    save_grid(system.sample(walk), paths[1], columns=FRAMES)
    return paths


def slerp(start: Tensor, end: Tensor, frames: int) -> Tensor:
    """`frames` points on the great circle from `start` to `end`: normal latents stay as long as normal latents are.

    A straight line would pass closer to the origin than the generator has ever seen.
    """
    angle = torch.acos(torch.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1))
    t = torch.linspace(0, 1, frames, device=start.device).view(-1, *[1] * start.dim())
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)
