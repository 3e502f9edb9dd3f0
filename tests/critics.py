"""Critics of every kind, and what a penalty through them leaves in their parameters."""

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import fuse
from fastgan.models.dcgan import Discriminator

SIZE = 16
"""Of the images, which have 3 channels, for all critics but DCGAN's."""


def conv(inputs, outputs, kernel=3, stride=1, **settings):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, **settings)


class Residual(nn.Module):
    """Gulrajani's, in small: average pools, shortcuts, a mean at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.shortcut = conv(3, 6), conv(3, 6, 1)
        self.blocks = nn.ModuleList([conv(6, 6), conv(6, 6), conv(6, 6)])
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        h = F.avg_pool2d(self.blocks[0](F.relu(self.first(x))), 2) + self.shortcut(F.avg_pool2d(x, 2))
        h = h + self.blocks[2](F.relu(self.blocks[1](F.relu(h))))
        return self.head(F.relu(h).mean((2, 3)))


class Shared(nn.Module):
    """A layer used three times, once in place of its own output."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = conv(3, 4), conv(4, 4), conv(4, 1)

    def forward(self, x):
        h = F.leaky_relu_(self.first(x), 0.2)
        for _ in range(3):
            h = h + F.relu(self.shared(h), inplace=True)
        return self.last(h)


class Careless(nn.Module):
    """Writes into what it has made, looks at memory, uses methods for functions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = conv(3, 4, 3, 2), conv(4, 4), nn.Linear(4 * 8 * 8, 1)

    def forward(self, x):
        h = self.first(x)
        half = h[:, :2]
        half.mul_(0.5)
        h = h.relu_() + F.hardtanh(h).mul_(3)
        h = F.leaky_relu(self.second(h), 0.2)
        h *= 2
        kept = h
        h += 0.1
        assert h.is_contiguous()
        torch.relu_(h[:, 1:])
        h = torch.cat([h[:, :2].relu(), kept[:, 2:]], 1)
        return self.head(h.view(len(h), -1))


class Accumulating(nn.Module):
    """Adds to what a norm returns, in place, once it has been looked at."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.shortcut, self.last = conv(3, 4), norm, conv(3, 4, 1), conv(4, 1)

    def forward(self, x):
        h = self.norm(self.first(x))
        assert h.is_contiguous()
        h += self.shortcut(x)
        return self.last(F.leaky_relu(h, 0.2))


class Conditional(nn.Module):
    """A projection discriminator; the classes also come as an image that another convolution reads."""

    def __init__(self):
        super().__init__()
        self.classes, self.images = nn.Embedding(5, SIZE * SIZE), conv(1, 3)
        self.first, self.second, self.project, self.head = (
            conv(6, 4, 4, 2),
            conv(4, 8),
            nn.Embedding(5, 8),
            nn.Linear(8, 1),
        )

    def forward(self, x, classes, *, scale):
        image = F.relu(self.images(self.classes(classes).view(-1, 1, SIZE, SIZE)))
        h = F.leaky_relu(self.first(torch.cat([x, image], 1)), 0.2)
        h = F.relu6(self.second(h)).sum((2, 3))
        return scale * (self.head(h) + (self.project(classes) * h).sum(1, keepdim=True)), h


