"""Where layers have too little to do to gain, fused modules call them, and do not ask each of them again."""

import copy
import gc
import importlib

import pytest
import torch
import torch.nn.functional as F
from fusing import penalised_loss, twins
from torch import nn

from fastgan import backend, chains, fuse, little_work
from fastgan.ops import _conv_cpu, norm_act

group_norm_act = importlib.import_module("fastgan.ops.group_norm_act")  # which is also a function's name


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

    def noting(layers, x, *args, **kwargs):
        shapes.append(x.shape)
        return run_chain(layers, x, *args, **kwargs)

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


class Blocks(nn.Module):
    """Two convolutions in one forward."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


def two_chains():
    return nn.Sequential(*chain(), *chain())


IMAGE = torch.randn(2, 4, 9, 9)  # larger than the weights of two convolutions


@pytest.fixture
def layouts(monkeypatch):
    """Of the images that stock convolutions are called on, whether they lie in channels_last. However few products gain."""
    found = []
    convolve = F.conv2d

    def noting(x, *args):
        found.append(x.is_contiguous(memory_format=torch.channels_last))
        return convolve(x, *args)

    monkeypatch.setattr(F, "conv2d", noting)
    for limit in ("_PRODUCTS_IN_ROWS", "_PRODUCTS_IN_ROWS_SLOW"):
        monkeypatch.setattr(little_work, limit, 0)
    return found


@pytest.mark.parametrize("make", [two_chains, Blocks])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_stock_convolutions_are_called_in_the_layout_that_is_fast(make, training, layout, layouts):
    stock = make().train(training)
    fused, x = fuse(copy.deepcopy(stock)), IMAGE.contiguous(memory_format=layout)
    expected = stock(x)
    layouts.clear()
    for _ in range(3):
        found = fused(x)
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride()
    assert layouts == [True] * 6


def test_a_stock_convolution_that_is_alone_is_called_in_the_layout_it_has(layouts):
    fuse(chain())(IMAGE)
    assert layouts == [False]


def test_a_route_through_layouts_is_found_once(looks, layouts):
    fused = fuse(two_chains())
    for _ in range(3):
        fused(IMAGE)
    assert looks == [IMAGE.shape] and layouts == [True] * 6


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
def test_a_route_is_left_where_a_hook_sees_the_layouts(grad, layouts):
    with torch.set_grad_enabled(grad):
        stock, seen = two_chains(), []
        fused = fuse(copy.deepcopy(stock))
        fused(IMAGE)
        for model in (stock, fused):
            model[1].register_forward_hook(lambda module, args, output: seen.append(args[0].stride()))
            model(IMAGE)
        assert seen[0] == seen[1]


def test_a_route_goes_back_before_a_layer_that_sees_the_layout(layouts):
    class Flat(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1)

    stock = nn.Sequential(*two_chains(), Flat(), nn.Linear(4 * 81, 1))
    fused = fuse(copy.deepcopy(stock))
    for _ in range(3):
        torch.testing.assert_close(fused(IMAGE), stock(IMAGE))


def test_what_is_little_without_gradients_may_gain_with_them(looks):
    fused, x = fuse(nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2))), torch.randn(8, 3, 128, 128)
    with torch.no_grad():
        for _ in range(2):
            fused(x)
    assert looks == [x.shape]
    for _ in range(2):
        fused(x.requires_grad_())
    assert looks == [x.shape] * 3


def test_settings_that_were_changed_by_hand_are_taken_as_stock_takes_them():
    stock = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    stock[0].padding, stock[0].stride = 1, [2, 1]
    torch.testing.assert_close(fuse(copy.deepcopy(stock))(LITTLE), stock(LITTLE))


def test_stock_convolutions_with_heavy_weights_are_called_in_the_layout_they_have(layouts):
    fuse(nn.Sequential(nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64)))(torch.randn(1, 4, 4, 4))
    assert layouts == [False]


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_16_bit_convolutions_that_the_cpu_has_no_instructions_for_are_not_left_to_stock(how, ran, monkeypatch):
    monkeypatch.setattr(little_work, "vendor_takes", lambda dtype: dtype == torch.float32)
    fused, x = fuse(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))), LITTLE
    if how == "weights":
        fused, x = fused.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        fused(x)
    assert ran[-1] == "conv2d_batch_norm_act"


def test_hooks_see_the_layout_of_stock(layouts):
    fused = fuse(nn.Sequential(*two_chains(), *chain()))
    seen = []
    fused[6].register_forward_hook(lambda module, args, output: seen.append(args[0].is_contiguous()))
    fused(torch.cat([IMAGE] * 2))
    assert seen == [True] and layouts == [True, True, False]


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


@pytest.mark.parametrize("sizes", [(2, 48), (48, 2), (48, 48)])
def test_batches_of_which_one_is_little_are_backpropagated_together(sizes):
    """The norm of one is stock's, which saves the running statistics that that of the other moves."""
    gradients, buffers = [], []
    for model in twins(
        lambda: nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 1, 3)), torch.float32
    ):
        torch.manual_seed(0)
        scores = [model(torch.randn(4, 16, size + 4, size + 4)).square().mean() for size in sizes]
        gradients.append(torch.autograd.grad(sum(scores), list(model.parameters())))
        buffers.append(list(model.buffers()))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(buffers[1], buffers[0])


