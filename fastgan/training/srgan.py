"""SRGAN's losses and training step (Ledig et al., 2016): SRResNet on pixels first, then against a discriminator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss

from fastgan.fuse import fuse
from fastgan.models.srgan import Discriminator, Generator, VGGFeatures, init_weights
from fastgan.training.crops import CropSet
from fastgan.training.data import open_pictures, to_floats
from fastgan.training.dcgan import cross_entropy
from fastgan.training.errors import InputError, one_line
from fastgan.training.images import Grid, to_pixels
from fastgan.training.processes import Processes
from fastgan.training.system import LARGEST_SIDE, Score, Settings, System, adam, require, require_count, set_lr

VGG_SCALE = 0.006
"""Of the squared difference of VGG19's features: it is then about as large as that of pixels (section 3.2)."""

SHOWN, SHOWN_SIDE = 4, 256
"""Test images in a sample grid, and the most pixels of a side."""

TESTED = 20
"""Test images that are scored, at most."""

BORDER = 4
"""Pixels along each border that scores leave out, as the paper's do."""

TILE = 96
"""Pixels of a side that are upscaled at once, without what they reach."""


@dataclass(frozen=True)
class SRGANSettings(Settings):
    """`Settings`, and SRGAN's own."""

    sources: ClassVar[tuple[str, ...]] = ("data", "vgg_weights")

    data: str = "photos"
    image_size: int = 64
    batch_size: int = 4
    lr: float = 1e-3
    scale: int = 4
    features: int = 32
    blocks: int = 4
    pretrain_steps: int = 3000
    adversarial_weight: float = 1e-3
    vgg_weights: str = ""
    """A file of torchvision's; none for a content loss of pixels."""

    def load(self) -> list[CropSet]:
        return [CropSet(open_pictures(self.data, "--data", whole=True), self.image_size)]

    def check(self) -> None:
        super().check()
        fits = 32 <= self.image_size <= LARGEST_SIDE and self.image_size % 16 == 0
        require(fits, "--image-size", self.image_size, f"a multiple of 16 from 32 to {LARGEST_SIDE}")
        require(self.batch_size >= 2, "--batch-size", self.batch_size, "2 or more, as batch norm needs")
        require(self.scale in {2, 4, 8}, "--scale", self.scale, "2, 4 or 8")
        require_count("--features", self.features)
        require_count("--blocks", self.blocks)
        require_count("--pretrain-steps", self.pretrain_steps, least=0)
        require(self.adversarial_weight >= 0, "--adversarial-weight", self.adversarial_weight, "0 or more")


