"""CycleGAN's losses and training step: equations 1 to 3 of Zhu et al. (2017), and the details of its section 4."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from fastgan.models.cyclegan import PatchDiscriminator, ResNetGenerator, UNetGenerator, halvings, init_weights
from fastgan.training.data import ImageSet, to_floats
from fastgan.training.dcgan import cross_entropy
from fastgan.training.images import Grid
from fastgan.training.processes import Processes
from fastgan.training.system import LARGEST_SIDE, Settings, System, adam, require, require_count, set_lr

Architecture = Literal["resnet", "unet"]
Loss = Literal["lsgan", "log"]
Direction = Literal["a2b", "b2a"]

ROWS = 8
"""Images of each domain in a sample grid."""

POOL = 50
"""Earlier fakes of each domain that its discriminator may see again."""


@dataclass(frozen=True)
class CycleGANSettings(Settings):
    """`Settings`, and CycleGAN's own."""

    sources: ClassVar[tuple[str, ...]] = ("data_a", "data_b")

    data_a: str = "photos:china"
    data_b: str = "photos:flower"
    batch_size: int = 1
    generator: Architecture = "resnet"
    blocks: int = 6
    features: int = 32
    loss: Loss = "lsgan"
    cycle_weight: float = 10.0
    identity_weight: float = 0.5
    """Of the identity term, as a part of `cycle_weight`."""

    def check(self) -> None:
        super().check()
        generators, losses = get_args(Architecture), get_args(Loss)
        fits = 24 <= self.image_size <= LARGEST_SIDE and self.image_size % 4 == 0
        require(fits, "--image-size", self.image_size, f"a multiple of 4 from 24 to {LARGEST_SIDE}")
        require(self.generator in generators, "--generator", self.generator, " or ".join(generators))
        require(self.loss in losses, "--loss", self.loss, " or ".join(losses))
        require_count("--blocks", self.blocks)
        require_count("--features", self.features)
        require(self.cycle_weight >= 0, "--cycle-weight", self.cycle_weight, "0 or more")
        require(self.identity_weight >= 0, "--identity-weight", self.identity_weight, "0 or more")


