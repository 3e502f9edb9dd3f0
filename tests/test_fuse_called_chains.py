"""`fuse` on layers that a forward written by hand calls one after the other, and on the functions between them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fusing import UNet, assert_agree, batch, twins
from oracle import Errors
from torch import nn

from fastgan import ops
from fastgan.fuse import explain, fuse, unfuse

C = 4


pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """SRGAN's, as its imitators write it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.prelu = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.PReLU()
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        residual = self.conv1(x)
        residual = self.bn1(residual)
        residual = self.prelu(residual)
        residual = self.conv2(residual)
        residual = self.bn2(residual)
        return x + residual


class AddsInPlace(Block):
    """ResNet's: the activation is of the sum."""

    def forward(self, x):
        identity = x
        out = self.prelu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return F.relu(out)


class Functions(Block):
    def forward(self, x):
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2, inplace=True)
        return torch.tanh(self.bn2(self.conv2(F.relu(x))))


class Resamples(Block):
    def forward(self, x):
        x = F.interpolate(x, scale_factor=2)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.avg_pool2d(self.conv2(x), 2)


class OtherSettings(Block):
    """Functions that no layer of a pattern stands for."""

    def forward(self, x):
        x = self.conv1(F.interpolate(x, scale_factor=2, mode="bilinear", antialias=True))
        return F.avg_pool2d(self.conv2(F.leaky_relu(x, x.mean().item() * 0 + 0.2)), 3)


class Differs(Block):
    """Calls of one layer and functions whose settings a repr leaves out."""

    def forward(self, x):
        y = F.avg_pool2d(self.conv1(x), 3, 2, 0, True)[..., :3, :4] + F.avg_pool2d(self.conv1(x), 3, 2)
        z = F.interpolate(self.bn1(x), scale_factor=2, mode="bilinear", align_corners=True)
        return y.mean((2, 3), keepdim=True) + z - F.interpolate(self.bn1(x), scale_factor=2, mode="bilinear")


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), nn.ConvTranspose2d(6, C, 3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Changes(Block):
    """x is changed between its upsampling and the convolution of that."""

    def forward(self, x):
        x = x * 1
        y = F.interpolate(x, scale_factor=2)
        F.relu(x, inplace=True)
        return self.conv1(y).mean((2, 3), keepdim=True) + self.bn2(self.conv2(x))


class Shares(Block):
    def forward(self, x):
        return self.bn1(self.conv1(self.bn1(self.conv1(x))))


class Drops(Block):
    def forward(self, x):
        return self.conv2(F.dropout2d(self.bn1(self.conv1(x)), 0.5, self.training))


class Shuffles(nn.Module):
    """SRGAN's up-sampling, and ESPCN's."""

    def __init__(self):
        super().__init__()
        self.conv, self.shuffle, self.prelu = nn.Conv2d(C, 4 * C, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(C)
        self.conv2, self.tail = nn.Conv2d(C, 18, 3), nn.Conv2d(2, 3, 3)

    def forward(self, x):
        x = self.prelu(self.shuffle(self.conv(x)))
        return self.tail(F.leaky_relu(F.pixel_shuffle(F.relu(self.conv2(x)), 3), 0.1))


class Bare(nn.Module):
    """Functions with the tensors that layers would hold."""

    def __init__(self):
        super().__init__()
        self.momentum = 0.3
        self.weight, self.gain = nn.Parameter(torch.randn(C, C, 3, 3)), nn.Parameter(torch.rand(C))
        self.bias, self.slope = nn.Parameter(torch.randn(C)), nn.Parameter(torch.rand(C))
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))

    def norm(self, x):
        return F.batch_norm(x, self.mean, self.var, self.gain, self.bias, self.training, self.momentum, eps=1e-3)

    def forward(self, x):
        y = F.prelu(self.norm(F.conv2d(x, self.weight, self.bias, padding="same")), self.slope)
        y = self.norm(F.conv_transpose2d(y, self.weight, None, 2, 1, 1)).relu_()
        y = F.pad(y, (1, 1, 1, 1), mode="reflect")
        return F.instance_norm(F.conv2d(y, self.weight, stride=(2,)), weight=self.gain, bias=self.bias).tanh()


class BareSum(Bare):
    def forward(self, x):
        y = self.norm(F.conv2d(x, self.weight, None, 1, 1))
        return F.prelu(x + y, self.slope)


class BareResampled(Bare):
    def forward(self, x):
        x = F.conv2d(F.interpolate(x, scale_factor=2), self.weight, self.bias, padding=1)
        return F.avg_pool2d(F.conv2d(x.sigmoid(), self.weight), 2)


class BareOtherwise(Bare):
    """What no operator does: images in three dimensions, a norm's weight without a bias, running statistics of planes."""

    def forward(self, x):
        y = F.batch_norm(x.flatten(2), None, None, self.gain, self.bias, True).view_as(x)
        y = F.batch_norm(y, self.mean, self.var, self.gain, None, self.training)
        return F.relu(F.instance_norm(y, self.mean * 1, self.var * 1, None, None, self.training))


