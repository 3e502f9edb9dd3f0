"""The DCGAN networks against the layout of PyTorch's DCGAN tutorial, written out here layer by layer."""

import pytest
import torch
from torch import nn

from fastgan.models.dcgan import Discriminator, Generator, init_weights

UP = {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False}
HEAD = {"kernel_size": 4, "stride": 1, "padding": 0, "bias": False}


def tutorial_generator() -> nn.Sequential:
    stages = [
        [nn.ConvTranspose2d(100, 512, **HEAD), nn.BatchNorm2d(512), nn.ReLU(True)],
        [nn.ConvTranspose2d(512, 256, **UP), nn.BatchNorm2d(256), nn.ReLU(True)],
        [nn.ConvTranspose2d(256, 128, **UP), nn.BatchNorm2d(128), nn.ReLU(True)],
        [nn.ConvTranspose2d(128, 64, **UP), nn.BatchNorm2d(64), nn.ReLU(True)],
        [nn.ConvTranspose2d(64, 3, **UP), nn.Tanh()],
    ]
    return nn.Sequential(*(layer for stage in stages for layer in stage))


def tutorial_discriminator() -> nn.Sequential:
    stages = [
        [nn.Conv2d(3, 64, **UP), nn.LeakyReLU(0.2, inplace=True)],
        [nn.Conv2d(64, 128, **UP), nn.BatchNorm2d(128), nn.LeakyReLU(0.2, inplace=True)],
        [nn.Conv2d(128, 256, **UP), nn.BatchNorm2d(256), nn.LeakyReLU(0.2, inplace=True)],
        [nn.Conv2d(256, 512, **UP), nn.BatchNorm2d(512), nn.LeakyReLU(0.2, inplace=True)],
        [nn.Conv2d(512, 1, **HEAD), nn.Sigmoid()],
    ]
    return nn.Sequential(*(layer for stage in stages for layer in stage))


def test_the_generator_is_the_tutorials():
    tutorial, model = tutorial_generator(), Generator()
    assert repr(model.main) == repr(tutorial)
    model.load_state_dict({f"main.{key}": value for key, value in tutorial.state_dict().items()})
    noise = torch.randn(2, 100, 1, 1)
    torch.testing.assert_close(model(noise), tutorial(noise), rtol=0, atol=0)


def test_the_discriminator_is_the_tutorials_without_its_sigmoid():
    tutorial, model = tutorial_discriminator(), Discriminator()
    assert repr(model.main) == repr(tutorial[:-1])
    model.load_state_dict({f"main.{key}": value for key, value in tutorial.state_dict().items()})
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(model(images).sigmoid(), tutorial(images), rtol=0, atol=0)


@pytest.mark.parametrize("image_size", [8, 16, 32, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_sizes_keep_the_rule(image_size, channels):
    generator = Generator(image_size, channels, latent_dim=7, features=4)
    discriminator = Discriminator(image_size, channels, features=4)
    images = generator(torch.randn(2, 7, 1, 1))
    assert images.shape == (2, channels, image_size, image_size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2, 1, 1, 1)
    assert generator.main[0].out_channels == discriminator.main[-1].in_channels == 4 * image_size // 8


@pytest.mark.parametrize("network", [Generator, Discriminator])
@pytest.mark.parametrize("image_size", [4, 0, -8, 48, 65])
def test_sizes_that_are_no_power_of_two_are_named(network, image_size):
    with pytest.raises(ValueError, match=f"image_size must be a power of two, 8 or more; got {image_size}"):
        network(image_size=image_size)


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_init_weights_draws_from_the_papers_distributions(network):
    torch.manual_seed(0)
    model = network()
    norms = [layer for layer in model.main if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.bias, 9.0)
    model.apply(init_weights)
    for layer in model.main[:-2]:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            assert layer.weight.mean().abs() < 0.002 and 0.019 < layer.weight.std() < 0.021
    scales = torch.cat([norm.weight for norm in norms])
    assert (scales.mean() - 1).abs() < 0.003 and 0.018 < scales.std() < 0.022
    assert not any(norm.bias.any() for norm in norms)
