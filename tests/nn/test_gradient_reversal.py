"""The reversal layers: their coefficients, what they keep, and the linear layer that has one before it."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastgan.nn import GradientReversal, ReversedLinear, WarmStartGradientReversal

LAYERS = {
    "reversal": (lambda: GradientReversal(0.5), []),
    "warm start": (lambda: WarmStartGradientReversal(max_iters=10), ["iter_num"]),
    "linear": (lambda: ReversedLinear(4, 3, coeff=0.5), ["weight", "bias"]),
}


def factor(layer, shape=(2, 3)):
    """By what a gradient is multiplied on its way back."""
    x = torch.randn(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert grad.unique().numel() == 1
    return grad.unique().item()


def schedule(i, alpha, lo, hi, n):
    return 2 * (hi - lo) / (1 + math.exp(-alpha * i / n)) - (hi - lo) + lo


def test_reversal_takes_its_coeff_and_any_that_is_put_there():
    layer = GradientReversal()
    assert factor(layer) == -1
    layer.coeff = 0.25
    assert factor(layer) == -0.25
    layer.coeff = torch.tensor(0.5)
    assert factor(layer) == -0.5
    layer.coeff.fill_(2)
    assert factor(layer) == -2


@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 10.0, "lo": 0.1, "hi": 0.7, "max_iters": 4}], ids=["default", "set"]
)
def test_warm_start_follows_the_formula(settings):
    layer = WarmStartGradientReversal(**settings)
    n = settings.get("max_iters", 1000)
    alpha, lo, hi = (settings.get(name, default) for name, default in (("alpha", 1.0), ("lo", 0.0), ("hi", 1.0)))
    for i in range(6):
        assert -factor(layer) == pytest.approx(schedule(i, alpha, lo, hi, n), abs=1e-6)
        layer.step()


def test_auto_step_counts_the_forwards_in_training_only():
    layer, other = WarmStartGradientReversal(auto_step=True), WarmStartGradientReversal()
    x = torch.randn(3)
    for _ in range(3):
        layer(x), other(x)
    layer.eval()(x)
    assert (layer.iter_num.item(), other.iter_num.item()) == (3, 0)


def test_each_forward_has_the_coeff_of_its_time():
    layer = WarmStartGradientReversal(alpha=10.0, max_iters=10, auto_step=True)
    x = torch.zeros(1, requires_grad=True)
    first, second = layer(x), layer(x)
    grads = [torch.autograd.grad(y, x)[0].item() for y in (first, second)]
    assert grads == pytest.approx([0, -schedule(1, 10, 0, 1, 10)])


def test_a_resumed_schedule_goes_on():
    layer, resumed = (WarmStartGradientReversal(max_iters=10, auto_step=True) for _ in range(2))
    for _ in range(4):
        layer(torch.zeros(1))
    resumed.load_state_dict(layer.state_dict())
    assert factor(resumed) == factor(layer) != 0


def test_the_schedule_stays_on_the_device():
    layer = WarmStartGradientReversal(auto_step=True).to("meta")
    assert layer.coeff.device.type == "meta"
    layer(torch.ones(2, device="meta"))  # a wait for its value would raise
    assert layer.half().iter_num.dtype == torch.int64


@pytest.mark.parametrize("name", LAYERS)
def test_states_copies_and_pickles(name):
    make, keys = LAYERS[name]
    layer = make()
    assert list(layer.state_dict()) == keys
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and repr(twin) == repr(layer)


def test_linear_is_a_linear_layer_after_a_reversal():
    layer, stock = ReversedLinear(4, 3, coeff=0.5), nn.Linear(4, 3)
    assert isinstance(layer, nn.Linear)
    layer.load_state_dict(stock.state_dict())
    stock.load_state_dict(layer.state_dict())
    results = []
    for model in (layer, nn.Sequential(GradientReversal(0.5), stock)):
        x = torch.linspace(-1, 1, 20).view(5, 4).requires_grad_()
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    torch.testing.assert_close(*results)
    assert ReversedLinear(4, 3, bias=False, dtype=torch.float64).bias is None


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_training_reverses_as_well(one_process):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), ReversedLinear(4, 4), WarmStartGradientReversal(max_iters=1, auto_step=True))
    parallel, x = DistributedDataParallel(copy.deepcopy(model)), torch.randn(5, 4)
    for _ in range(2):
        for each in (model, parallel):
            each.zero_grad()
            each(x).square().sum().backward()
        grads = [[p.grad for p in each.parameters()] for each in (model, parallel)]
        torch.testing.assert_close(*grads)
    assert parallel.module[2].iter_num == 2


def test_settings_are_shown():
    assert repr(GradientReversal(0.5)) == "GradientReversal(coeff=0.5)"
    shown = "WarmStartGradientReversal(alpha=1.0, lo=0.0, hi=1.0, max_iters=7, auto_step=False)"
    assert repr(WarmStartGradientReversal(max_iters=7)) == shown
    shown = "ReversedLinear(in_features=4, out_features=3, bias=True, coeff=1.0)"
    assert repr(ReversedLinear(4, 3)) == shown


def test_bad_input_is_named():
    for layer in (GradientReversal, lambda coeff: ReversedLinear(4, 3, coeff=coeff)):
        with pytest.raises(ValueError, match="coeff must be finite, not nan"):
            layer(math.nan)
        with pytest.raises(TypeError, match="coeff must be a number or a 0-d tensor, not str"):
            layer("1")
    for name in ("alpha", "lo", "hi"):
        with pytest.raises(ValueError, match=f"{name} must be finite, not inf"):
            WarmStartGradientReversal(**{name: math.inf})
    with pytest.raises(ValueError, match="max_iters must be 1 or more, not 0"):
        WarmStartGradientReversal(max_iters=0)