class Generator(nn.Module):
    """Hand-written blocks in a chain in a hand-written forward."""

    def __init__(self):
        super().__init__()
        self.head, self.blocks = nn.Sequential(nn.Conv2d(C, C, 3, 1, 1), nn.PReLU()), nn.Sequential(Block(), Block())
        self.conv, self.bn, self.tail = nn.Conv2d(C, C, 3, 1, 1), nn.BatchNorm2d(C), nn.Conv2d(C, 3, 3)

    def forward(self, x):
        first = self.head(x)
        return self.tail(first + self.bn(self.conv(self.blocks(first))))


UNIT = "conv2d_batch_norm_act"


def _folded(names):
    """In evaluation a convolution takes in the norm that would add the residual."""
    pairs = zip(names, [*names[1:], ""], strict=True)
    folded = [UNIT if pair == ("conv2d", "batch_norm_act") else pair[0] for pair in pairs]
    return [name for name in folded if name != "batch_norm_act"]


ADDS = [UNIT, "conv2d", "batch_norm_act"]  # the last with the residual

FORWARDS = {
    Block: ADDS,
    AddsInPlace: ADDS,
    Functions: [UNIT, UNIT],
    Resamples: ["conv_transpose2d_batch_norm_act", "conv2d_avg_pool2d"],
    Steps: [UNIT, "conv_transpose2d"],
    UNet: [UNIT, "conv2d", "conv_transpose2d"],
    Changes: ["conv2d", "conv2d", "batch_norm_act"],
    Shares: [UNIT, UNIT],
    Drops: [UNIT, "conv2d"],
    Shuffles: ["conv2d", "pixel_shuffle_act", "conv2d", "pixel_shuffle_act", "conv2d"],
    Bare: [UNIT, "conv_transpose2d_batch_norm_act", "conv2d", "instance_norm_act"],
    BareSum: ["conv2d", "batch_norm_act"],
    BareResampled: ["upsample_conv2d", "conv2d_avg_pool2d"],
    Generator: ["conv2d", *ADDS, *ADDS, "conv2d", "batch_norm_act", "conv2d"],
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("kind", FORWARDS, ids=lambda kind: kind.__name__)
def test_a_forward_that_calls_layers_computes_the_same(kind, layout, training, ran):
    stock, fused = (model.train(training).to(memory_format=layout) for model in twins(kind))
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert_agree(stock, fused, batch().contiguous(memory_format=layout))
    expected = FORWARDS[kind] if training else _folded(FORWARDS[kind])
    assert ran == expected * 4
    assert type(unfuse(fused)) is kind


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functions_that_no_operator_computes_run_as_they_are(training, ran):
    stock, fused = (model.train(training) for model in twins(BareOtherwise))
    assert_agree(stock, fused, batch())
    assert ran == []


@pytest.mark.parametrize("count", [1, 6])
def test_prelu_in_a_chain_belongs_to_the_norm_before_it(count, ran):
    stock, fused = twins(lambda: nn.Sequential(nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6), nn.PReLU(count)))
    assert_agree(stock, fused, batch())
    assert ran == [UNIT] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_conv", [True, False])
def test_prelu_under_autocast_gives_stock_s_dtype(dtype, with_conv):
    stock, fused = twins(
        lambda: nn.Sequential(*[nn.Conv2d(C, C, 3)] * with_conv, nn.BatchNorm2d(C), nn.PReLU()), torch.float32
    )
    x = batch(dtype, n=16)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = stock(x), fused(x)
    assert found.dtype == expected.dtype
    errors = Errors()
    errors.add(["y"], [found], [expected], [copy.deepcopy(stock).double()(x.double())])
    errors.check()


def test_prelu_of_another_dtype_is_stock_s_error():
    model = nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.PReLU()).bfloat16()
    model[2].float()
    with pytest.raises(RuntimeError, match="prelu"):
        fuse(model)(batch(torch.bfloat16))


def test_a_layer_with_a_hook_is_called(ran):
    stock, fused = twins(Block)
    seen = []
    fused.bn1.register_forward_hook(lambda module, args, output: seen.append(module))
    assert_agree(stock, fused, batch())
    assert seen == [fused.bn1] * 4
    assert ran == ["conv2d", "conv2d", "batch_norm_act"] * 4


@pytest.mark.parametrize("name", ["weight", "gain", "mean", "slope"])
@pytest.mark.parametrize("becomes", ["wider", "none"])
def test_an_error_in_a_function_is_stock_s_own(name, becomes):
    stock, fused = twins(Bare)
    errors = []
    for model in (stock, fused):
        tensor = getattr(model, name)
        wider = type(tensor)(torch.cat([tensor.detach()] * 2, 1 if name == "weight" else 0))
        setattr(model, name, wider if becomes == "wider" else None)
        try:
            errors.append(model(batch()).shape)
        except (RuntimeError, TypeError, ValueError) as error:
            errors.append((type(error), str(error)))
    assert errors[0] == errors[1]


