"""SRGAN's networks against the paper's figure 4 and torchvision's VGG19, and what their pixels depend on."""

import pytest
import torch
from torch import nn

from fastgan.fuse import fuse
from fastgan.models.srgan import Discriminator, Generator, ResidualBlock, UpsampleBlock, VGGFeatures, init_weights


def test_srresnet_is_the_papers():
    """k9n64, 16 times k3n64 k3n64, k3n64, twice k3n256, k9n3."""
    convs = [layer for layer in Generator().modules() if isinstance(layer, nn.Conv2d)]
    found = [(conv.kernel_size[0], conv.in_channels, conv.out_channels) for conv in convs]
    assert found == [(9, 3, 64), *[(3, 64, 64)] * 33, *[(3, 64, 256)] * 2, (9, 64, 3)]
    assert all(conv.stride == (1, 1) and conv.padding == (conv.kernel_size[0] // 2,) * 2 for conv in convs)
    norms = [layer for layer in Generator().modules() if isinstance(layer, nn.BatchNorm2d)]
    activations = [layer for layer in Generator().modules() if isinstance(layer, nn.PReLU)]
    assert len(norms) == 33 and len(activations) == 1 + 16 + 2


@pytest.mark.parametrize(("scale", "doublings"), [(2, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("size", [(1, 1), (6, 9)], ids=str)
def test_images_of_any_size_grow_by_the_scale(scale, doublings, size):
    network = Generator(scale, 3, features=4, blocks=1).eval()
    assert sum(isinstance(layer, UpsampleBlock) for layer in network.modules()) == doublings
    assert network(torch.randn(2, 3, *size)).shape == (2, 3, size[0] * scale, size[1] * scale)


@pytest.mark.parametrize("scale", [0, 1, 3, 6])
def test_a_scale_that_is_no_power_of_two_is_named(scale):
    with pytest.raises(ValueError, match=f"^scale must be a power of two, 2 or more; got {scale}$"):
        Generator(scale)


def test_blocks_add_to_their_input():
    torch.manual_seed(0)
    block, x = ResidualBlock(4), torch.randn(2, 4, 6, 6)
    inside = block.bn2(block.conv2(block.prelu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x) - x, inside)


def test_the_long_skip_goes_from_the_first_activation_to_the_up_sampling():
    torch.manual_seed(0)
    network, images = Generator(4, 3, features=4, blocks=2), torch.randn(2, 3, 8, 8)
    start = network.prelu(network.conv1(images))
    end = network.bn(network.conv2(network.blocks(start)))
    torch.testing.assert_close(network(images), network.conv3(network.upsample(start + end)))


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 3])
def test_pixels_depend_on_what_lies_within_reach_and_on_all_of_it(scale, blocks):
    torch.manual_seed(0)
    network = Generator(scale, 1, features=2, blocks=blocks).eval()
    for prelu in (layer for layer in network.modules() if isinstance(layer, nn.PReLU)):
        nn.init.ones_(prelu.weight)
    side = 2 * network.reach + 9
    middle = side // 2
    images = torch.randn(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    square = network.double()(images)[..., middle * scale : (middle + 1) * scale, middle * scale : (middle + 1) * scale]
    square.sum().backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert network.reach - 1 <= middle - rows[0] <= network.reach
    assert network.reach - 1 <= rows[-1] - middle <= network.reach


def test_the_discriminator_is_the_papers():
    network = Discriminator()
    convs = [layer for layer in network.convs if isinstance(layer, nn.Conv2d)]
    expected = [(64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2)]
    assert [(conv.out_channels, conv.stride[0]) for conv in convs] == expected
    assert all(conv.kernel_size == (3, 3) for conv in convs)
    kinds = [type(layer).__name__ for layer in network.convs]
    assert kinds == ["Conv2d", "LeakyReLU"] + ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 7
    assert network.dense1.weight.shape == (1024, 512 * 6 * 6) and network.dense2.weight.shape == (1, 1024)
    assert all(layer.negative_slope == 0.2 for layer in network.modules() if isinstance(layer, nn.LeakyReLU))


@pytest.mark.parametrize("size", [16, 32, 48])
def test_the_discriminator_scores_images_of_its_size(size):
    assert Discriminator(size, 3, features=2)(torch.randn(2, 3, size, size)).shape == (2, 1)


@pytest.mark.parametrize("size", [0, 8, 40])
def test_sizes_that_do_not_halve_are_named(size):
    with pytest.raises(ValueError, match=f"^image_size must be a multiple of 16; got {size}$"):
        Discriminator(size)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_fusing_computes_the_same(training):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    for network in (Generator(4, 3, features=4, blocks=2), Discriminator(32, 3, features=4)):
        network.train(training)
        expected = network(images)
        torch.testing.assert_close(fuse(network)(images), expected, rtol=1e-4, atol=1e-5)


def test_residual_blocks_start_as_the_identity():
    network, x = Generator(4, 3, features=4, blocks=2).apply(init_weights), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(network.blocks(x), x, rtol=0, atol=0)
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(block.bn2.weight.grad.any() for block in network.blocks)


TORCHVISION = {
    0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256), 16: (256, 256),
    19: (512, 256), 21: (512, 512), 23: (512, 512), 25: (512, 512), 28: (512, 512), 30: (512, 512), 32: (512, 512),
    34: (512, 512),
}  # fmt: skip
"""The convolutions of torchvision's `vgg19().features`."""


def test_vgg_has_torchvisions_keys_and_ends_after_the_activation_of_conv5_4():
    with torch.device("meta"):
        network = VGGFeatures()
    expected = {}
    for place, shape in TORCHVISION.items():
        expected |= {f"features.{place}.weight": (*shape, 3, 3), f"features.{place}.bias": shape[:1]}
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == expected
    pools = [place for place, layer in enumerate(network.features) if isinstance(layer, nn.MaxPool2d)]
    assert pools == [4, 9, 18, 27]
    assert len(network.features) == 36 and isinstance(network.features[-1], nn.ReLU)


def test_vgg_sees_images_as_torchvision_normalises_them():
    network = VGGFeatures()
    seen = []
    network.features[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.rand(1, 3, 16, 16)
    features = network(images * 2 - 1)
    assert features.shape == (1, 512, 1, 1) and (features >= 0).all()
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        torch.testing.assert_close(seen[0][:, channel], (images[:, channel] - mean) / std)
