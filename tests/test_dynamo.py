"""The backend "fastgan" of torch.compile: what it finds in Dynamo's graphs, and that a compiled model computes the same."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from fusing import UNet, assert_agree, batch, penalised_loss, twins
from torch import fx, nn

from fastgan import gradient_penalty
from fastgan.dynamo import compile_graph
from fastgan.fuse import fuse, unfuse

C = 4
UNIT, UP = "conv2d_batch_norm_act", "conv_transpose2d_batch_norm_act"

pytestmark = pytest.mark.usefixtures("one_thread", "fresh")


@pytest.fixture
def fresh():
    torch.compiler.reset()


class Model(nn.Module):
    """`Module.compile` leaves forwards of torch's own as they are."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


def compiled_twins(make, dtype=torch.float64, **settings):
    """(stock, compiled), initialised alike."""
    stock, twin = twins(lambda: Model(make()), dtype)
    unfuse(twin).compile(backend=compile_graph, **settings)
    return stock, twin


# ── What is found ────────────────────────────────────────────────────────────────────────────────────────────────────


def layers():
    return nn.Sequential(
        *[nn.Conv2d(C, 6, 4, 2, 1), nn.BatchNorm2d(6, 0.8), nn.LeakyReLU(0.2, True)],
        *[nn.ConvTranspose2d(6, C, 4, 2, 1), nn.BatchNorm2d(C, track_running_stats=False), nn.ReLU(), nn.Dropout(0.0)],
        *[nn.Conv2d(C, C, 3, padding="same"), nn.InstanceNorm2d(C, affine=True), nn.PReLU()],
        *[nn.Conv2d(C, 8, 3, padding=1, padding_mode="reflect"), nn.PixelShuffle(2), nn.PReLU(2)],
        *[nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 2, 3), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)],
        *[nn.Conv2d(2, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True), nn.Tanh()],
    )


LAYERS = [UNIT, UP, "conv2d", "instance_norm_act", "conv2d", "pixel_shuffle_act", "batch_norm_act", "conv2d_avg_pool2d"]


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act, self.bn1, self.bn2 = act, nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.conv1, self.conv2 = nn.Conv2d(C, C, 3, 1, 1), nn.Conv2d(C, C, 3, 1, 1, bias=False)

    def forward(self, x):
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += x
        return self.act(y)


class Styled(nn.Module):
    def __init__(self):
        super().__init__()
        self.style, self.norm = nn.Linear(C, 2 * C), nn.InstanceNorm2d(C)
        self.bias, self.weight = nn.Parameter(torch.randn(1, C, 1, 1)), nn.Parameter(torch.randn(C, C, 3, 3))

    def forward(self, x):
        scale, shift = self.style(x.mean((2, 3))).view(-1, 2 * C, 1, 1).chunk(2, 1)
        x = F.conv2d(x, self.weight * 0.5, padding=1)
        return self.norm(F.leaky_relu(x + self.bias, 0.2)) * (scale + 1) + shift