class CycleGAN(System[CycleGANSettings]):
    """Generators from each domain to the other, a discriminator for each, and their step."""

    name = "cyclegan"
    settings_type = CycleGANSettings
    kept: ClassVar[dict[str, type]] = {**System.kept, "pools": list}
    epochs = 2
    draws = 2

    def __init__(self, settings: CycleGANSettings, channels: int, accelerator: Processes):
        super().__init__(settings, channels, accelerator)

        def generator() -> ResNetGenerator | UNetGenerator:
            if settings.generator == "resnet":
                return ResNetGenerator(channels, settings.features, settings.blocks)
            return UNetGenerator(channels, settings.features, halvings(settings.image_size))

        self.generators: dict[Direction, ResNetGenerator | UNetGenerator] = {"a2b": generator(), "b2a": generator()}
        self.discriminator_a, self.discriminator_b = (PatchDiscriminator(channels, settings.features) for _ in "ab")
        self.networks = {f"generator_{direction}": network for direction, network in self.generators.items()}
        self.networks |= {"discriminator_a": self.discriminator_a, "discriminator_b": self.discriminator_b}
        for network in self.networks.values():
            network.apply(init_weights).to(accelerator.device)
        self.optimizers = {name: adam(network, settings.lr, (0.5, 0.999)) for name, network in self.networks.items()}
        self.pools = {"a": ImagePool(POOL), "b": ImagePool(POOL)}

    def begin_step(self, step: int, steps: int) -> None:
        """The learning rate stays for the first half of the steps, then falls linearly: the step after the last has none."""
        for optimizer in self.optimizers.values():
            set_lr(optimizer, self.settings.lr * min(1.0, 2 * (steps - step) / steps))

    def launch(self, real_a: Tensor, real_b: Tensor) -> dict[str, Tensor]:
        """One update of the generators, for both directions at once, then one of each discriminator."""
        metrics, fake_a, fake_b = self.generator_step(real_a, real_b)
        metrics |= self.discriminator_step("a", real_a, self.pools["a"].exchange(fake_a))
        return metrics | self.discriminator_step("b", real_b, self.pools["b"].exchange(fake_b))

    def generator_step(self, real_a: Tensor, real_b: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Descends equation 3 and the identity term of section 5.2. Returns metrics, and the fakes of both domains.

        The discriminators are frozen meanwhile: their weight gradients would go unused.
        """
        names = ("generator_a2b", "generator_b2a")
        for name in names:
            self.optimizers[name].zero_grad()
        weight = self.settings.cycle_weight
        identity_weight = weight * self.settings.identity_weight
        if identity_weight:
            fake_b, same_b = self.translate("a2b", real_a, real_b)
            fake_a, same_a = self.translate("b2a", real_b, real_a)
        else:
            (fake_b,), (fake_a,) = self.translate("a2b", real_a), self.translate("b2a", real_b)
        (cycled_a,), (cycled_b,) = self.translate("b2a", fake_b), self.translate("a2b", fake_a)
        for network in (self.discriminator_a, self.discriminator_b):
            network.requires_grad_(False)
        adversarial = self.loss(self.judge(self.discriminator_a, fake_a), 1)
        adversarial = adversarial + self.loss(self.judge(self.discriminator_b, fake_b), 1)
        cycle = l1_loss(cycled_a, real_a) + l1_loss(cycled_b, real_b)
        loss = adversarial + weight * cycle
        metrics = {"loss_adversarial": adversarial.detach(), "loss_cycle": cycle.detach()}
        if identity_weight:
            identity = l1_loss(same_a, real_a) + l1_loss(same_b, real_b)
            loss = loss + identity_weight * identity
            metrics["loss_identity"] = identity.detach()
        loss.backward()
        for network in (self.discriminator_a, self.discriminator_b):
            network.requires_grad_(True)
        metrics |= {f"grad_norm_{name}": self.update(name) for name in names}
        return metrics, fake_a.detach(), fake_b.detach()

    def discriminator_step(self, domain: Literal["a", "b"], real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Descends half the loss against 1 for real and 0 for fake images: half, to slow it against the generators."""
        name = f"discriminator_{domain}"
        self.optimizers[name].zero_grad()
        real_scores, fake_scores = self.judge(self.networks[name], torch.cat([real, fake])).chunk(2)
        loss = (self.loss(real_scores, 1) + self.loss(fake_scores, 0)) / 2
        loss.backward()
        return {f"loss_{name}": loss.detach(), f"grad_norm_{name}": self.update(name)}

    def translate(self, direction: Direction, *domains: Tensor) -> tuple[Tensor, ...]:
        """What a generator makes of each of `domains`, in float32. They go in one batch, where none changes another."""
        with self.accelerator.autocast():
            images = self.generators[direction](torch.cat(domains))
        return images.float().split([len(domain) for domain in domains])

    def loss(self, scores: Tensor, target: float) -> Tensor:
        """Least squares, or binary cross-entropy of logits, against one target for all."""
        if self.settings.loss == "log":
            return cross_entropy(scores, target)
        return mse_loss(scores, torch.full_like(scores, target))

    def sample_grid(self, sets: Sequence[ImageSet]) -> Callable[[], Grid]:
        """Rows of an image, its translation and that one's translation back, from A on the left and from B on the right.

        The images are the same for all of a run, drawn by the seed.
        """
        device, random = self.accelerator.device, np.random.default_rng(self.settings.seed)
        chosen = [images[random.permutation(len(images))[:ROWS]] for images in sets]
        count = min(map(len, chosen))
        real_a, real_b = (to_floats(torch.from_numpy(pixels[:count]).to(device)) for pixels in chosen)

        def draw() -> Grid:
            with torch.no_grad():
                (fake_b,), (fake_a,) = self.translate("a2b", real_a), self.translate("b2a", real_b)
                (cycled_a,), (cycled_b,) = self.translate("b2a", fake_b), self.translate("a2b", fake_a)
            columns = (real_a, fake_b, cycled_a, real_b, fake_a, cycled_b)
            return Grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns))

        return draw

    def state_dict(self) -> dict[str, Any]:
        from accelerate.utils import gather_object

        # Copies: of a view torch.save would write all that it is a view of.
        pools = {domain: [image.cpu().clone() for image in pool.images] for domain, pool in self.pools.items()}
        return super().state_dict() | {"pools": gather_object([pools])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        rank = self.accelerator.process_index
        if rank < len(state["pools"]):
            for domain, pool in self.pools.items():
                pool.images = [image.to(self.accelerator.device) for image in state["pools"][rank][domain]]


class ImagePool:
    """Shrivastava et al.'s (2017) history of fakes: of a full pool, half of what is shown are earlier images.

    All of it is tensors on the images' device: no step waits for a draw, and a CUDA graph may hold one.
    """

    def __init__(self, size: int):
        self.size = size
        self._places: Tensor | None = None
        self._count: Tensor

    @property
    def images(self) -> list[Tensor]:
        """What it keeps, each (1, C, H, W). To look waits for the device."""
        return [] if self._places is None else [place[None] for place in self._places[: int(self._count)]]

    @images.setter
    def images(self, images: Sequence[Tensor]) -> None:
        self._places = None
        if images:
            self._make_room_for(images[0])[: len(images)] = torch.cat(list(images))
            self._count.fill_(len(images))

    def _make_room_for(self, images: Tensor) -> Tensor:
        if self._places is None:
            self._places = images.new_zeros(self.size, *images.shape[1:])
            self._count = torch.zeros(1, dtype=torch.long, device=images.device)
        return self._places

    @torch.no_grad()
    def exchange(self, images: Tensor) -> Tensor:
        """What to show for `images`: each, and the pool keeps it while it has room; then by even chance one kept instead."""
        places, device, shown = self._make_room_for(images), images.device, []
        for image in images.split(1):
            is_full = self._count == self.size
            drawn = torch.randint(self.size, (1,), device=device)
            is_exchanged = is_full & (torch.rand(1, device=device) < 0.5)
            place = torch.where(is_full, drawn, self._count)
            earlier = places.index_select(0, place)
            keeps = (is_exchanged | ~is_full).view(-1, 1, 1, 1)
            places.index_copy_(0, place, torch.where(keeps, image, earlier))
            shown.append(torch.where(is_exchanged.view(-1, 1, 1, 1), earlier, image))
            self._count += ~is_full
        return torch.cat(shown)