class Unusual(nn.Module):
    """What has no lean operator, between what has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            conv(3, 4), nn.SiLU(), nn.ReflectionPad2d(1), conv(4, 4, padding_mode="circular"), nn.MaxPool2d(2), nn.ELU(),
            nn.ConvTranspose2d(4, 4, 3, 1, 1, output_padding=1, dilation=2), nn.Hardtanh(), nn.GroupNorm(2, 4),
            nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), nn.Softplus(), nn.Upsample(scale_factor=2),
            nn.Conv2d(6, 4, 3, padding="same", dilation=2), nn.Dropout(0.0), nn.PixelShuffle(2), nn.Flatten(2),
            nn.Conv1d(1, 2, 3, 2), nn.Tanh(), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x):
        h = self.layers(x[:, :, :9, :9])
        return F.layer_norm(h, h.shape[1:]).square().mean(1) + h.abs().mean(1)


def plain(*activations: Callable[[], nn.Module], norm: Callable[[int], nn.Module] | None = None, **settings):
    """Strided convolutions, each with an activation."""
    layers: list[nn.Module] = []
    channels = 3
    for i, activation in enumerate(activations):
        layers.append(nn.Conv2d(channels, 4 * (i + 1), 4, 2, 1, **settings))
        layers += [norm(4 * (i + 1))] if norm and i else []
        layers.append(activation())
        channels = 4 * (i + 1)
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, SIZE >> len(activations)))


def spectral(normalise):
    critic = plain(lambda: nn.LeakyReLU(0.2), lambda: nn.LeakyReLU(0.2))
    for layer in critic:
        if isinstance(layer, nn.Conv2d):
            normalise(layer)
    return critic


def leaky(inplace=False):
    return lambda: nn.LeakyReLU(0.2, inplace)


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: plain(leaky(), leaky()),
    "leaky_relu in place": lambda: plain(leaky(True), leaky(True)),
    "no bias": lambda: plain(leaky(), nn.ReLU, bias=False),
    "nothing but convolutions": lambda: plain(nn.Identity, nn.Identity),
    "one layer": lambda: plain(),
    "prelu": lambda: plain(nn.PReLU, lambda: nn.PReLU(8)),
    "hardtanh and relu6": lambda: plain(nn.Hardtanh, nn.ReLU6),
    "smooth": lambda: plain(nn.Tanh, nn.GELU),
    "batch norm": lambda: plain(leaky(), leaky(True), norm=nn.BatchNorm2d),
    "batch norm in evaluation": lambda: plain(leaky(), leaky(), norm=nn.BatchNorm2d).eval(),
    "instance norm": lambda: plain(leaky(), leaky(), norm=lambda c: nn.InstanceNorm2d(c, affine=True)),
    "group norm": lambda: plain(leaky(), leaky(True), norm=lambda c: nn.GroupNorm(2, c)),
    "layer norm": lambda: plain(leaky(), leaky(True), norm=lambda c: nn.LayerNorm((c, SIZE // 4, SIZE // 4))),
    "layer norm, added to": lambda: Accumulating(nn.LayerNorm((4, SIZE, SIZE))),
    "group norm, added to": lambda: Accumulating(nn.GroupNorm(2, 4)),
    "dcgan": lambda: Discriminator(SIZE, features=4),
    "dcgan, fused": lambda: fuse(Discriminator(SIZE, features=4)),
    "dcgan, fused, in evaluation": lambda: fuse(Discriminator(SIZE, features=4)).eval(),
    "residual": Residual,
    "shared weights": Shared,
    "careless": Careless,
    "unusual": Unusual,
    "conditional": Conditional,
    "spectral norm": lambda: spectral(nn.utils.parametrizations.spectral_norm),
    "older spectral norm": lambda: spectral(nn.utils.spectral_norm),
    "a linear layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 8), nn.ReLU(), nn.Linear(8, 1)),
    "frozen": lambda: plain(leaky(), leaky()).requires_grad_(False).append(nn.PReLU()),
}


def extra(critic: nn.Module) -> tuple[tuple, dict]:
    """The arguments of a critic beside images, four of them."""
    return ((torch.tensor([0, 3, 3, 1]),), {"scale": 2.0}) if isinstance(critic, Conditional) else ((), {})


class CountConvolutions(TorchDispatchMode):
    """How many operations of a convolution's size run: a stock `convolution_backward` is one for each gradient."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "aten::convolution_backward":
            self.calls[name] += sum(args[-1][:2])
        elif name == "fastgan::convolution_backward":
            self.calls[name] += 2
        elif name in ("aten::convolution", "fastgan::convolution", "fastgan::convolution_weight_grad"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.calls.values())
