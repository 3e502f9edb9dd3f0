"""BatchNormAct2d does what nn.BatchNorm2d followed by an activation does."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgan.nn import BatchNormAct2d
from fastgan.nn.norm_act import Activation, next_statistics

STOCK_ACTS = {"none": nn.Identity, "relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.2)}


def twins(act="relu", **settings):
    """(stock, fused) with the same random parameters and running statistics, in float64."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, **settings).double()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    fused = BatchNormAct2d(3, act=act, negative_slope=0.2, **settings).double()
    fused.load_state_dict(norm.state_dict())
    return nn.Sequential(norm, STOCK_ACTS[act]()), fused


def assert_agree(stock, fused, batches=3):
    for _ in range(batches):
        x = torch.randn(4, 3, 5, 6, dtype=torch.float64) + 1
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(x) for module, x in zip((stock, fused), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0])
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for x, y in zip(inputs, outputs, strict=True)]
        torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(list(fused.state_dict().values()), list(stock[0].state_dict().values()))


@pytest.mark.parametrize("act", STOCK_ACTS)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_training_moves_the_same_statistics(act, momentum):
    assert_agree(*twins(act, momentum=momentum))


@pytest.mark.parametrize("settings", [{}, {"eps": 0.8}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("training", [True, False])
def test_every_setting_means_what_it_means_in_stock(settings, training):
    stock, fused = twins(**settings)
    assert_agree(stock.train(training), fused.train(training))


def test_tracking_can_be_switched_off_later():
    stock, fused = twins()
    stock[0].track_running_stats = fused.track_running_stats = False
    assert_agree(stock, fused)
    assert fused.num_batches_tracked == 0
    assert_agree(stock.eval(), fused.eval())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cumulative_average_has_the_precision_of_its_buffer(dtype):
    norm = nn.BatchNorm2d(3, momentum=None, dtype=dtype)
    norm.num_batches_tracked.fill_(2)
    momentum = next_statistics(norm).momentum
    assert torch.equal(momentum, torch.tensor(1 / 3, dtype=dtype))
    norm.num_batches_tracked.fill_(99_999)  # more than float16 holds
    assert next_statistics(norm).momentum > 0


def test_the_residual_is_added_before_the_activation():
    stock, fused = twins()
    x, residual = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x, residual), torch.relu(stock[0](x) + residual))


def test_state_dict_loads_both_ways():
    stock, fused = twins()
    fused(torch.randn(4, 3, 5, 6, dtype=torch.float64))
    stock[0].load_state_dict(fused.state_dict())
    assert list(stock[0].state_dict()) == list(fused.state_dict())
    assert stock[0].num_batches_tracked == 1


def test_tutorial_initialisation_finds_it():
    def weights_init(m):
        if m.__class__.__name__.find("BatchNorm") != -1:
            nn.init.normal_(m.weight.data, 1.0, 0.02)
            nn.init.constant_(m.bias.data, 0)

    fused = twins()[1]
    fused.apply(weights_init)
    assert 0 < (fused.weight - 1).abs().max() < 0.1 and not fused.bias.any()


def test_copies_compute_the_same():
    _, fused = twins("leaky_relu")
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    expected = copy.deepcopy(fused)(x)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
    assert torch.equal(fused(x), expected)


def test_print_shows_the_activation():
    assert "eps=1e-05" in repr(BatchNormAct2d(3)) and "act=relu)" in repr(BatchNormAct2d(3))
    assert "act=leaky_relu, negative_slope=0.2" in repr(twins("leaky_relu")[1])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="act must be one of none, relu, leaky_relu, prelu, not 'gelu'"):
        BatchNormAct2d(3, act="gelu")
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNormAct2d(3)(torch.randn(4, 3))
    with pytest.raises(TypeError, match=r"act must be nn\.ReLU, nn\.LeakyReLU, nn\.PReLU or None, not Tanh"):
        Activation.of(nn.Tanh())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_prelu_is_a_parameter_of_the_layer(count, training):
    torch.manual_seed(0)
    norm, prelu = nn.BatchNorm2d(3), nn.PReLU(count, 0.1)
    fused = BatchNormAct2d(3, act="prelu", num_parameters=count, init=0.1)
    assert list(fused.state_dict()) == [*("weight", "bias"), "prelu_weight", *list(norm.state_dict())[2:]]
    stock = nn.Sequential(norm, prelu).double().train(training)
    fused.double().train(training)
    results = []
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    for module, weights in ((stock, [norm.weight, prelu.weight]), (fused, [fused.weight, fused.prelu_weight])):
        given = x.clone().requires_grad_()
        y = module(given)
        results.append([y, *torch.autograd.grad(y.square().sum(), [given, *weights])])
    torch.testing.assert_close(*results)
    assert "act=prelu" in str(fused)


def test_other_activations_have_no_weight():
    assert BatchNormAct2d(3).prelu_weight is None and "prelu_weight" not in BatchNormAct2d(3).state_dict()
