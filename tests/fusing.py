"""What the tests of `fuse` share: a model and its fused twin, and whether they agree."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from fastgan.fuse import fuse


def batch(dtype=torch.float64, n=3, channels=4, size=8):
    return torch.randn(n, channels, size, size + 1, dtype=dtype)


class UNet(nn.Module):
    """What is seen twice ends a chain."""

    def __init__(self, channels=4):
        super().__init__()
        self.down, self.norm = nn.Conv2d(channels, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.inner, self.up = nn.Conv2d(6, 6, 3, 1, 1), nn.ConvTranspose2d(12, channels, 4, 2, 1)

    def forward(self, x):
        down = self.norm(self.down(x))
        inner = F.relu(self.inner(F.leaky_relu(down, 0.2)), inplace=True)
        return self.up(torch.cat([down, inner], 1))


def twins(make, dtype=torch.float64):
    """(stock, fused), initialised alike, with norms whose parameters do something."""
    torch.manual_seed(0)
    stock = make().to(dtype)
    for module in stock.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            for parameter, mean in ((module.weight, 1.0), (module.bias, 0.0)):
                if parameter is not None:
                    nn.init.normal_(parameter, mean, 0.2)
    return stock, fuse(copy.deepcopy(stock))


def penalised_loss(model, x):
    """A loss that holds a gradient penalty, so that its gradient takes second derivatives."""
    y = model(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y.mean() + 0.1 * slope.square().mean()


def assert_agree(stock, fused, x, steps=2):
    """Outputs, their layout, gradients to second order and running statistics are the same, batch after batch."""
    for step in range(steps):
        x = torch.randn_like(x)
        found = []
        for model in (stock, fused):
            model.zero_grad()
            given = x.clone().requires_grad_()
            torch.manual_seed(step)
            y = model(given)
            torch.manual_seed(step)
            penalised_loss(model, given).backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            found.append({"y": y, "x": given.grad, **grads, **dict(model.named_buffers())})
        for name, expected in found[0].items():
            torch.testing.assert_close(found[1][name], expected, rtol=1e-7, atol=1e-9, msg=f"{name}: {{}}".format)
        assert found[1]["y"].stride() == found[0]["y"].stride()


def replicate(model):
    """What nn.DataParallel does for each device."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return replicas[model]


class Asserts(nn.Module):
    """Here, because pytest rewrites the assertions of its own modules."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)), 0.5

    def forward(self, x):
        assert self.scale == 0.5, "another scale"
        assert x.size(1) == 4, f"{x.size(1)} channels"
        return x + self.body(x)
