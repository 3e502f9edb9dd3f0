"""EqualLinear and EqualConv2d do what the reference network's do, in its parameters."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fastgan.models import stylegan
from fastgan.nn import EqualConv2d, EqualLinear

CASES = {
    "linear": (stylegan.EqualLinear, EqualLinear, (7, 5), {}, (3, 7)),
    "linear, slow": (stylegan.EqualLinear, EqualLinear, (7, 5), {"gain": 1, "lr_multiplier": 0.01}, (3, 7)),
    "conv": (stylegan.EqualConv2d, EqualConv2d, (4, 6, 3), {}, (2, 4, 5, 7)),
    "conv, no bias": (stylegan.EqualConv2d, EqualConv2d, (4, 6, 3), {"bias": False}, (2, 4, 5, 7)),
    "conv, 1×1": (stylegan.EqualConv2d, EqualConv2d, (4, 6, 1), {"gain": 1}, (2, 4, 5, 7)),
}


def twins(case):
    """(reference, ours, x): random parameters, ours loaded from the reference's, in float64."""
    theirs, own, args, settings, shape = CASES[case]
    plain, fast = (layer(*args, **settings).double() for layer in (theirs, own))
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    fast.load_state_dict(plain.state_dict())
    return plain, fast, torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
def test_values_and_both_derivatives_are_the_reference_networks(case):
    plain, fast, x = twins(case)
    results = []
    for layer in (plain, fast):
        y = layer(x)
        first = torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), [x, *layer.parameters()])
        results.append([y, *first, *second])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_load_both_ways_and_copies_compute_the_same(case):
    plain, fast, x = twins(case)
    assert list(plain.state_dict()) == list(fast.state_dict())
    plain.load_state_dict(fast.state_dict())
    assert isinstance(fast, nn.Linear if "linear" in case else nn.Conv2d)
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    assert torch.equal(pickle.loads(pickle.dumps(fast))(x), fast(x))


def test_weights_begin_normal_and_are_scaled_when_used():
    linear, conv = EqualLinear(512, 512, lr_multiplier=0.01), EqualConv2d(64, 64, 3)
    assert linear.weight.std().item() == pytest.approx(100, rel=0.02)
    assert conv.weight.std().item() == pytest.approx(1, rel=0.02)
    assert not linear.bias.any() and not conv.bias.any()
    assert linear(torch.randn(256, 512)).std().item() == pytest.approx(math.sqrt(2), rel=0.05)
    inside = conv(torch.randn(4, 64, 16, 16))[..., 1:-1, 1:-1]
    assert inside.std().item() == pytest.approx(math.sqrt(2), rel=0.05)


def test_a_step_of_adam_moves_the_output_as_far_whatever_the_width():
    """And as much less far as the multiplier says: what the layers are for."""

    def moves(width, lr_multiplier):
        layer = EqualLinear(width, 1, gain=1, lr_multiplier=lr_multiplier)
        x = torch.ones(1, width)
        before = layer(x).item()
        layer(x).backward()
        torch.optim.Adam([layer.weight], lr=0.01).step()
        return before - layer(x).item()

    for width in (16, 1024):
        assert moves(width, 1.0) == pytest.approx(0.01 * math.sqrt(width), rel=1e-2)
        assert moves(width, 0.1) == pytest.approx(0.001 * math.sqrt(width), rel=1e-2)


def test_autocast_casts_as_it_does_for_stock_layers():
    conv, linear = EqualConv2d(4, 6, 3), EqualLinear(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(2, 4, 5, 5)).dtype == torch.bfloat16
        assert linear(torch.randn(2, 4)).dtype == torch.bfloat16


def test_print_shows_the_scale():
    assert "in_features=16, out_features=4, bias=True, scale=0.0354, lr_multiplier=0.1" in repr(
        EqualLinear(16, 4, lr_multiplier=0.1)
    )
    assert "kernel_size=(3, 3)" in repr(EqualConv2d(4, 6, 3)) and "scale=0.236" in repr(EqualConv2d(4, 6, 3))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"kernel_size must be odd, .*, not 4"):
        EqualConv2d(4, 6, 4)
    with pytest.raises(ValueError, match="x must have 4 channels"):
        EqualConv2d(4, 6, 3)(torch.randn(2, 5, 8, 8))