class Decides(nn.Module):
    """Goes a way that depends on the images."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.other = nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x):
        norm = self.one if x.mean() > 0 else self.other
        return norm(self.conv(x)).relu()


def normalised():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(C, 6, 3)), nn.BatchNorm2d(6), nn.ReLU())


def hooked():
    model = nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3), nn.InstanceNorm2d(C))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


MODELS = {
    "layers": (layers, [*LAYERS, "upsample_conv2d"]),
    "a U-Net": (UNet, [UNIT, "conv2d", "conv_transpose2d"]),
    "a residual block": (lambda: Block(nn.ReLU(True)), [UNIT, "conv2d", "batch_norm_act"]),
    "a residual block with PReLU": (lambda: Block(nn.PReLU()), [UNIT, "conv2d", "batch_norm_act"]),
    "AdaIN": (Styled, ["conv2d", "adain"]),
    "a spectral norm": (normalised, [UNIT]),
    "a hook": (hooked, ["conv2d", "batch_norm_act", "conv2d", "instance_norm_act"]),
    "control flow": (Decides, [UNIT]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_computes_the_same(name, ran):
    make, expected = MODELS[name]
    stock, compiled = compiled_twins(make)
    assert_agree(stock, compiled, batch())
    assert ran == expected * 4


def test_training_and_evaluation_are_told_apart(ran):
    stock, compiled = compiled_twins(lambda: Block(nn.ReLU()))
    for training in (True, False, True):
        assert_agree(stock.train(training), compiled.train(training), batch(), steps=1)
    assert ran == [UNIT, "conv2d", "batch_norm_act"] * 2 + [UNIT, UNIT] * 2 + [UNIT, "conv2d", "batch_norm_act"] * 2


@pytest.mark.parametrize(("name", "dynamic"), [("a U-Net", None), ("layers", True)])
def test_batches_of_any_size(name, dynamic, ran):
    make, expected = MODELS[name]
    stock, compiled = compiled_twins(make, dynamic=dynamic)
    for n, size in ((3, 8), (5, 12)):
        assert_agree(stock, compiled, batch(n=n, size=size), steps=1)
    assert ran == expected * 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_the_layout_of_outputs_is_stock_s(layout):
    stock, compiled = (model.to(memory_format=layout) for model in compiled_twins(UNet))
    assert_agree(stock, compiled, batch().contiguous(memory_format=layout), steps=1)


# ── Derivatives ──────────────────────────────────────────────────────────────────────────────────────────────────────


def critic():
    return nn.Sequential(
        *[nn.Conv2d(C, 6, 3), nn.LeakyReLU(0.2)],
        *[nn.Conv2d(6, 6, 3, 2), nn.InstanceNorm2d(6, affine=True), nn.LeakyReLU(0.2)],
        *[nn.Flatten(), nn.Linear(36, 1)],
    )


def test_a_compiled_critic_has_a_gradient_penalty(ran):
    stock, compiled = compiled_twins(critic)
    real, fake = batch(), batch()
    for model in (stock, compiled):
        penalty = gradient_penalty(model, real, fake, generator=torch.Generator().manual_seed(0))
        (penalty + model(fake).mean() - model(real).mean()).backward()
        penalised_loss(model, real.clone().requires_grad_()).backward()
    assert ran == ["conv2d", "conv2d", "instance_norm_act"] * 3  # and not in the penalty, which is lean
    expected, found = ([p.grad for p in model.parameters()] for model in (stock, compiled))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# ── Modes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_is_that_of_a_fused_model(training, ran):
    stock, compiled = (model.train(training) for model in compiled_twins(lambda: Block(nn.PReLU()), torch.float32))
    fused = fuse(copy.deepcopy(stock))
    x = batch(torch.float32)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected, found, y = fused(x), compiled(x), stock(x)
        assert found.dtype == y.dtype and torch.equal(found, expected)
    assert ran[: len(ran) // 4] * 4 == ran
    torch.testing.assert_close(list(compiled.buffers()), list(fused.buffers()), rtol=0, atol=0)


class ChangesMode(nn.Module):
    """Begins and ends autocast and no_grad between layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.conv(x)
        y = self.norm(y)
        with torch.no_grad():
            z = self.other(y)
        return F.relu(z) + F.relu(y)


def test_layers_in_different_modes_are_no_chain(ran):
    stock, compiled = compiled_twins(ChangesMode, torch.float32)
    x = batch(torch.float32)
    grads = []
    for model in (stock, compiled):
        y = model(x)
        y.sum().backward()
        grads.append([model.body.conv.weight.grad, model.body.norm.weight.grad])
        assert y.dtype == torch.bfloat16 and model.body.other.weight.grad is None
    assert ran == ["conv2d", "batch_norm_act", "batch_norm_act"]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-1)


# ── Around it ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [lambda: Block(nn.ReLU()), normalised], ids=["block", "spectral norm"])
def test_a_fused_model_may_be_compiled(make):
    stock, fused = twins(make)
    fused.compile(backend=compile_graph)
    assert_agree(stock, fused, batch(), steps=1)


def test_a_graph_without_patterns_comes_back_as_it_was():
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    before = list(graph.graph.nodes)
    assert compile_graph(graph, []) == graph.forward
    assert list(graph.graph.nodes) == before


def test_the_log_tells_what_was_found(caplog):
    _, compiled = compiled_twins(lambda: Block(nn.ReLU()))
    with caplog.at_level(logging.INFO, "fastgan.dynamo"):
        compiled(batch())
    assert caplog.messages[0].splitlines()[1:] == [
        "F.conv2d → F.batch_norm → ReLU → F.conv2d → F.batch_norm",
        "x + F.batch_norm(…) → ReLU",
    ]


class ReadsStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)

    def forward(self, x):
        before = self.norm.running_mean.clone()
        y = self.norm(self.conv(x))
        between = self.norm.running_mean * 1
        y = self.conv(F.pad(y, (1, 1, 1, 1)))
        y = self.norm(y) * (between - before).view(-1, 1, 1)
        return F.relu(y) + self.norm.running_mean.view(-1, 1, 1).clone()


def test_what_happens_between_layers_happens_there():
    assert_agree(*compiled_twins(ReadsStatistics), batch())
