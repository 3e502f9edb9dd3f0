"""AdaIN, LayerEpilogue, StyledConv and NoiseInjection do what the reference network does, in its parameters."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgan.models import stylegan
from fastgan.nn import AdaIN, LayerEpilogue, NoiseInjection, StyledConv


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def loaded(module, reference, prefix=""):
    """`module` with the parameters of `reference`, whose keys begin with `prefix` here."""
    module.load_state_dict({prefix + key: value for key, value in reference.state_dict().items()}, strict=not prefix)
    return module


def inputs(count=3, channels=4, resolution=8, w_dim=5):
    """x, w and noise in float64."""
    sizes = (count, channels, resolution, resolution), (count, w_dim), (count, 1, resolution, resolution)
    return [torch.randn(size, dtype=torch.float64, requires_grad=size is not sizes[2]) for size in sizes]


def both_orders(module, x, w, *noise):
    """y, the gradients of path length's and R1's first pass, and those that their penalty gives the parameters."""
    y = module(x, w, *noise)
    first = torch.autograd.grad(y.pow(3).sum(), [x, w], create_graph=True)
    return [y, *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), [x, w, *module.parameters()])]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("noise_batch", [1, 3])
def test_an_epilogue_is_the_reference_networks_to_the_second_derivative(noise_batch, training):
    plain = randomised(stylegan.LayerEpilogue(4, 8, 5)).train(training)
    fast = loaded(LayerEpilogue(4, 8, 5).double(), plain).train(training)
    x, w, noise = inputs()
    found, expected = (both_orders(module, x, w, noise[:noise_batch]) for module in (fast, plain))
    torch.testing.assert_close(found, expected)


def test_an_epilogues_checkpoints_load_both_ways():
    plain, fast = randomised(stylegan.LayerEpilogue(4, 8, 5)), randomised(LayerEpilogue(4, 8, 5))
    assert list(plain.state_dict()) == list(fast.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in fast.named_parameters()]
    plain.load_state_dict(fast.state_dict())
    x, w, noise = inputs()
    torch.testing.assert_close(fast(x, w, noise), plain(x, w, noise))


def test_without_noise_an_epilogue_draws_in_training_and_has_its_own_in_evaluation():
    plain = randomised(stylegan.LayerEpilogue(4, 8, 5))
    epilogue = loaded(LayerEpilogue(4, 8, 5).double(), plain)
    x, w, _ = inputs()
    assert not torch.equal(epilogue(x, w), epilogue(x, w))
    torch.manual_seed(3)
    drawn = epilogue(x, w)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, plain(x, w, torch.randn(3, 1, 8, 8, dtype=torch.float64)))
    epilogue.eval()
    assert torch.equal(epilogue(x, w), epilogue(x, w))
    torch.testing.assert_close(epilogue(x, w), plain(x, w))


def test_adain_is_an_epilogue_without_noise_bias_and_activation():
    layer = randomised(AdaIN(4, 5))
    x, w, _ = inputs()

    def plain(x, w):
        scale, shift = (w @ layer.style.weight.T / 5**0.5 + layer.style.bias)[..., None, None].chunk(2, 1)
        return (scale + 1) * F.instance_norm(x, eps=1e-8) + shift

    torch.testing.assert_close(layer(x, w), plain(x, w))
    for found, expected in zip(
        torch.autograd.grad(layer(x, w).pow(2).sum(), [x, w, *layer.parameters()]),
        torch.autograd.grad(plain(x, w).pow(2).sum(), [x, w, *layer.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer(x, w[:1]), layer(x, w[:1].expand(3, -1)))


@pytest.mark.parametrize("upsample", [True, False])
def test_a_styled_convolution_is_a_blocks_half(upsample):
    block = randomised(stylegan.SynthesisBlock(6, 4, 8, w_dim=5))
    conv, epilogue = (block.up, block.epilogue1) if upsample else (block.conv, block.epilogue2)
    fast = StyledConv(6 if upsample else 4, 4, 8, w_dim=5, upsample=upsample).double()
    fast.conv.load_state_dict((conv[1] if upsample else conv).state_dict())
    loaded(fast.epilogue, epilogue)
    x, w, noise = inputs(channels=6 if upsample else 4, resolution=4 if upsample else 8)
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.epilogue = conv, epilogue

        def forward(self, x, w, noise):
            return self.epilogue(self.conv(x), w, noise)

    found, expected = (both_orders(module, x, w, noise) for module in (fast, Plain()))
    torch.testing.assert_close(found, expected)


def test_noise_is_injected_by_a_weight_for_each_channel():
    layer = NoiseInjection(4)
    x, _, noise = (t.detach() for t in inputs())
    assert torch.equal(layer(x), x)  # before training
    nn.init.normal_(layer.noise_weight)
    torch.testing.assert_close(layer(x, noise), x + layer.noise_weight.view(4, 1, 1) * noise)
    drawn = (layer(x) - x) / layer.noise_weight.view(4, 1, 1)
    torch.testing.assert_close(drawn, drawn[:, :1].expand_as(drawn))
    assert not torch.equal(layer(x), layer(x))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_narrow_styles_for_wide_images_too(dtype):
    """The constant that StyleGAN begins with is float32, the output of a convolution is not."""
    epilogue = randomised(LayerEpilogue(4, 8, 5)).float().eval()
    x, w, _ = (t.detach().float() for t in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        y = epilogue(x.to(dtype), w)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), epilogue(x, w), rtol=3e-2, atol=0.15)


def test_copies_compute_the_same():
    x, w, noise = inputs()
    for layer in (LayerEpilogue(4, 8, 5), StyledConv(4, 4, 8, 5)):
        layer = randomised(layer)
        assert torch.equal(copy.deepcopy(layer)(x, w, noise), layer(x, w, noise))
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x, w, noise), layer(x, w, noise))


@pytest.mark.parametrize("width", [4, 6])
def test_bad_input_is_named(width):
    epilogue = LayerEpilogue(4, 8, 5)
    x, w, noise = (t.detach().float() for t in inputs())
    for bad in (w[:2], w[:, :4], w[0]):
        with pytest.raises(ValueError, match=r"w must have shape \(3, 5\), one for each of x, not"):
            epilogue(x, bad, noise)
    with pytest.raises(ValueError, match=r"noise must have shape \(3, 1, 8, 8\)"):
        epilogue(x, w, x)
    with pytest.raises(ValueError, match=r"scale must have shape \(3, 6\)"):
        epilogue(torch.randn(3, 6, 8, 8), w, noise)
    with pytest.raises(ValueError, match=rf"noise must have shape \(1, 1, {width}, {width}\)"):
        epilogue.eval()(torch.randn(3, 4, width, width), w)