# ── Every choice, of convolutions and norms on their own ─────────────────────────────────────────────────────────────

NEVER, ALWAYS = 1, 1 << 40
CONVOLUTIONS = {
    # (left to stock by the chain, called in channels_last, left to stock by the operator)
    "operator": (NEVER, ALWAYS, NEVER),
    "operator's stock": (NEVER, ALWAYS, ALWAYS),
    "called": (ALWAYS, ALWAYS, ALWAYS),
    "called in rows": (ALWAYS, NEVER, ALWAYS),
}


class Added(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm(4)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Functions(nn.Module):
    """Calls functions where others call layers."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.gain = (nn.Parameter(torch.randn(size)) for size in ((4, 4, 3, 3), (4,), (4,)))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        y = F.leaky_relu(F.batch_norm(y, self.mean, self.var, self.gain, self.bias, self.training), 0.2)
        return F.instance_norm(F.conv2d(y, self.weight), weight=self.gain, bias=self.bias)


NETWORKS = {
    "bias": lambda norm: nn.Sequential(nn.Conv2d(4, 4, 3), norm(4), nn.ReLU(True), nn.Conv2d(4, 3, 3), norm(3)),
    "no bias": lambda norm: nn.Sequential(nn.Conv2d(4, 6, 2, 2, bias=False), norm(6), nn.LeakyReLU(0.2, True)),
    "transposed": lambda norm: nn.Sequential(nn.ConvTranspose2d(4, 6, 4, 2, 1), norm(6), nn.PReLU(), nn.Dropout(0.3)),
    "doubled": lambda norm: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.ReLU()),
    "halved": lambda norm: nn.Sequential(norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(2)),
    "shuffled": lambda norm: nn.Sequential(nn.Conv2d(4, 8, 3), nn.PixelShuffle(2), nn.PReLU(2), norm(2), nn.Tanh()),
    "added": lambda norm: nn.Sequential(Added(norm), Added(norm), nn.Conv2d(4, 2, 1)),
    "functions": lambda norm: nn.Sequential(Functions(), norm(4)),
    "nested": lambda norm: nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), norm(4)), nn.Sequential(nn.ReLU(True))),
}  # fmt: skip
NORMS = {
    "batch": lambda channels: nn.BatchNorm2d(channels, momentum=None),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "group": lambda channels: nn.GroupNorm(2 - channels % 2, channels),
}


@pytest.fixture(params=CONVOLUTIONS)
def convolutions(request, monkeypatch):
    chain, rows, operator = CONVOLUTIONS[request.param]
    for name in (
        "_FEW_PRODUCTS",
        "_FEW_PRODUCTS_IN_LANES",
        "_FEW_PRODUCTS_NARROW",
        "_FEW_PRODUCTS_SLOW",
        "_FEW_PRODUCTS_OF_SCORES",
        "_FEW_ELEMENTS",
        "_FEW_ELEMENTS_NARROW",
    ):
        monkeypatch.setattr(little_work, name, chain)
    for name in ("_PRODUCTS_IN_ROWS", "_PRODUCTS_IN_ROWS_SLOW"):
        monkeypatch.setattr(little_work, name, rows)
    for name in ("_SMALL", "_SMALL_NARROW", "_SMALL_FEW", "_TINY"):
        monkeypatch.setattr(_conv_cpu, name, operator)
    monkeypatch.setattr(chains, "_FEW_PIXELS", NEVER)


@pytest.fixture(params=[NEVER, ALWAYS], ids=["norms by operators", "norms by stock"])
def norms(request, monkeypatch):
    for name in ("_SMALL", "_SMALL_NARROW"):
        small = {key: (request.param, request.param) for key in getattr(norm_act, name)}
        monkeypatch.setattr(norm_act, name, small)
    for name in ("_SMALL", "_SMALL_CHANNELS_LAST", "_SMALL_PER_ELEMENT"):
        monkeypatch.setattr(group_norm_act, name, request.param)
    monkeypatch.setattr(group_norm_act, "_SMALL_AS_IT_LIES", (request.param, request.param))


@pytest.mark.usefixtures("convolutions", "norms", "one_thread")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_whatever_is_left_to_stock_the_model_trains_as_stock_does(network, norm, training):
    stock = NETWORKS[network](NORMS[norm]).double().train(training)
    fused = fuse(copy.deepcopy(stock))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 4, 6, 8, dtype=torch.float64).contiguous(memory_format=layout)
        seen = []
        for model in (stock, fused):
            model.zero_grad()
            image = x.clone(memory_format=torch.preserve_format).requires_grad_()
            torch.manual_seed(0)
            real, fake = model(image * 1), model(image * 2)  # two forwards before a backward, as of discriminators
            (real - fake).square().mean().backward()
            torch.manual_seed(0)
            penalised_loss(lambda x, model=model: model(x * 1), image).backward()
            seen.append([real, image.grad, *[p.grad for p in model.parameters()], *model.buffers()])
        for found, expected in zip(*seen, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        assert seen[1][0].stride() == seen[0][0].stride()
