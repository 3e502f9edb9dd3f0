"""GroupNormAct, InstanceNormAct2d and LayerNormAct do what torch's norms followed by an activation do."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgan.nn import GroupNormAct, InstanceNormAct2d, LayerNormAct

STOCK_ACTS = {"none": nn.Identity, "relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.2)}
CASES = {
    "group": (nn.GroupNorm, GroupNormAct, (3, 6), {}),
    "group, no affine": (nn.GroupNorm, GroupNormAct, (3, 6), {"affine": False}),
    "group, eps": (nn.GroupNorm, GroupNormAct, (2, 6), {"eps": 0.8}),
    "instance": (nn.InstanceNorm2d, InstanceNormAct2d, (6,), {}),
    "instance, affine": (nn.InstanceNorm2d, InstanceNormAct2d, (6,), {"affine": True, "eps": 0.8}),
    "instance, tracked": (nn.InstanceNorm2d, InstanceNormAct2d, (6,), {"affine": True, "track_running_stats": True}),
    "layer": (nn.LayerNorm, LayerNormAct, ((6, 5, 7),), {}),
    "layer, last axis": (nn.LayerNorm, LayerNormAct, (7,), {"eps": 0.8}),
    "layer, no bias": (nn.LayerNorm, LayerNormAct, ((5, 7),), {"bias": False}),
    "layer, no affine": (nn.LayerNorm, LayerNormAct, ((5, 7),), {"elementwise_affine": False}),
}


def twins(case, act="relu"):
    """(stock, fused) with the same random parameters and running statistics, in float64."""
    torch.manual_seed(0)
    stock_class, fused_class, args, settings = CASES[case]
    norm = stock_class(*args, **settings).double()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    fused = fused_class(*args, act=act, negative_slope=0.2, **settings).double()
    fused.load_state_dict(norm.state_dict())
    return nn.Sequential(norm, STOCK_ACTS[act]()), fused


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", STOCK_ACTS)
@pytest.mark.parametrize("case", CASES)
def test_every_setting_means_what_it_means_in_stock(case, act, training):
    stock, fused = (module.train(training) for module in twins(case, act))
    for _ in range(3):
        x = torch.randn(4, 6, 5, 7, dtype=torch.float64) + 1
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(x) for module, x in zip((stock, fused), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0])
        arguments = [[x, *module.parameters()] for x, module in zip(inputs, (stock, fused), strict=True)]
        grads = [torch.autograd.grad(y.square().sum(), a) for y, a in zip(outputs, arguments, strict=True)]
        torch.testing.assert_close(grads[1], grads[0])
    assert list(stock[0].state_dict()) == list(fused.state_dict())
    torch.testing.assert_close(list(fused.state_dict().values()), list(stock[0].state_dict().values()))


@pytest.mark.parametrize("case", [case for case in CASES if "layer" not in case])
def test_the_residual_is_added_before_the_activation(case):
    stock, fused = twins(case)
    x, residual = torch.randn(2, 4, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(fused(x, residual), torch.relu(stock[0](x) + residual))


@pytest.mark.parametrize("case", [case for case in CASES if "instance" in case])
def test_one_image_without_a_batch(case):
    stock, fused = twins(case)
    x, residual = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(fused(x, residual), torch.relu(stock[0](x) + residual))


@pytest.mark.parametrize("case", CASES)
def test_it_is_torchs_own_layer_and_copies_compute_the_same(case):
    stock, fused = twins(case, "leaky_relu")
    assert isinstance(fused, type(stock[0]))
    x = torch.randn(4, 6, 5, 7, dtype=torch.float64)
    expected = copy.deepcopy(fused)(x)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
    assert torch.equal(fused(x), expected)


def test_print_shows_the_activation():
    for case in CASES:
        fused = twins(case, "leaky_relu")[1]
        assert "eps=" in repr(fused) and "act=leaky_relu, negative_slope=0.2" in repr(fused)


def test_bad_input_is_named():
    for layer, args in ((GroupNormAct, (3, 6)), (InstanceNormAct2d, (6,)), (LayerNormAct, (6,))):
        with pytest.raises(ValueError, match="act must be one of none, relu, leaky_relu, not 'gelu'"):
            layer(*args, act="gelu")
    with pytest.raises(ValueError, match="expected 3D or 4D input"):
        InstanceNormAct2d(6)(torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"expected 6 channels, not x of shape \(4, 3, 5, 5\)"):
        InstanceNormAct2d(6)(torch.randn(4, 3, 5, 5))
    with pytest.raises(ValueError, match="normalized_shape must be the last sizes of x"):
        LayerNormAct(6)(torch.randn(4, 5))
    with pytest.raises(ValueError, match="num_groups must divide"):
        GroupNormAct(3, 6)(torch.randn(4, 5))
