"""Where layers have too little to do to gain, fused modules call them, and do not ask each of them again."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgan import backend, chains, fuse, little_work


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


def chain():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


LITTLE = torch.randn(2, 4, 5, 5)
MUCH = torch.randn(8, 4, 128, 128)
makers = pytest.mark.parametrize("make", [chain, Block])


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.setattr(backend, "is_automatic", lambda: True)


@pytest.fixture
def looks(monkeypatch):
    """The shapes of what chains are looked at for."""
    shapes = []
    run_chain = chains.run_chain

    def noting(layers, x, *args):
        shapes.append(x.shape)
        return run_chain(layers, x, *args)

    monkeypatch.setattr(chains, "run_chain", noting)
    return shapes


@makers
def test_little_work_is_looked_at_once_for_every_shape_and_mode(make, looks):
    stock = make()
    fused = fuse(copy.deepcopy(stock))
    for training, x in ((True, LITTLE), (False, LITTLE), (True, LITTLE[..., :4])):
        stock.train(training), fused.train(training)
        looks.clear()
        for _ in range(3):
            assert torch.equal(fused(x), stock(x))
        assert looks == [x.shape]


@makers
def test_what_gains_is_looked_at_every_time(make, looks):
    fused = fuse(make())
    for _ in range(3):
        fused(MUCH)
    assert looks == [MUCH.shape] * 3


@makers
def test_hooks_that_come_later_are_called(make):
    fused = fuse(make())
    fused(LITTLE)
    seen = []
    next(fused.children()).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    fused(LITTLE)
    assert seen == [LITTLE.shape]


@makers
def test_what_was_called_for_a_hook_is_fused_without_it(make, looks):
    fused = fuse(make())
    hooks = [layer.register_forward_hook(lambda *args: None) for layer in fused.children()]
    fused(MUCH)
    for hook in hooks:
        hook.remove()
    looks.clear()
    fused(MUCH)
    assert looks == [MUCH.shape]


def test_what_is_known_of_a_module_goes_with_it():
    fused = fuse(chain())
    fused(LITTLE)
    key = id(fused)
    assert key in little_work._LITTLE
    del fused
    gc.collect()
    assert key not in little_work._LITTLE


@makers
def test_many_shapes_are_not_all_remembered(make):
    fused = fuse(make())
    for width in range(1, 80):
        fused(torch.randn(1, 4, 2, width))
    assert len(little_work._LITTLE[id(fused)]) == little_work._MOST_LITTLE


@pytest.fixture
def layouts(monkeypatch):
    """Of the images that stock convolutions are called on, whether they lie in channels_last. Any of them gains by it."""
    found = []
    convolve = F.conv2d

    def noting(x, *args):
        found.append(x.is_contiguous(memory_format=torch.channels_last))
        return convolve(x, *args)

    monkeypatch.setattr(F, "conv2d", noting)
    for limit in ("_PRODUCTS_IN_ROWS", "_PRODUCTS_IN_ROWS_SLOW"):
        monkeypatch.setattr(little_work, limit, 0)
    return found


@makers
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_stock_convolutions_are_called_in_the_layout_that_is_fast(make, training, layout, layouts):
    stock = make().train(training)
    fused, x = fuse(copy.deepcopy(stock)), LITTLE.contiguous(memory_format=layout)
    expected = stock(x)
    layouts.clear()
    for _ in range(2):
        found = fused(x)
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride()
    assert layouts == [True] * 2


def test_stock_convolutions_with_heavy_weights_are_called_in_the_layout_they_have(layouts):
    fuse(nn.Sequential(nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64)))(torch.randn(1, 4, 4, 4))
    assert layouts == [False]


def test_hooks_see_the_layout_of_stock(layouts):
    fused = fuse(nn.Sequential(*chain(), *chain()))
    seen = []
    fused[3].register_forward_hook(lambda module, args, output: seen.append(args[0].is_contiguous()))
    fused(LITTLE)
    assert seen == [True] and layouts == [True, False]


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("channels_last", ["neither", "images", "weights"])
def test_padded_convolutions_give_the_layout_of_stock(padding_mode, channels_last, layouts):
    stock = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode=padding_mode), nn.Conv2d(6, 5, 3, padding=1))
    x = LITTLE
    if channels_last == "images":
        x = x.contiguous(memory_format=torch.channels_last)
    if channels_last == "weights":
        stock.to(memory_format=torch.channels_last)
    expected, found = stock(x), fuse(copy.deepcopy(stock))(x)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("training", [True, False])
def test_a_sum_behind_a_norm_of_little_work_is_as_stock(training, layouts):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return x + self.norm(self.conv(x))

    stock = nn.Sequential(Residual(), Residual()).train(training)
    fused = fuse(copy.deepcopy(stock))
    torch.testing.assert_close(fused(LITTLE), stock(LITTLE))


def test_gradients_of_images_can_be_viewed_as_in_stock(layouts):
    x = LITTLE.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fuse(nn.Sequential(*chain()))(x).square().sum(), x, create_graph=True)
    assert grad.view(len(x), -1).requires_grad


def test_a_running_mean_counts_the_bias_where_the_norm_alone_is_little():
    stock = nn.Sequential(nn.Conv2d(64, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    fused, x = fuse(copy.deepcopy(stock)), torch.randn(2, 64, 64, 64)
    for model in (stock, fused):
        (model(x) - model(x * 2)).square().mean().backward()
    torch.testing.assert_close(fused[1].running_mean, stock[1].running_mean)
    torch.testing.assert_close(fused[0].weight.grad, stock[0].weight.grad)
