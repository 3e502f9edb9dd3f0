"""CycleGAN's networks against the layout of the authors' code, and what their tensors depend on."""

import pytest
import torch
from torch import nn

from fastgan.fuse import fuse
from fastgan.models.cyclegan import (
    PatchDiscriminator,
    ResidualBlock,
    ResNetGenerator,
    SkipBlock,
    UNetGenerator,
    halvings,
    init_weights,
)


@pytest.mark.parametrize("size", [(8, 8), (24, 24), (28, 40)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_resnet_keeps_the_shape_of_images(size, channels):
    images = torch.randn(2, channels, *size)
    translated = ResNetGenerator(channels, features=4, blocks=2)(images)
    assert translated.shape == images.shape and translated.abs().max() <= 1


@pytest.mark.parametrize(("size", "levels"), [((24, 24), 3), ((32, 32), 5), ((32, 64), 5), ((28, 28), 2)], ids=str)
def test_the_u_net_keeps_the_shape_of_images(size, levels):
    images = torch.randn(2, 3, *size)
    network = UNetGenerator(3, features=4, levels=levels)
    assert halvings(size[0]) == levels and network.multiple == 2**levels
    translated = network(images)
    assert translated.shape == images.shape and translated.abs().max() <= 1


def test_no_more_than_eight_levels():
    assert [halvings(size) for size in (24, 128, 256, 1024)] == [3, 7, 8, 8]


def test_the_resnet_is_the_papers():
    """c7s1-64, d128, d256, R256 for each block, u128, u64, c7s1-3."""
    shapes = {key: tuple(value.shape) for key, value in ResNetGenerator(blocks=6).state_dict().items()}
    blocks = [f"model.{10 + block}.conv_block.{place}" for block in range(6) for place in (1, 5)]
    weights = {
        "model.1": (64, 3, 7, 7),
        "model.4": (128, 64, 3, 3),
        "model.7": (256, 128, 3, 3),
        **dict.fromkeys(blocks, (256, 256, 3, 3)),
        "model.16": (256, 128, 3, 3),
        "model.19": (128, 64, 3, 3),
        "model.23": (3, 64, 7, 7),
    }
    biases = {key: (shape[1] if key in {"model.16", "model.19"} else shape[0],) for key, shape in weights.items()}
    expected = {f"{key}.weight": shape for key, shape in weights.items()}
    assert shapes == expected | {f"{key}.bias": shape for key, shape in biases.items()}


def test_the_u_net_doubles_its_channels_up_to_eight_times_and_joins_the_skips():
    blocks = [block for block in UNetGenerator(features=4, levels=8).modules() if isinstance(block, SkipBlock)]
    downs = [next(layer for layer in block.model if isinstance(layer, nn.Conv2d)) for block in blocks]
    ups = [next(layer for layer in block.model if isinstance(layer, nn.ConvTranspose2d)) for block in blocks]
    assert [down.out_channels for down in downs] == [4, 8, 16, 32, 32, 32, 32, 32]
    assert [up.in_channels for up in ups] == [8, 16, 32, 64, 64, 64, 64, 32]
    assert [up.out_channels for up in ups] == [3, 4, 8, 16, 32, 32, 32, 32]


def receptive_field(network, size):
    """The side of the square of pixels that the gradient of the middle score reaches, with norms left out."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm2d):
                setattr(module, name, nn.Identity())
    images = torch.randn(1, 3, size, size, requires_grad=True)
    scores = network(images)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    return int(rows[-1] - rows[0] + 1)


def test_a_score_sees_a_patch_of_70_pixels():
    assert receptive_field(PatchDiscriminator(features=4), 256) == 70


@pytest.mark.parametrize(("size", "scores"), [((24, 24), (1, 1)), ((32, 45), (2, 3)), ((256, 256), (30, 30))], ids=str)
def test_the_discriminator_scores_patches(size, scores):
    assert PatchDiscriminator(features=2)(torch.randn(2, 3, *size)).shape == (2, 1, *scores)


def test_the_discriminator_is_c64_c128_c256_c512():
    convs = [layer for layer in PatchDiscriminator().model if isinstance(layer, nn.Conv2d)]
    assert [(conv.out_channels, conv.stride[0]) for conv in convs] == [(64, 2), (128, 2), (256, 2), (512, 1), (1, 1)]
    assert [type(layer).__name__ for layer in PatchDiscriminator().model[:5]] == [
        "Conv2d",
        "LeakyReLU",
        "Conv2d",
        "InstanceNorm2d",
        "LeakyReLU",
    ]


def test_a_residual_block_adds_to_its_input():
    torch.manual_seed(0)
    block, x = ResidualBlock(4), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(block(x) - x, block.conv_block(x))
    torch.testing.assert_close(block.conv_block(x).mean((2, 3)), torch.zeros(2, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("network", [ResNetGenerator, UNetGenerator, PatchDiscriminator])
def test_an_image_comes_out_the_same_in_any_batch(network):
    torch.manual_seed(0)
    model = network(3, 4, *({ResNetGenerator: [2], UNetGenerator: [3]}.get(network, []))).apply(init_weights)
    images = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [ResNetGenerator, UNetGenerator, PatchDiscriminator])
def test_fusing_computes_the_same(network):
    torch.manual_seed(0)
    model = network(3, 4, *({ResNetGenerator: [2], UNetGenerator: [3]}.get(network, []))).apply(init_weights)
    images = torch.randn(2, 3, 24, 24)
    expected = model(images)
    torch.testing.assert_close(fuse(model)(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [ResNetGenerator, UNetGenerator, PatchDiscriminator])
def test_init_weights_draws_from_the_papers_distribution(network):
    torch.manual_seed(0)
    model = network().apply(init_weights)
    weights = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name.endswith("weight")])
    assert weights.mean().abs() < 1e-4 and 0.0199 < weights.std() < 0.0201
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