class SRGAN(System[SRGANSettings]):
    """The generator, what it was before the adversarial phase, the discriminator, and the steps of both phases."""

    name = "srgan"
    settings_type = SRGANSettings
    epochs = 8

    def __init__(self, settings: SRGANSettings, channels: int, accelerator: Processes):
        super().__init__(settings, channels, accelerator)
        shape = (settings.scale, channels, settings.features, settings.blocks)
        self.generator = Generator(*shape).apply(init_weights)
        self.srresnet = Generator(*shape).requires_grad_(False)
        self.discriminator = Discriminator(settings.image_size, channels, settings.features)
        trained: dict[str, nn.Module] = {"generator": self.generator, "discriminator": self.discriminator}
        self.networks = trained | {"srresnet": self.srresnet}
        for network in self.networks.values():
            network.to(accelerator.device)
        self.optimizers = {name: adam(network, settings.lr, (0.9, 0.999)) for name, network in trained.items()}
        self.vgg: VGGFeatures | None = None
        self.steps = 0

    def prepare(self) -> None:
        if self.settings.vgg_weights:
            self.vgg = load_vgg(Path(self.settings.vgg_weights)).to(self.accelerator.device)

    def remarks(self) -> list[str]:
        if self.vgg:
            return []
        return ["no --vgg-weights: the content loss of the adversarial phase is of pixels, not of VGG19's features"]

    def fuse(self) -> None:
        super().fuse()
        networks = [*self.networks.values(), *([fuse(self.vgg)] if self.vgg else [])]
        # Forwards written by hand call the layers one by one, and each would bring its image into this layout and back.
        for network in networks:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def is_adversarial(self) -> bool:
        return self.steps >= self.settings.pretrain_steps

    def begin_step(self, step: int, steps: int) -> None:
        """The learning rate is a tenth for the last quarter of SRResNet's steps and the first half of the adversarial phase,
        then a hundredth. Of 0.001 these are the paper's 0.0001 and 0.00001."""
        first = self.settings.pretrain_steps
        ends = (first * 3 / 4, first + max(0, steps - first) / 2)
        for optimizer in self.optimizers.values():
            set_lr(optimizer, self.settings.lr / 10 ** sum(step >= end for end in ends))

    def step(self, reals: Iterator[Tensor]) -> dict[str, Tensor]:
        if self.steps == self.settings.pretrain_steps:
            self.srresnet.load_state_dict(self.generator.state_dict())
        metrics = super().step(reals)
        self.steps += 1
        return metrics

    @property
    def kind(self) -> bool:
        return self.is_adversarial

    def launch(self, large: Tensor) -> dict[str, Tensor]:
        """One update of the generator; in the adversarial phase one of the discriminator before it, on the same images."""
        self.optimizers["generator"].zero_grad()
        with self.accelerator.autocast():
            fake = self.generator(shrink(large, self.settings.scale))
        fake = fake.float()
        step = self.adversarial_step if self.is_adversarial else self.pretrain_step
        return step(large, fake)

    def pretrain_step(self, large: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Descends the squared difference of pixels."""
        loss = mse_loss(fake, large)
        loss.backward()
        none = torch.zeros((), device=large.device)
        unused = dict.fromkeys(("loss_adversarial", "loss_d", "d_real", "d_fake", "grad_norm_d"), none)
        return {"loss_content": loss.detach(), "grad_norm_g": self.update("generator"), **unused}

    def adversarial_step(self, large: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The discriminator ascends log D(x) + log(1 − D(G(z))); the generator descends the content loss and −log D(G(z)).

        The discriminator is frozen meanwhile: its weight gradients would go unused.
        """
        self.optimizers["discriminator"].zero_grad()
        real_logits = self.judge(self.discriminator, large)
        real_loss = cross_entropy(real_logits, 1)
        real_loss.backward()
        fake_logits = self.judge(self.discriminator, fake.detach())
        fake_loss = cross_entropy(fake_logits, 0)
        fake_loss.backward()
        grad_norm_d = self.update("discriminator")
        self.discriminator.requires_grad_(False)
        content = self.content_loss(large, fake)
        adversarial = cross_entropy(self.judge(self.discriminator, fake), 1)
        (content + self.settings.adversarial_weight * adversarial).backward()
        self.discriminator.requires_grad_(True)
        return {
            "loss_content": content.detach(),
            "grad_norm_g": self.update("generator"),
            "loss_adversarial": adversarial.detach(),
            "loss_d": real_loss.detach() + fake_loss.detach(),
            "d_real": real_logits.detach().sigmoid().mean(),
            "d_fake": fake_logits.detach().sigmoid().mean(),
            "grad_norm_d": grad_norm_d,
        }

    def content_loss(self, large: Tensor, fake: Tensor) -> Tensor:
        """Equation 4, of pixels, or 5, of VGG19's features."""
        if self.vgg is None:
            return mse_loss(fake, large)
        with torch.no_grad():
            expected = self.judge(self.vgg, large)
        return VGG_SCALE * mse_loss(self.judge(self.vgg, fake), expected)

    def results(self, large: Tensor) -> dict[str, Tensor]:
        """What becomes of images that were shrunk, by the name of what brings them back to their size."""
        small = shrink(large, self.settings.scale)
        networks = {"SRResNet": self.generator}
        if self.steps > self.settings.pretrain_steps:
            networks = {"SRResNet": self.srresnet, "SRGAN": self.generator}
        results = {name: to_floats(upscale(network, to_pixels(small))) for name, network in networks.items()}
        return {"bicubic": enlarge(small, self.settings.scale), **results}

    def scores(self, sets: Sequence[CropSet]) -> dict[str, Score]:
        """The means of PSNR and SSIM over test images, of the luma, with `BORDER` pixels of each border left out."""
        from torchmetrics import Metric
        from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

        psnr: dict[str, Metric] = {}
        ssim: dict[str, Metric] = {}
        for large in self._test_images(sets, TESTED):
            truth = _cut(luma(large))
            for name, image in self.results(large).items():
                psnr.setdefault(name, PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3)))
                ssim.setdefault(name, StructuralSimilarityIndexMeasure(data_range=255.0))
                for metric in (psnr[name], ssim[name]):
                    metric.to(large.device).update(_cut(luma(image)), truth)
        scores = {f"PSNR, {name}": Score(metric.compute().item(), "{:.2f} dB") for name, metric in psnr.items()}
        return scores | {f"SSIM, {name}": Score(metric.compute().item(), "{:.4f}") for name, metric in ssim.items()}

    def sample_grid(self, sets: Sequence[CropSet]) -> Callable[[], Grid]:
        """The middles of test images: bicubic, upscaled, after the first phase and after the second, and as they were."""
        images = list(self._test_images(sets, SHOWN))
        scale = self.settings.scale
        sides = [min(SHOWN_SIDE, *(image.shape[axis] for image in images)) // scale * scale for axis in (2, 3)]
        large = torch.cat([_middle(image, *sides) for image in images])

        def draw() -> Grid:
            columns = [*self.results(large).values(), large]
            return Grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns))

        return draw

    def _test_images(self, sets: Sequence[CropSet], count: int) -> Iterator[Tensor]:
        """The first test images, `(1, 3, H, W)`, cut to what the scale divides."""
        (crops,) = sets
        scale = self.settings.scale
        for row in range(min(count, len(crops.held_out))):
            pixels = torch.from_numpy(crops.held_out[row])[None]
            height, width = pixels.shape[2:]
            whole = pixels[..., : height // scale * scale, : width // scale * scale]
            yield to_floats(whole.to(self.accelerator.device))

    def state_dict(self) -> dict[str, Any]:
        """Of a run's checkpoint, `step` is that of the run: the phase follows from it."""
        return super().state_dict() | {"step": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = state["step"]


def load_vgg(path: Path) -> VGGFeatures:
    """VGG19's features, frozen, from a file of torchvision's `vgg19` state_dict."""
    expected = "expected the state_dict of torchvision's vgg19"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own: a stray file may raise nearly anything
        raise InputError(f"--vgg-weights: cannot read {path} ({one_line(error)}); {expected}") from error
    vgg = VGGFeatures().requires_grad_(False)
    for name, weight in vgg.state_dict().items():
        found = state.get(name) if isinstance(state, dict) else None
        if not isinstance(found, Tensor) or found.shape != weight.shape:
            what = f"has shape {tuple(found.shape)}" if isinstance(found, Tensor) else "is missing"
            raise InputError(f"--vgg-weights: {path}: {name} {what}; {expected}")
    vgg.load_state_dict({name: state[name] for name in vgg.state_dict()})
    return vgg


# ── Sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def shrink(images: Tensor, scale: int) -> Tensor:
    """Bicubic down-sampling without aliasing, to 8 bits: what the generator starts from."""
    height, width = images.shape[2:]
    small = interpolate(images, (height // scale, width // scale), mode="bicubic", antialias=True)
    return to_floats(to_pixels(small))


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Bicubic interpolation with the same kernel, to 8 bits."""
    height, width = images.shape[2:]
    large = interpolate(images, (height * scale, width * scale), mode="bicubic", antialias=True)
    return to_floats(to_pixels(large))


@torch.no_grad()
def upscale(generator: Generator, pixels: Tensor) -> Tensor:
    """What `generator` makes of images `(N, channels, H, W)` in evaluation, uint8 of uint8.

    It sees `TILE`² pixels at a time, and around them all that they depend on. So the result is that of the whole image, and
    the image and the result are all the memory that grows with it.
    """
    scale, reach = generator.scale, generator.reach
    height, width = pixels.shape[2:]
    result = pixels.new_empty((*pixels.shape[:2], height * scale, width * scale))
    generator.eval()
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            above, before = min(top, reach), min(left, reach)
            seen = pixels[..., top - above : top + TILE + reach, left - before : left + TILE + reach]
            tile = to_pixels(generator(to_floats(seen)))
            place = result[..., top * scale : (top + TILE) * scale, left * scale : (left + TILE) * scale]
            rows, columns = above * scale, before * scale
            place[:] = tile[..., rows : rows + place.shape[2], columns : columns + place.shape[3]]
    generator.train()
    return result


def luma(images: Tensor) -> Tensor:
    """Y of ITU-R BT.601, from 16 to 235, `(N, 1, H, W)`, of RGB images in [-1, 1]."""
    weights = images.new_tensor((65.481, 128.553, 24.966)).view(3, 1, 1)
    return 16 + ((images + 1) / 2 * weights).sum(1, keepdim=True)


def _cut(images: Tensor) -> Tensor:
    return images[..., BORDER:-BORDER, BORDER:-BORDER]


def _middle(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[..., top : top + height, left : left + width]
