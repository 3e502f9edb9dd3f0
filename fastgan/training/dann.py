"""Domain-adversarial training (Ganin & Lempitsky, 2015), between the two bounds that the paper gives it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from fastgan.models.dann import Classifier, DomainHead
from fastgan.nn import GradientReversal
from fastgan.training import dcgan
from fastgan.training.data import ImageSet, Labelled, to_floats
from fastgan.training.domains import LARGEST, load_domains
from fastgan.training.images import Grid, scatter
from fastgan.training.processes import Processes
from fastgan.training.system import Score, Settings, System, adam, require, require_count, set_lr

SHOWN = 300
"""Images of each domain whose features are drawn."""

CHUNK = 250
"""Images whose features are computed at once."""

CLASS_COLORS = tuple(f"hsl({36 * digit}, 75%, 45%)" for digit in range(10))
DOMAIN_COLORS = ("royalblue", "firebrick")


@dataclass(frozen=True)
class DANNSettings(Settings):
    """`Settings`, and those of domain-adversarial training."""

    sources: ClassVar[tuple[str, ...]] = ()

    image_size: int = 28
    batch_size: int = 32
    lr: float = 0.003
    features: int = 32

    def load(self) -> list[ImageSet]:
        domains = load_domains(self.image_size)
        return [domains.source, domains.target]

    def check(self) -> None:
        super().check()
        fits = 16 <= self.image_size <= LARGEST and self.image_size % 4 == 0
        require(fits, "--image-size", self.image_size, f"a multiple of 4 from 16 to {LARGEST}")
        require(self.batch_size >= 2, "--batch-size", self.batch_size, "2 or more, as batch norm needs")
        require_count("--features", self.features)


class DANN(System[DANNSettings]):
    """A classifier that is adapted to the target domain without its labels, and beside it, on the same batches, two that are
    not: one learns from the source alone, which adapting has to surpass, and one from the target's labels."""

    name = "dann"
    settings_type = DANNSettings
    epochs = 20
    draws = 2

    def __init__(self, settings: DANNSettings, channels: int, accelerator: Processes):
        super().__init__(settings, channels, accelerator)

        def classifier() -> Classifier:
            return Classifier(settings.image_size, channels, settings.features)

        self.source_only, self.adapted, self.on_target = classifier(), classifier(), classifier()
        self.coeff = torch.zeros((), device=accelerator.device)
        self.reversal = GradientReversal(self.coeff)
        self.domains = nn.Sequential(self.reversal, *DomainHead(self.adapted.width))
        self.networks = {
            "source_only": self.source_only, "adapted": self.adapted, "domains": self.domains, "on_target": self.on_target,
        }  # fmt: skip
        for network in self.networks.values():
            network.to(accelerator.device)
        self.optimizers = {name: adam(network, settings.lr, (0.9, 0.999)) for name, network in self.networks.items()}

    def begin_step(self, step: int, steps: int) -> None:
        """The paper's schedules of its section 4, in the part p of the steps that is done: λ = 2 / (1 + exp(−10 p)) − 1, and
        the learning rate falls as (1 + 10 p)^−0.75."""
        done = step / steps
        self.coeff.fill_(2 / (1 + math.exp(-10 * done)) - 1)
        for optimizer in self.optimizers.values():
            set_lr(optimizer, self.settings.lr * (1 + 10 * done) ** -0.75)

    def launch(self, source: Labelled, target: Labelled) -> dict[str, Tensor]:
        """One update of each classifier, and of the domain head."""
        metrics = self.adapt(source, target.images)
        return metrics | self.learn("source_only", source) | self.learn("on_target", target)

    def adapt(self, source: Labelled, target: Tensor) -> dict[str, Tensor]:
        """Descends the loss of the labels plus that of the domains, which the features, behind the reversal, ascend.

        Each domain goes through the batch norms of the features on its own, and both through the head's together: it has to
        tell them apart.
        """
        self.optimizers["adapted"].zero_grad()
        self.optimizers["domains"].zero_grad()
        with self.accelerator.autocast():
            features = [self.adapted.features(images) for images in (source.images, target)]
            logits = self.adapted.labels(features[0])
            of_source, of_target = self.domains(torch.cat(features)).float().chunk(2)
        loss = cross_entropy(logits.float(), source.labels)
        loss_domains = (dcgan.cross_entropy(of_source, 1) + dcgan.cross_entropy(of_target, 0)) / 2
        (loss + loss_domains).backward()
        return {
            "loss_adapted": loss.detach(),
            "loss_domains": loss_domains.detach(),
            "grad_norm_adapted": self.update("adapted"),
            "grad_norm_domains": self.update("domains"),
        }

    def learn(self, name: str, batch: Labelled) -> dict[str, Tensor]:
        """Descends the loss of a classifier on one domain."""
        self.optimizers[name].zero_grad()
        loss = cross_entropy(self.judge(self.networks[name], batch.images), batch.labels)
        loss.backward()
        return {f"loss_{name}": loss.detach(), f"grad_norm_{name}": self.update(name)}

    def scores(self, sets: Sequence[ImageSet]) -> dict[str, Score]:
        """Accuracies on the target's test set, which nothing has learned from."""
        test = load_domains(self.settings.image_size).test
        images, labels = _all_of(test, len(test), self.accelerator.device)
        shown = {"source only": self.source_only, "adapted": self.adapted, "trained on target": self.on_target}
        return {
            f"accuracy, {name}": Score(
                (_evaluated(network, images).argmax(1) == labels).float().mean().item(), "{:.1%}"
            )
            for name, network in shown.items()
        }

    def sample_grid(self, sets: Sequence[ImageSet]) -> Callable[[], Grid]:
        """The first two principal components of features: above before adaptation, which is of the classifier that knows the
        source only, below after it; on the left the domains in colours, source in blue, on the right the classes."""
        parts = [_all_of(images, SHOWN, self.accelerator.device) for images in sets]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        domains = [color for part, color in zip(parts, DOMAIN_COLORS, strict=True) for _ in part.labels]
        classes = [CLASS_COLORS[label] for label in labels.tolist()]

        def draw() -> Grid:
            plots = []
            for network in (self.source_only, self.adapted):
                points = principal_components(_evaluated(network, images, network.features))
                plots += [scatter(points, domains), scatter(points, classes)]
            return Grid(torch.stack(plots), columns=2)

        return draw


def _all_of(images: ImageSet, count: int, device: torch.device) -> Labelled:
    """`count` images of a set, evenly spread over it, and their labels."""
    assert images.labels is not None
    rows = torch.linspace(0, len(images) - 1, min(count, len(images))).long().numpy()
    pixels, labels = torch.from_numpy(images[rows]), torch.from_numpy(images.labels[rows])
    return Labelled(to_floats(pixels.to(device)), labels.to(device))


def _evaluated(network: nn.Module, images: Tensor, part: nn.Module | None = None) -> Tensor:
    """What a network, or a part of it, makes of images in evaluation, in float32."""
    network.eval()
    with torch.no_grad():
        results = torch.cat([(part or network)(chunk) for chunk in images.split(CHUNK)])
    network.train()
    return results.float()


def principal_components(features: Tensor) -> Tensor:
    """(N, width) features as (N, 2) coordinates along the two directions in which they differ most; of a width of one the
    second are 0."""
    centred = features - features.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    return pad(centred @ directions.t(), (0, 2 - len(directions)))