def test_a_layer_that_is_replaced_later_is_seen(ran):
    stock, fused = twins(Block)
    assert_agree(stock, fused, batch())
    for model in (stock, fused):
        model.bn1 = nn.Identity()
    ran.clear()
    assert_agree(stock, fused, batch())
    assert ran == ["conv2d", "conv2d", "batch_norm_act"] * 4


def test_functions_that_differ_in_a_setting_are_not_taken_for_each_other():
    assert_agree(*twins(Differs), batch())


class ChangesInput(Block):
    """Adds what an activation in place has made of x."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.relu.register_forward_hook(_hook)

    def forward(self, x):
        return x + self.bn1(self.conv1(self.relu(x)))


def _hook(module, args, output):
    return None


class ChangesInputInside(Block):
    """The same of a chain in a chain, and of a layer that hands on its input."""

    def __init__(self, *before):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        relu.register_forward_hook(_hook)
        self.body = nn.Sequential(nn.Sequential(*before, relu, self.conv1), self.bn1)

    def forward(self, x):
        return x + self.body(x)


@pytest.mark.parametrize("make", [ChangesInput, ChangesInputInside, lambda: ChangesInputInside(nn.Identity())])
def test_a_sum_with_an_input_that_a_called_layer_changes(make):
    assert_agree(*twins(lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding=1), make())), batch())


def test_an_activation_of_a_residual_sum_is_the_norm_s(monkeypatch):
    given = []
    run = ops.batch_norm_act
    monkeypatch.setattr(ops, "batch_norm_act", lambda *args, **kwargs: given.append(kwargs) or run(*args, **kwargs))
    for make in (AddsInPlace, BareSum):
        fuse(make())(batch(torch.float32))
    assert [kwargs["act"] for kwargs in given] == ["relu", "prelu"]
    assert all(kwargs["residual"] is not None for kwargs in given)


class Doubles(Block):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return y + y


def test_a_sum_of_one_chain_with_itself_runs_it_once():
    assert_agree(*twins(Doubles), batch())


class Lists(Block):
    def forward(self, x):
        return F.avg_pool2d(self.conv1(x), [2, 2])


def test_sizes_may_be_lists(ran):
    assert_agree(*twins(Lists), batch())
    assert ran == ["conv2d_avg_pool2d"] * 4


def test_functions_without_a_layer_of_the_same_settings_run_as_they_are():
    assert_agree(*twins(OtherSettings), batch())


def test_explain_names_the_layers_and_why_others_are_not_fused():
    class Asks(Block):
        def forward(self, x):
            return self.bn1(self.conv1(x)) if x.sum() > 0 else x

    class Shows(Block):
        def forward(self, x):
            return self.conv1(x, *[]), self.bn1

    model = nn.Module()
    model.block, model.functions, model.steps, model.asks, model.shows = Block(), Functions(), Steps(), Asks(), Shows()
    model.bare = Bare()
    model.block.bn1.register_forward_hook(lambda *_: None)
    not_yet = [row for row in explain(model) if row.fused]
    assert not_yet == []
    assert list(explain(fuse(model))) == [
        ("block.conv1", "Conv2d", True, ""),
        ("block.bn1", "BatchNorm2d", False, "it has a forward hook"),
        ("block.conv2–bn2", "Conv2d → BatchNorm2d", True, ""),
        ("block", "x + bn2(…)", True, ""),
        ("functions.conv1–bn1", "Conv2d → BatchNorm2d → LeakyReLU", True, ""),
        ("functions.conv2–bn2", "Conv2d → BatchNorm2d", True, ""),
        ("steps.layers.0–layers.2", "Conv2d → BatchNorm2d → PReLU", True, ""),
        ("steps.layers.3", "ConvTranspose2d", True, ""),
        *[
            (f"asks.{name}", kind, False, "the way through the forward of Asks depends on tensors")
            for name, kind in (("conv1", "Conv2d"), ("bn1", "BatchNorm2d"), ("conv2", "Conv2d"), ("bn2", "BatchNorm2d"))
        ],
        *[
            (f"shows.{name}", kind, False, "the forward of Shows looks into bn1")
            for name, kind in (("conv1", "Conv2d"), ("bn1", "BatchNorm2d"), ("conv2", "Conv2d"), ("bn2", "BatchNorm2d"))
        ],
        ("bare", "F.conv2d → F.batch_norm → F.prelu", True, ""),
        ("bare", "F.conv_transpose2d → F.batch_norm → ReLU", True, ""),
        ("bare", "F.conv2d → F.instance_norm", True, ""),
    ]
