"""SN-GAN's networks: the paper's tables, and the spectral norm of every layer of a discriminator."""

import pytest
import torch
from torch import nn

from fastgan.models.sngan import Discriminator, Generator, ResidualDiscriminator
from fastgan.models.wgan_gp import ResidualBlock


def test_the_standard_pair_is_table_3_s():
    convolutions = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in Discriminator().main[:-2:2]]
    widths = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    kernels = [(3, 1), (4, 2)] * 3 + [(3, 1)]
    assert convolutions == [(*width, *kernel) for width, kernel in zip(widths, kernels, strict=True)]
    assert Discriminator().main[-1].in_features == 4 * 4 * 512
    generator = [m for m in Generator().main if isinstance(m, (nn.ConvTranspose2d, nn.Conv2d))]
    assert [m.out_channels for m in generator] == [512, 256, 128, 64, 3]
    assert isinstance(generator[-1], nn.Conv2d) and generator[-1].kernel_size == (3, 3)


def test_the_residual_discriminator_is_table_4_s():
    network = ResidualDiscriminator()
    blocks = [block for block in network.main if isinstance(block, ResidualBlock)]
    assert [any(isinstance(m, nn.AvgPool2d) for m in block.main) for block in blocks] == [True, True, False, False]
    images = torch.randn(2, 3, 32, 32)
    network.eval()
    torch.testing.assert_close(network(images), network.end(network.main(images).sum((2, 3))))


@pytest.mark.parametrize("kind", [Discriminator, ResidualDiscriminator])
def test_no_layer_of_a_discriminator_stretches_what_it_is_given(kind):
    torch.manual_seed(0)
    network = kind(16, features=8)
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for _ in range(50):
        network(torch.randn(2, 3, 16, 16))
    network.eval()
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        torch.testing.assert_close(largest, torch.tensor(1.0), rtol=0.05, atol=0)


@pytest.mark.parametrize("image_size", [8, 16, 64])
def test_networks_fit_any_power_of_two(image_size):
    images = Generator(image_size, channels=1, latent_dim=5, features=4)(torch.randn(2, 5, 1, 1))
    assert images.shape == (2, 1, image_size, image_size) and images.abs().max() <= 1
    assert Discriminator(image_size, channels=1, features=4)(images).shape == (2, 1)
