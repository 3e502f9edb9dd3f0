"""StyleGAN's networks: their shapes and sizes, what a layer computes, growing, mixing and truncation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fastgan.fuse import fuse
from fastgan.models.stylegan import (
    Blur,
    Discriminator,
    EqualConv2d,
    EqualLinear,
    Generator,
    LayerEpilogue,
    MinibatchStddev,
    PixelNorm,
    mix,
    shrink,
)

SMALL = {"image_size": 32, "channels": 1, "latent_dim": 6, "w_dim": 5, "mapping_layers": 2, "features": 8}


@pytest.fixture
def generator():
    """In evaluation, with weights of noise and a mean of w that are not zero."""
    network = Generator(**SMALL).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("noise_weight"):
            nn.init.normal_(parameter)
    network.w_avg.normal_()
    return network


@pytest.fixture
def discriminator():
    return Discriminator(32, channels=1, features=8)


def latents(count=4):
    return torch.randn(count, SMALL["latent_dim"])


@pytest.mark.parametrize("resolution", [8, 16, 32])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_both_networks_work_at_each_resolution_that_they_grow_through(generator, discriminator, resolution, alpha):
    for network in (generator, discriminator):
        network.grow(resolution, alpha)
    images = generator(latents())
    assert images.shape == (4, 1, resolution, resolution)
    assert discriminator(images).shape == (4, 1)


def test_the_networks_have_the_paper_s_size():
    """Karras et al., section 2: 26.2 million parameters for faces of 1024×1024, with a mapping of 8 layers."""
    with torch.device("meta"):
        generator, discriminator = Generator(1024), Discriminator(1024)
    assert round(sum(p.numel() for p in generator.parameters()) / 1e6, 1) == 26.2
    assert [block.conv.out_channels for block in generator.blocks] == [512, 512, 512, 512, 256, 128, 64, 32, 16]
    assert [layers[0].out_channels for layers in discriminator.from_rgb] == [512, 512, 512, 512, 256, 128, 64, 32, 16]
    assert generator.layers == 18
    assert [layer.lr_multiplier for layer in generator.mapping if isinstance(layer, EqualLinear)] == [0.01] * 8


def test_an_epilogue_is_the_paper_s():
    epilogue = LayerEpilogue(3, 8, w_dim=5)
    for parameter in epilogue.parameters():
        nn.init.normal_(parameter)
    x, w, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 5), torch.randn(2, 1, 8, 8)
    result = epilogue(x, w, noise)
    style = w @ epilogue.style.weight.T / math.sqrt(5) + epilogue.style.bias
    for image in range(2):
        for channel in range(3):
            plane = x[image, channel] + epilogue.noise_weight[channel] * noise[image, 0] + epilogue.bias[channel]
            plane = torch.where(plane > 0, plane, 0.2 * plane)
            plane = (plane - plane.mean()) / (plane.var(correction=0) + 1e-8).sqrt()
            expected = (1 + style[image, channel]) * plane + style[image, 3 + channel]
            torch.testing.assert_close(result[image, channel], expected, rtol=1e-4, atol=1e-5)


def test_an_epilogue_can_be_traced():
    epilogue = LayerEpilogue(3, 8, w_dim=5)
    nn.init.normal_(epilogue.noise_weight)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return True

    traced = fx.GraphModule(epilogue, Tracer().trace(epilogue))
    args = torch.randn(2, 3, 8, 8), torch.randn(2, 5), torch.randn(2, 1, 8, 8)
    assert torch.equal(traced(*args), epilogue(*args))


def test_equalised_layers_keep_the_variance_and_learn_at_their_multiplier():
    linear, conv = EqualLinear(512, 512, lr_multiplier=0.01), EqualConv2d(64, 64, 3, bias=False)
    assert linear.weight.std().item() == pytest.approx(100, rel=0.05)
    assert conv.weight.std().item() == pytest.approx(1, rel=0.05)
    y = F.leaky_relu(linear(torch.randn(256, 512)), 0.2)
    assert y.square().mean().item() == pytest.approx(1.04, rel=0.1)  # (1 + 0.2²) / 2 · 2
    y = conv(torch.randn(4, 64, 16, 16))[..., 1:-1, 1:-1]
    assert y.square().mean().item() == pytest.approx(2, rel=0.1)
    before = linear.bias.detach().clone()
    linear(torch.randn(1, 512)).sum().backward()
    torch.testing.assert_close(linear.bias.grad, torch.full_like(before, 0.01))


def test_the_blur_keeps_the_mean_and_the_norm_the_length():
    x = torch.zeros(1, 2, 5, 5)
    x[0, 0, 2, 2] = 16
    expected = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    blurred = Blur()(x)
    assert torch.equal(blurred[0, 0, 1:4, 1:4], expected) and blurred.sum() == 16
    torch.testing.assert_close(PixelNorm()(torch.randn(3, 7)).square().mean(1), torch.ones(3))


@pytest.mark.parametrize(("count", "size"), [(8, 4), (6, 3), (10, 2), (7, 1)])
def test_the_deviation_is_that_of_groups_of_at_most_four_which_fit_the_batch(count, size):
    x = torch.randn(count, 3, 4, 4)
    y = MinibatchStddev()(x)
    assert torch.equal(y[:, :3], x)
    for row in range(count):
        group = x[row % (count // size) :: count // size]
        expected = (group.var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(y[row, 3], expected.expand(4, 4), rtol=1e-4, atol=1e-6)


def test_fading_in_starts_at_the_doubled_images_of_the_resolution_before_and_ends_at_those_of_the_next(generator):
    z = latents()
    images = {}
    for stage in ((8, 1.0), (16, 0.0), (16, 0.25), (16, 1.0)):
        generator.grow(*stage)
        images[stage] = generator(z)
    doubled = images[8, 1.0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(images[16, 0.0], doubled)
    blended = 0.75 * doubled + 0.25 * images[16, 1.0]
    torch.testing.assert_close(images[16, 0.25], blended)
    assert not torch.allclose(doubled, images[16, 1.0])


def test_a_discriminator_that_starts_to_fade_scores_the_halved_images_as_before(discriminator):
    images = torch.randn(4, 1, 16, 16)
    discriminator.grow(8)
    before = discriminator(F.avg_pool2d(images, 2))
    discriminator.grow(16, 0.0)
    torch.testing.assert_close(discriminator(images), before)
    discriminator.grow(16, 0.5)
    assert not torch.allclose(discriminator(images), before)


def test_real_images_are_shrunk_as_the_networks_fade():
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(shrink(images, 32), images)
    assert torch.equal(shrink(images, 8), F.avg_pool2d(images, 4))
    doubled = F.avg_pool2d(images, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(shrink(images, 16, 0.0), doubled)
    torch.testing.assert_close(shrink(images, 16, 0.5), 0.5 * doubled + 0.5 * F.avg_pool2d(images, 2))


def test_layers_that_have_not_grown_get_no_gradient(generator, discriminator):
    for network in (generator, discriminator):
        network.grow(8)
    discriminator(generator(latents())).sum().backward()
    assert all(p.grad is None for p in generator.blocks[2].parameters())
    assert all(p.grad is None for p in discriminator.from_rgb[3].parameters())
    assert all(p.grad is not None for p in generator.blocks[1].parameters())


@pytest.mark.parametrize("crossover", [1, 4, 7])
def test_mixing_takes_the_first_layers_styles_of_one_and_the_others_of_the_other(generator, crossover):
    z, other = latents(), latents()
    seen = []
    for module in generator.modules():
        if isinstance(module, LayerEpilogue):
            module.register_forward_hook(lambda _, args, __: seen.append(args[1]))
    mixed = generator(z, other, crossover)
    assert len(seen) == generator.layers == 8
    w, w_other = generator.mapping(z), generator.mapping(other)
    for layer, style in enumerate(seen):
        torch.testing.assert_close(style, w if layer < crossover else w_other)
    assert torch.equal(mixed, generator.synthesise(mix(generator.styles(z), generator.styles(other), crossover)))
    assert torch.equal(generator(z, z, crossover), generator(z))


def test_truncation_draws_every_style_to_the_mean(generator):
    z = latents()
    mean = generator.synthesise(generator.w_avg.expand(4, generator.layers, -1))
    assert torch.equal(generator.synthesise(generator.styles(z, truncation=0.0)), mean)
    assert torch.equal(generator.synthesise(generator.styles(z, truncation=1.0)), generator(z))
    half = generator.styles(z, truncation=0.5)
    torch.testing.assert_close(half, (generator.styles(z) + generator.w_avg) / 2)
    assert not torch.allclose(generator(z)[0], generator(z)[1])


def test_the_mean_of_w_follows_training_and_rests_in_evaluation(generator):
    z, before = latents(), generator.w_avg.clone()
    generator(z)
    assert torch.equal(generator.w_avg, before)
    generator.train()(z)
    torch.testing.assert_close(generator.w_avg, 0.995 * before + 0.005 * generator.mapping(z).mean(0))


def test_noise_is_new_in_training_and_the_layers_own_in_evaluation(generator):
    z = latents()
    assert torch.equal(generator(z), generator(z))
    torch.testing.assert_close(generator(z)[:1], generator(z[:1]), msg="an image depends on its neighbours")
    generator.train()
    assert not torch.allclose(generator(z), generator(z))


@pytest.mark.parametrize("network", [Generator(**SMALL), Discriminator(32, channels=1, features=8)])
def test_fusing_computes_the_same(network):
    x = latents() if isinstance(network, Generator) else torch.randn(4, 1, 32, 32)
    network.eval()
    expected = network(x)
    torch.testing.assert_close(fuse(network)(x), expected, rtol=1e-4, atol=1e-5)


def test_stages_that_do_not_exist_are_refused(generator):
    with pytest.raises(ValueError, match="resolution must be one of 8, 16, 32, not 64"):
        generator.grow(64)
    with pytest.raises(ValueError, match=r"alpha must be from 0 to 1, not 1\.5"):
        generator.grow(16, 1.5)
    with pytest.raises(ValueError, match="image_size must be a power of two"):
        Generator(24)
