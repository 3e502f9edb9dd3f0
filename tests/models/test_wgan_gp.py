"""WGAN-GP's networks: their shapes, sizes, and what a penalty asks of them."""

import pytest
import torch
from torch import nn

from fastgan.fuse import fuse
from fastgan.models.wgan_gp import Critic, ResidualBlock, ResidualCritic, ResidualGenerator, init_residual


@pytest.mark.parametrize("image_size", [8, 16, 32, 64])
def test_networks_fit_any_power_of_two(image_size):
    noise = torch.randn(2, 128, 1, 1)
    images = ResidualGenerator(image_size, channels=1, features=8)(noise)
    assert images.shape == (2, 1, image_size, image_size) and images.abs().max() <= 1
    for critic in (ResidualCritic, Critic):
        assert critic(image_size, channels=1, features=8)(images).numel() == 2


def test_the_residual_pair_has_the_paper_s_size_on_cifar():
    """Gulrajani et al., table 3: 128 features throughout, three doublings up, two halvings and two plain blocks down."""
    generator, critic = ResidualGenerator(), ResidualCritic()
    blocks = [block for block in generator.main if isinstance(block, ResidualBlock)]
    assert len(blocks) == 3 and all(isinstance(block.main[2], nn.Upsample) for block in blocks)
    resamples = [any(isinstance(layer, nn.AvgPool2d) for layer in block.main) for block in critic.main[:-1]]
    assert resamples == [True, True, False, False]
    assert {m.out_channels for m in critic.modules() if isinstance(m, nn.Conv2d)} == {128}


@pytest.mark.parametrize("norm", ["none", "layer", "instance"])
@pytest.mark.parametrize("critic", [Critic, ResidualCritic])
def test_a_score_depends_on_its_own_image_only(critic, norm):
    torch.manual_seed(0)
    network = critic(16, features=8, norm=norm)
    images = torch.randn(3, 3, 16, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(network(images).flatten()[0], images)
    assert grad[0].abs().sum() > 0 and grad[1:].abs().sum() == 0


def test_batch_norm_makes_every_score_depend_on_every_image():
    images = torch.randn(3, 3, 16, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(Critic(16, features=8, norm="batch")(images).flatten()[0], images)
    assert grad[1:].abs().sum() > 0


@pytest.mark.parametrize("network", [ResidualGenerator, ResidualCritic])
def test_fusing_computes_the_same(network):
    torch.manual_seed(0)
    model = network(16, features=16).apply(init_residual)
    shape = (4, 128, 1, 1) if network is ResidualGenerator else (4, 3, 16, 16)
    x = torch.randn(shape)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm must be one of none, layer, instance, batch, not 'group'"):
        Critic(norm="group")
