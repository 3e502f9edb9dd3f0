"""PixelShuffleAct does what nn.PixelShuffle followed by an activation does."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgan.nn import PixelShuffleAct

STOCK_ACTS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "prelu": lambda: nn.PReLU(3, init=0.4),
}


def twins(act, factor=2):
    """(stock, fused) in float64."""
    stock = nn.Sequential(nn.PixelShuffle(factor), STOCK_ACTS[act]()).double()
    return stock, PixelShuffleAct(factor, act, num_parameters=3, init=0.4, negative_slope=0.2).double()


@pytest.mark.parametrize("act", STOCK_ACTS)
@pytest.mark.parametrize("factor", [2, 3])
def test_results_and_gradients_are_those_of_the_two_layers(act, factor):
    results = []
    x = torch.randn(2, 3 * factor**2, 5, 4, dtype=torch.float64, requires_grad=True)
    for module in twins(act, factor):
        y = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("act", STOCK_ACTS)
def test_parameters_are_those_of_the_activation(act):
    stock, fused = twins(act)
    assert isinstance(fused, nn.PixelShuffle)
    assert list(fused.state_dict()) == list(stock[1].state_dict())
    fused.load_state_dict(stock[1].state_dict())
    torch.testing.assert_close(list(fused.parameters()), list(stock.parameters()))


def test_the_defaults_are_those_of_prelu():
    assert PixelShuffleAct(2).weight.tolist() == nn.PReLU().weight.tolist() == [0.25]
    assert PixelShuffleAct(2).upscale_factor == 2


@pytest.mark.parametrize("act", STOCK_ACTS)
def test_it_copies_pickles_and_trains(act):
    _, module = twins(act)
    x = torch.randn(2, 12, 3, 3, dtype=torch.float64)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    for parameter in module.parameters():
        module(x).sum().backward()
        assert parameter.grad.any()


def test_settings_are_shown():
    assert repr(PixelShuffleAct(2)) == "PixelShuffleAct(upscale_factor=2, act=prelu, num_parameters=1)"
    assert repr(PixelShuffleAct(3, "relu")) == "PixelShuffleAct(upscale_factor=3, act=relu)"
    assert repr(PixelShuffleAct(2, "leaky_relu", negative_slope=0.2)).endswith("act=leaky_relu, negative_slope=0.2)")


def test_an_unknown_act_is_refused():
    with pytest.raises(ValueError, match="act must be one of none, relu, leaky_relu, prelu, not 'gelu'"):
        PixelShuffleAct(2, "gelu")
