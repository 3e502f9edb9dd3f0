"""ConvBnAct2d and ConvTransposeBnAct2d do what nn.Sequential(convolution, nn.BatchNorm2d, activation) does."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgan import ops
from fastgan.nn import ConvBnAct2d, ConvTransposeBnAct2d

CONVOLUTIONS = {
    "k3": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "k4 s2 p1 without bias": (nn.Conv2d, {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False}),
    "dilated, grouped, oblong": (
        nn.Conv2d,
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    ),
    "padding valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    "padding same": (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": "same"}),
    "padding same, of unequal sides": (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same"}),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}),
    "circular": (nn.Conv2d, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    "transposed k4 s2 p1": (nn.ConvTranspose2d, {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False}),
    "transposed k3 s2 p1 op1": (
        nn.ConvTranspose2d,
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    ),
    "transposed, grouped, dilated": (nn.ConvTranspose2d, {"kernel_size": (2, 3), "groups": 2, "dilation": (1, 2)}),
}
FUSED = {nn.Conv2d: ConvBnAct2d, nn.ConvTranspose2d: ConvTransposeBnAct2d}


def make_stock(name, act=None):
    conv, settings = CONVOLUTIONS[name]
    torch.manual_seed(0)
    stock = nn.Sequential(conv(4, 6, **settings), nn.BatchNorm2d(6), act or nn.LeakyReLU(0.2)).double()
    nn.init.normal_(stock[1].weight, 1.0, 0.2)
    nn.init.normal_(stock[1].bias)
    return stock


def make_fused(name, **norm):
    conv, settings = CONVOLUTIONS[name]
    return FUSED[conv](4, 6, **settings, **norm, act="leaky_relu", negative_slope=0.2).double()


def batch(n=3):
    return torch.randn(n, 4, 7, 8, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_module_loaded_from_a_sequential_computes_the_same(name, training):
    stock, fused = make_stock(name), make_fused(name)
    stock(batch())  # running statistics that are not 0 and 1
    fused.load_state_dict(stock.state_dict())
    stock.train(training)
    fused.train(training)
    x = batch()
    outputs = [module(x) for module in (stock, fused)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close([p.grad for p in fused.parameters()], [p.grad for p in stock.parameters()])
    torch.testing.assert_close(list(fused.buffers()), list(stock.buffers()))


@pytest.mark.parametrize("name", ["k3", "transposed k4 s2 p1"])
def test_output_and_gradient_have_stock_s_layout(name):
    x = batch().requires_grad_()
    y = make_fused(name)(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous() and grad.is_contiguous()


@pytest.mark.parametrize("name", ["reflect", "padding same", "transposed k3 s2 p1 op1"])
def test_from_modules_shares_every_tensor(name):
    stock = make_stock(name).eval()
    random_state = torch.get_rng_state()
    fused = FUSED[CONVOLUTIONS[name][0]].from_modules(*stock)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {id(p) for p in fused.parameters()} == {id(p) for p in stock.parameters()}
    assert fused.bn is stock[1] and not fused.training
    x = batch()
    torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize("act", [None, nn.ReLU(True)])
def test_from_modules_takes_the_activation(act):
    stock = make_stock("k3", act or nn.Identity())
    x = batch()
    torch.testing.assert_close(ConvBnAct2d.from_modules(stock[0], stock[1], act)(x), stock(x))


def test_state_dict_loads_its_own_keys_and_a_sequential_s_at_any_depth():
    fused = make_fused("k3")
    keys = ["weight", "bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    assert list(fused.state_dict()) == keys
    make_fused("k3").load_state_dict(fused.state_dict())
    stock = nn.Sequential(make_stock("k3"), make_stock("k3"))
    saved = stock.state_dict()
    outer = nn.Sequential(make_fused("k3"), make_fused("k3"))
    outer.load_state_dict(saved)
    assert list(saved) == list(stock.state_dict())
    torch.testing.assert_close(list(outer.state_dict().values()), list(saved.values()))


def test_a_state_dict_with_a_key_missing_or_too_many_is_refused():
    saved = make_stock("k3").state_dict()
    del saved["1.running_var"]
    saved["1.surplus"] = torch.zeros(())
    with pytest.raises(RuntimeError, match=r"(?s)bn\.running_var.*bn\.surplus"):
        make_fused("k3").load_state_dict(saved)


def test_norm_settings_reach_the_norm():
    fused = ConvBnAct2d(4, 6, 3, eps=0.8, momentum=None, affine=False, track_running_stats=False, dtype=torch.float16)
    assert (fused.bn.eps, fused.bn.momentum, fused.bn.weight, fused.bn.running_mean) == (0.8, None, None, None)
    assert ConvBnAct2d(4, 6, 3, dtype=torch.float16).bn.weight.dtype == torch.float16


def test_output_size_chooses_among_the_sizes_a_stride_allows():
    stock, fused = make_stock("transposed k4 s2 p1"), make_fused("transposed k4 s2 p1")
    fused.load_state_dict(stock.state_dict())
    x = batch()
    conv, norm, act = stock
    expected = act(norm(conv(x, output_size=[15, 17])))
    torch.testing.assert_close(fused(x, output_size=[15, 17]), expected)


def test_tutorial_initialisation_finds_both_parts():
    def weights_init(m):
        classname = m.__class__.__name__
        if classname.find("Conv") != -1:
            nn.init.normal_(m.weight.data, 0.0, 0.02)
        elif classname.find("BatchNorm") != -1:
            nn.init.normal_(m.weight.data, 1.0, 0.02)
            nn.init.constant_(m.bias.data, 0)

    fused = make_fused("k3")
    nn.init.ones_(fused.bn.bias)
    fused.apply(weights_init)
    assert 0 < fused.weight.abs().max() < 0.1
    assert 0 < (fused.bn.weight - 1).abs().max() < 0.1 and not fused.bn.bias.any()


def test_a_hook_on_the_norm_sees_what_it_normalises():
    stock, fused = make_stock("k3"), make_fused("k3")
    fused.load_state_dict(stock.state_dict())
    seen = []
    fused.bn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = batch()
    torch.testing.assert_close(fused(x), stock(x))
    torch.testing.assert_close(seen, [stock[0](x)])


def test_a_replaced_norm_is_called():
    fused = make_fused("k3")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fused))
    assert type(converted.bn) is nn.SyncBatchNorm
    fused.bn = nn.Identity()
    x = batch()
    torch.testing.assert_close(fused(x), nn.functional.leaky_relu(ops.conv2d(x, fused.weight, fused.bias, 1, 1), 0.2))


def test_copies_compute_the_same():
    fused, x = make_fused("transposed k4 s2 p1"), batch()
    expected = copy.deepcopy(fused)(x)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
    assert torch.equal(fused(x), expected)


def test_print_shows_norm_and_activation():
    text = repr(make_fused("transposed k4 s2 p1"))
    assert text.startswith("ConvTransposeBnAct2d(") and "stride=(2, 2)" in text
    assert "act=leaky_relu, negative_slope=0.2" in text and "(bn): BatchNorm2d(6" in text


def test_bad_input_is_named():
    conv, norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    with pytest.raises(ValueError, match="act must be one of none, relu, leaky_relu, prelu, not 'tanh'"):
        ConvBnAct2d(4, 6, 3, act="tanh")
    with pytest.raises(TypeError, match=r"conv must be an nn\.ConvTranspose2d, not Conv2d"):
        ConvTransposeBnAct2d.from_modules(conv, norm)
    with pytest.raises(TypeError, match=r"bn must be an nn\.BatchNorm2d, not SyncBatchNorm"):
        ConvBnAct2d.from_modules(conv, nn.SyncBatchNorm(6))
    with pytest.raises(TypeError, match=r"act must be nn\.ReLU, nn\.LeakyReLU, nn\.PReLU or None, not GELU"):
        ConvBnAct2d.from_modules(conv, norm, nn.GELU())
    with pytest.raises(ValueError, match="bn must be for conv's 6 channels, not 5"):
        ConvBnAct2d.from_modules(conv, nn.BatchNorm2d(5))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["k3", "transposed k4 s2 p1"])
def test_prelu_loads_from_a_sequential_and_comes_from_modules(name, training):
    stock = make_stock(name, nn.PReLU(6, 0.1).double()).train(training)
    loaded = FUSED[CONVOLUTIONS[name][0]](4, 6, **CONVOLUTIONS[name][1], act="prelu", num_parameters=6).double()
    loaded.load_state_dict(stock.state_dict())
    made = FUSED[CONVOLUTIONS[name][0]].from_modules(*copy.deepcopy(stock))
    assert made.prelu_weight.shape == (6,)
    x = batch()
    for fused in (loaded.train(training), made):
        twin = copy.deepcopy(stock)
        ys = [module(x) for module in (twin, fused)]
        torch.testing.assert_close(*ys)
        for y in ys:
            y.square().sum().backward()
        torch.testing.assert_close(fused.prelu_weight.grad, twin[2].weight.grad)
        torch.testing.assert_close(fused.weight.grad, twin[0].weight.grad)
