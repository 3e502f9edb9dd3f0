"""fuse(model) is the same model: the same objects, the same values, and sooner done."""

import copy
import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fusing import assert_agree, batch, replicate, twins
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as spectral_norm_hook

import fastgan
from fastgan import backend
from fastgan.fuse import Fused, explain, fuse, unfuse
from fastgan.nn import ConvBnAct2d
from fastgan.nn.spectral_norm import norms

# ── Models as users have them ────────────────────────────────────────────────────────────────────────────────────────

nc, nz, ngf, ndf = 3, 16, 8, 8


class Generator(nn.Module):
    """PyTorch's DCGAN tutorial."""

    def __init__(self, ngpu=0):
        super().__init__()
        self.ngpu = ngpu
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 8),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    """PyTorch's DCGAN tutorial."""

    def __init__(self, ngpu=0):
        super().__init__()
        self.ngpu = ngpu
        self.main = nn.Sequential(
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, input):
        return self.main(input)


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        nn.init.normal_(m.weight.data, 0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        nn.init.normal_(m.weight.data, 1.0, 0.02)
        nn.init.constant_(m.bias.data, 0)


class Viewer(nn.Module):
    """Somebody's layer that needs a contiguous input."""

    def forward(self, x):
        return x.view(x.shape[0], -1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(x + self.body(x))


class Stack(nn.Sequential):
    """A subclass that adds nothing to forward."""


class Twice(nn.Sequential):
    def forward(self, input):
        return super().forward(super().forward(input))


def small():
    """A bit of everything, for the promises about objects."""
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, 1, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(True),
        nn.ConvTranspose2d(6, 5, 4, 2, 1),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 4, 3),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2, True),
    )


pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = ["conv2d_batch_norm_act", "conv_transpose2d_batch_norm_act", "conv2d_batch_norm_act"]

# ── The same values ──────────────────────────────────────────────────────────────────────────────────────────────────

CHAINS = {
    "small": (small, SMALL),
    "bias before the norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=True), nn.BatchNorm2d(6), nn.ReLU()),
        ["conv2d_batch_norm_act"],
    ),
    "norm without activation": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)),
        ["conv_transpose2d_batch_norm_act"],
    ),
    "norm first": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.3), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.BatchNorm2d(4)),
        ["batch_norm_act", "conv2d", "batch_norm_act"],
    ),
    "lone convolutions": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(True), nn.ConvTranspose2d(6, 2, 3), nn.Sigmoid()),
        ["conv2d", "conv_transpose2d"],
    ),
    "eps 0.8": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, 0.8), nn.LeakyReLU(0.2)),
        ["conv2d_batch_norm_act"],
    ),
    "cumulative average": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.ReLU()),
        ["conv2d_batch_norm_act"],
    ),
    "statistics not tracked": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU()),
        ["conv2d_batch_norm_act"],
    ),
    "not affine": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
        ["conv2d_batch_norm_act"],
    ),
    "geometry": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 1), (2, 1), groups=2),
            nn.BatchNorm2d(6),
            nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2),
            nn.BatchNorm2d(4),
        ),
        ["conv2d_batch_norm_act", "conv_transpose2d_batch_norm_act"],
    ),
    "padding by name and by reflection": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(4),
        ),
        ["conv2d_batch_norm_act", "conv2d_batch_norm_act"],
    ),
    "dropout draws the same": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3)),
        ["conv2d_batch_norm_act", "conv2d"],
    ),
    "layers between": (
        lambda: nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(4, 8, 3),
            nn.InstanceNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.PixelShuffle(2),
            nn.PReLU(),
            nn.MaxPool2d(2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2, 3, 3),
            nn.Flatten(),
            nn.Linear(672, 2),
        ),
        ["conv2d", "instance_norm_act", "conv2d", "pixel_shuffle_act", "upsample_conv2d"],
    ),
    "a layer that views": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Viewer(), nn.BatchNorm1d(6 * 6 * 7)),
        ["conv2d_batch_norm_act"],
    ),
    "chains in chains": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
            Stack(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)), nn.ReLU()),
            Residual(),
        ),
        [*["conv2d_batch_norm_act"] * 3, "batch_norm_act"],
    ),
    "a layer used twice": (
        lambda: nn.Sequential(*[nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU()] * 2),
        ["conv2d_batch_norm_act"] * 2,
    ),
    "weights that are recomputed": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.utils.spectral_norm(nn.ConvTranspose2d(6, 4, 3)),
            nn.BatchNorm2d(4),
            nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
        ),
        ["batch_norm_act", "batch_norm_act"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_fused_chain_computes_the_same(name, training, ran):
    make, expected = CHAINS[name]
    stock, fused = twins(make)
    x = batch()
    for model in (stock, fused):
        model(x)  # running statistics that are not 0 and 1
    assert_agree(stock.train(training), fused.train(training), x)
    assert ran == expected * (1 + 2 * 2)


def networks(init_first):
    """The tutorial's networks, stock and fused, weights by `apply` before fusing or after."""
    pairs = []
    for network in (Generator, Discriminator):
        stock, fused = twins(network)
        if init_first:
            torch.manual_seed(1)
            fused = fuse(copy.deepcopy(stock.apply(weights_init)))
        else:
            for model in (stock, fused):
                torch.manual_seed(1)
                model.apply(weights_init)
        pairs.append((stock, fused))
    return pairs


@pytest.mark.parametrize("init_first", [True, False])
def test_the_tutorial_s_networks_compute_the_same(init_first, ran):
    generators, discriminators = networks(init_first)
    assert_agree(*generators, torch.randn(4, nz, 1, 1, dtype=torch.float64))
    assert ran.count("conv_transpose2d_batch_norm_act") == 4 * ran.count("conv_transpose2d") > 0
    assert_agree(*discriminators, torch.randn(4, nc, 64, 64, dtype=torch.float64))
    assert ran.count("conv2d_batch_norm_act") * 2 == 3 * ran.count("conv2d") > 0


def test_the_bias_before_a_norm_counts_in_the_mean_and_has_no_gradient():
    _, fused = twins(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=1.0)))
    with torch.no_grad():
        fused[0].bias.fill_(7.0)
    fused(batch()).square().sum().backward()
    assert ((fused[1].running_mean - 7).abs() < 1).all()
    assert fused[0].bias.grad.abs().max() < 1e-9


def test_a_frozen_norm_in_a_training_model_stays_frozen():
    stock, fused = twins(small)
    for model in (stock, fused):
        model[1].eval().requires_grad_(False)
    before = copy.deepcopy(fused[1].state_dict())
    assert_agree(stock, fused, batch())
    torch.testing.assert_close(fused[1].state_dict(), before, rtol=0, atol=0)
    assert fused[4].num_batches_tracked > 0


@pytest.mark.parametrize("place", ["model", "input", "both", "neither"])
def test_the_layout_of_the_output_is_stock_s(place):
    stock, fused = twins(small, torch.float32)
    x = batch(torch.float32)
    if place in ("model", "both"):
        stock.to(memory_format=torch.channels_last)
        fused.to(memory_format=torch.channels_last)
    if place in ("input", "both"):
        x = x.to(memory_format=torch.channels_last)
    outputs = [model(x) for model in (stock, fused)]
    assert outputs[1].stride() == outputs[0].stride()
    torch.testing.assert_close(outputs[1], outputs[0])


BETWEEN = {
    "nothing": lambda channels: [],
    "in place": lambda channels: [nn.LeakyReLU(0.2, True)],
    "an activation": lambda channels: [nn.ReLU()],
    "a norm": lambda channels: [nn.BatchNorm2d(channels), nn.ReLU(True)],
}


@pytest.mark.parametrize("place", ["model", "input"])
@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (6, 8)], ids=["one channel", "one pixel"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_what_lies_in_two_layouts_is_taken_for_the_one_that_stock_takes_it_for(between, channels, kernel, place):
    """The next convolution gives that one, and dropout draws in the order of memory."""
    make = [nn.Conv2d(4, channels, kernel), *between(channels), nn.ConvTranspose2d(channels, 4, 3), nn.Dropout(0.5)]
    stock, fused = twins(lambda: nn.Sequential(*make))
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    if place == "model":
        stock, fused = (model.to(memory_format=torch.channels_last) for model in (stock, fused))
    else:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_agree(stock, fused, x, steps=1)
    assert fused[:-2](x).stride() == stock[:-2](x).stride()


def test_outputs_and_gradients_can_be_viewed():
    _, fused = twins(small)
    x = batch().requires_grad_()
    y = fused(x)
    (slope,) = torch.autograd.grad(y.view(-1).square().sum(), x, create_graph=True)
    slope.view(len(x), -1).norm(2, dim=1).sum().backward()  # as gradient penalties are written
    assert x.grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_near_the_truth_as_stock(dtype):
    stock, fused = twins(small)
    x = batch(n=16)
    truth = stock(x)
    errors = []
    for model in (stock, fused):
        y = model.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        errors.append((y.double() - truth).square().mean().sqrt())
    assert errors[1] <= 2 * errors[0]


def test_half_precision_with_norms_kept_in_float32():
    stock, fused = twins(small, torch.bfloat16)
    for model in (stock, fused):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    x = batch(torch.bfloat16)
    outputs = [model(x) for model in (stock, fused)]
    assert outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.05, atol=0.05)


def test_autocast_keeps_statistics_in_float32(ran):
    stock, fused = twins(small, torch.float32)
    x = batch(torch.float32, n=16)
    truth = copy.deepcopy(stock).double()(x.double())
    errors = []
    for model in (stock, fused):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        errors.append((y.double() - truth).square().mean().sqrt())
    assert ran == SMALL
    assert errors[1] <= 2 * errors[0]
    assert fused[1].running_mean.dtype == torch.float32


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def train(generator, discriminator, dtype, steps=30):
    """The tutorial's loop; the losses, and the weights and statistics it ends with."""
    torch.manual_seed(2)
    optimizers = [torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (discriminator, generator)]
    losses = []
    for _ in range(steps):
        real = torch.rand(8, nc, 64, 64, dtype=dtype) * 2 - 1
        noise = torch.randn(8, nz, 1, 1, dtype=dtype)
        ones, zeros = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
        discriminator.zero_grad()
        fake = generator(noise)
        loss_d = F.binary_cross_entropy(discriminator(real).view(-1), ones)
        loss_d = loss_d + F.binary_cross_entropy(discriminator(fake.detach()).view(-1), zeros)
        loss_d.backward()
        optimizers[0].step()
        generator.zero_grad()
        loss_g = F.binary_cross_entropy(discriminator(fake).view(-1), ones)
        loss_g.backward()
        optimizers[1].step()
        losses += [loss_d.detach(), loss_g.detach()]
    state = [*generator.state_dict().values(), *discriminator.state_dict().values()]
    return torch.stack(losses), torch.cat([tensor.double().flatten() for tensor in state])


def test_thirty_steps_in_float64_end_in_the_same_place():
    (stock_g, fused_g), (stock_d, fused_d) = networks(init_first=True)
    losses, state = train(stock_g, stock_d, torch.float64)
    fused_losses, fused_state = train(fused_g, fused_d, torch.float64)
    torch.testing.assert_close(fused_losses, losses, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(fused_state, state, rtol=1e-9, atol=1e-11)


def test_thirty_steps_in_float32_stay_as_near_to_stock_as_stock_does_under_other_rounding():
    # Adversarial training amplifies rounding: a stock run whose weights are off by one rounding step is the yardstick.
    def run(change):
        torch.manual_seed(4)
        return train(*(change(network().apply(weights_init)) for network in (Generator, Discriminator)), torch.float32)

    def nudge(model, towards):
        for parameter in model.parameters():
            parameter.data = torch.nextafter(parameter.data, torch.tensor(towards))
        return model

    def distances(found):
        return [((f - s).norm() / s.norm()).item() for f, s in zip(found, stock, strict=True)]

    stock, fused = run(lambda model: model), run(fuse)
    torch.testing.assert_close(fused[0][:2], stock[0][:2], rtol=1e-5, atol=0)
    changes = [
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: nudge(model, float("inf")),
        lambda model: nudge(model, float("-inf")),
    ]
    others = [distances(run(change)) for change in changes]
    for distance, *yardsticks in zip(distances(fused), *others, strict=True):
        assert distance <= 3 * max(yardsticks) < 0.1


# ── The same objects ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_fuse_and_unfuse_return_the_model_itself():
    model = small()
    assert fuse(model) is model and type(model) is not nn.Sequential and isinstance(model, nn.Sequential)
    assert fuse(model) is model and type(model).__mro__.count(Fused) == 1
    assert unfuse(model) is model and type(model) is nn.Sequential
    assert unfuse(model) is model


def test_unfuse_leaves_no_trace():
    model = nn.Sequential(Stack(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), Residual())
    before = {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    text = repr(model)
    unfuse(fuse(model))
    assert {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()} == before
    assert repr(model) == text


def test_parameters_buffers_and_layers_stay_the_same_objects():
    model = Generator()
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    layers = list(model.main)
    fuse(model)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert list(model.state_dict()) == list(tensors)
    assert all(after is before for after, before in zip(model.main, layers, strict=True))
    assert [type(layer) for layer in model.main] == [type(layer) for layer in Generator().main]


def test_state_dict_loads_both_ways():
    stock, fused = Generator(), fuse(Generator())
    fused(torch.randn(2, nz, 1, 1))
    stock.load_state_dict(fused.state_dict())
    fuse(Generator()).load_state_dict(stock.state_dict())
    assert stock.main[1].num_batches_tracked == 1


def test_an_optimizer_made_before_fusing_trains_the_fused_model():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fuse(model)
    before = copy.deepcopy(model.state_dict())
    model(batch(torch.float32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_deepcopies_stay_fused_and_separate(ran):
    stock, fused = twins(small)
    clone, shallow = copy.deepcopy(fused), copy.copy(fused)
    assert isinstance(clone, Fused) and clone[0].weight is not fused[0].weight and shallow[0] is fused[0]
    assert_agree(stock, clone, batch())
    assert ran[:3] == SMALL
    assert fused[1].num_batches_tracked == 0
    assert type(unfuse(clone)) is nn.Sequential and isinstance(fused, Fused)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_come_back_fused(protocol):
    _, fused = twins(lambda: Stack(*small()))
    fused.note = "kept"
    fused.eval()
    back = pickle.loads(pickle.dumps(fused, protocol))
    assert type(back) is type(fused) and back.note == "kept" and not back.training
    x = batch()
    assert torch.equal(back(x), fused(x))


class Rebuilt(nn.Sequential):
    """A container that says itself how it is pickled."""

    def __reduce__(self):
        return type(self), tuple(self)


def test_a_container_that_pickles_itself_comes_back_fused():
    _, fused = twins(lambda: Rebuilt(*small()))
    back = pickle.loads(pickle.dumps(fused))
    assert type(unfuse(back)) is Rebuilt and torch.equal(back[0].weight, fused[0].weight)


def test_a_saved_model_loads_in_a_fresh_process(tmp_path):
    _, fused = twins(small)
    x = batch()
    torch.save({"model": fused.eval(), "x": x, "y": fused(x)}, tmp_path / "model.pt")
    script = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
print(str(saved["model"]).splitlines()[0])
torch.testing.assert_close(saved["model"](saved["x"]), saved["y"])
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, tmp_path / "model.pt"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("FusedSequential(", 0), done.stderr


def test_train_eval_dtype_and_freezing_reach_every_layer():
    fused = fuse(small())
    assert not any(module.training for module in fused.eval().modules())
    assert {p.dtype for p in fused.to(torch.float64).parameters()} == {torch.float64}
    assert {p.dtype for p in fused.half().parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in fused.requires_grad_(False).parameters())


def test_code_that_goes_by_the_names_of_classes_finds_them():
    model = nn.Sequential(*small(), Residual())
    classes = [type(module) for module in model.modules()]
    fused = [type(module) for module in fuse(model).modules()]
    assert sum(one is not other for one, other in zip(fused, classes, strict=True)) == 3
    for attribute in ("__name__", "__qualname__"):
        assert [getattr(kind, attribute) for kind in fused] == [getattr(kind, attribute) for kind in classes]


def test_print_shows_what_was_fused_and_the_layers_as_before():
    lines = repr(fuse(small())).splitlines()
    assert lines[:4] == [
        "FusedSequential(",
        "  fused (0–2): Conv2d → BatchNorm2d → ReLU",
        "  fused (3–4): ConvTranspose2d → BatchNorm2d",
        "  fused (5–7): Conv2d → BatchNorm2d → LeakyReLU",
    ]
    assert lines[4:] == repr(small()).splitlines()[1:]


def test_a_container_s_own_features_work():
    stock, fused = twins(small)
    x = batch().requires_grad_()
    assert len(fused) == 8 and isinstance(fused[0], nn.Conv2d) and list(fused.children()) == list(fused)
    torch.testing.assert_close(fused[:3](x), stock[:3](x))
    torch.testing.assert_close((fused + nn.Sequential(nn.Tanh()))(x), torch.tanh(stock(x)))
    for model in (stock, fused):
        model.append(nn.Conv2d(4, 4, 3, dtype=torch.float64).requires_grad_(False))
        nn.init.ones_(model[-1].weight)
        nn.init.zeros_(model[-1].bias)
        model[2] = nn.ReLU6()
        del model[4]
        model.insert(1, nn.Identity())
        model[-2].negative_slope = 0.5
        model[-3].eps, model[-3].momentum = 0.3, None
    assert_agree(stock, fused, batch())


def test_named_containers_keep_their_names():
    layers = OrderedDict(conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4), act=nn.ReLU())
    model = fuse(nn.Sequential(layers))
    assert model.norm is layers["norm"] and "fused (conv–act)" in repr(model)


# ── Hooks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def watch(module, kind, seen):
    """Note every tensor that a hook of this kind is given."""

    def note(module, *args):
        for arg in args:
            tensors = arg if isinstance(arg, tuple) else (arg,)
            seen.extend((tensor.detach().clone(), tensor.stride()) for tensor in tensors if tensor is not None)

    getattr(module, f"register_{kind}_hook")(note)


KINDS = ["forward_pre", "forward", "full_backward_pre", "full_backward"]


def assert_same_sightings(sightings):
    expected, found = sightings
    assert expected and len(found) == len(expected)
    for (tensor, stride), (fused_tensor, fused_stride) in zip(expected, found, strict=True):
        torch.testing.assert_close(fused_tensor, tensor, rtol=1e-9, atol=1e-12)
        assert fused_stride == stride


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", range(8))
def test_a_hook_on_any_layer_sees_what_it_would_in_stock(index, kind):
    models = twins(small)
    x, sightings = batch(), ([], [])
    for model, seen in zip(models, sightings, strict=True):
        model[2].inplace = model[7].inplace = False  # stock refuses it behind a backward hook
        watch(model[index], kind, seen)
        model(x.clone().requires_grad_()).square().sum().backward()
    assert_same_sightings(sightings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_the_container_sees_what_it_would_in_stock(kind):
    models = twins(lambda: nn.Sequential(small(), nn.Conv2d(4, 4, 3)))
    x, sightings = batch(), ([], [])
    for model, seen in zip(models, sightings, strict=True):
        watch(model[0], kind, seen)
        model(x.clone().requires_grad_()).square().sum().backward()
    assert_same_sightings(sightings)


def test_a_hook_on_all_modules_sees_every_layer():
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: calls.append(type(module)))
    try:
        fuse(small()).double()(batch())
    finally:
        handle.remove()
    assert calls[:-1] == [type(layer) for layer in small()]


def test_a_hook_may_replace_the_output(ran):
    stock, fused = twins(small)
    handles = [model[1].register_forward_hook(lambda module, args, y: y * 2) for model in (stock, fused)]
    assert_agree(stock, fused, batch())
    assert ran[:3] == ["conv2d", *SMALL[1:]]
    handles[1].remove()
    ran.clear()
    fused(batch())
    assert ran == SMALL


def test_a_forward_put_on_a_layer_is_called():
    fused = fuse(small()).double()
    fused[1].forward = lambda x: x * 0
    assert not fused[:3](batch()).any()


# ── Parallel and averaged models ─────────────────────────────────────────────────────────────────────────────────────


def test_replicas_of_data_parallel_compute_the_same(ran):
    stock, fused = twins(small)
    x = batch()
    torch.testing.assert_close(replicate(fused)(x), stock(x))
    assert ran == SMALL
    torch.testing.assert_close(list(fused.buffers()), list(stock.buffers()))
    torch.testing.assert_close(fuse(nn.DataParallel(unfuse(fused)))(x), stock(x))


def test_fuse_looks_into_wrappers():
    model = fuse(nn.DataParallel(Generator()))
    assert isinstance(model.module.main, Fused)
    unfuse(model)
    assert type(model.module.main) is nn.Sequential


def test_distributed_training_computes_the_same(ran):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stock, fused = twins(small)
        x = batch()
        for model in (DistributedDataParallel(stock), DistributedDataParallel(fused)):
            model(x).square().sum().backward()
        assert ran == SMALL
        torch.testing.assert_close([p.grad for p in fused.parameters()], [p.grad for p in stock.parameters()])
        wrapped = DistributedDataParallel(unfuse(fused))
        fuse(wrapped)(x)
        assert ran == SMALL * 2
    finally:
        dist.destroy_process_group()


def test_synchronised_norms_replace_the_layers_and_are_fused(ran):
    stock, fused = twins(small)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert [type(fused[i]) for i in (1, 4, 6)] == [nn.SyncBatchNorm] * 3
    assert all(row.fused for row in explain(fused))
    x = batch()
    torch.testing.assert_close(fused(x), stock(x))  # one process: nothing to synchronise
    assert ran == SMALL


def test_averaged_models_stay_fused(ran):
    _, fused = twins(small)
    average = torch.optim.swa_utils.AveragedModel(fused, use_buffers=True)
    average.update_parameters(fused)
    start = fused[0].weight.detach().clone()
    with torch.no_grad():
        fused[0].weight.add_(1)
    average.update_parameters(fused)
    torch.testing.assert_close(average.module[0].weight, start + 0.5)
    average(batch())
    assert ran == SMALL
    assert fused[1].num_batches_tracked == 0


# ── The rest of PyTorch ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(backend.serving("cpu") == "reference", reason="the definitions are stock torch")
def test_compiles_as_one_graph_of_fused_operators():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    stock, fused = twins(lambda: nn.Sequential(small(), nn.Tanh(), Viewer()))
    fused.compile(backend=keep, fullgraph=True)
    assert_agree(stock, fused, batch())
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("batch_norm_act" in name for name in called) == 3
    assert not any(name.endswith("batch_norm") for name in called)


def test_compiles_with_its_gradient():
    torch.compiler.reset()
    stock, fused = twins(small)
    x = batch()
    for model in (stock, torch.compile(fused, backend="aot_eager", fullgraph=True)):
        model(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in fused.parameters()], [p.grad for p in stock.parameters()])
    torch.testing.assert_close(list(fused.buffers()), list(stock.buffers()))


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict):
    torch.compiler.reset()
    stock, fused = (model.eval() for model in twins(small))
    x = batch()
    program = torch.export.export(fused, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), stock(x))
    assert ("fastgan" in str(program.graph)) == (backend.serving("cpu") != "reference")


def test_exports_for_any_batch_in_evaluation():
    """Whether folding the norm pays depends on the batch, which is not known yet."""
    model = fuse(Generator().eval())
    batch = {0: torch.export.Dim("n", min=2, max=64)}
    exported = torch.export.export(model, (torch.randn(4, 16, 1, 1),), dynamic_shapes=(batch,)).module()
    for n in (2, 9, 33):
        x = torch.randn(n, 16, 1, 1)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        assert fuse(Generator())(torch.randn(4, 16, 1, 1)).shape == (4, 3, 64, 64)


def test_a_method_replaced_on_a_layer_is_called():
    """Code in use pads images in circles so, without a change of the model."""
    stock = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    conv = stock[0]
    conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias)
    x = torch.randn(2, 3, 6, 6)
    expected = stock(x)
    torch.testing.assert_close(fuse(stock)(x), expected)
    assert "a _conv_forward of its own" in str(explain(stock))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize(
    "capture",
    [
        lambda model, x: torch.jit.script(model),
        lambda model, x: torch.jit.trace(model, x),
        lambda model, x: torch.fx.symbolic_trace(model),
    ],
    ids=["script", "trace", "fx"],
)
def test_tracers_see_the_stock_layers(capture):
    stock, fused = (model.eval() for model in twins(lambda: nn.Sequential(small(), nn.Tanh())))
    x = batch()
    captured = capture(fused, x)
    torch.testing.assert_close(captured(x), stock(x))
    assert "fastgan::" not in str(torch.jit.script(captured).inlined_graph)
    assert isinstance(fused, Fused) and isinstance(fused[0], Fused)


def test_functional_call_swaps_the_tensors(ran):
    stock, fused = twins(small)
    x, other = batch(), twins(small)[0].state_dict()
    for tensor in other.values():
        tensor.mul_(2)
    outputs = [torch.func.functional_call(model, copy.deepcopy(other), (x,)) for model in (stock, fused)]
    torch.testing.assert_close(outputs[1], outputs[0])
    assert ran == SMALL


def forward_mode(model, x):
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


@pytest.mark.parametrize(
    "transform",
    [
        lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
        lambda model, x: torch.func.vmap(model)(torch.stack([x, x])),
        lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
        lambda model, x: torch.autograd.functional.jvp(model, x, torch.ones_like(x)),
        forward_mode,
    ],
    ids=["grad", "vmap", "jvp", "double backward jvp", "forward mode"],
)
def test_function_transforms_give_what_they_give_for_stock(transform):
    stock, fused = (model.eval() for model in twins(small))
    x = batch()
    torch.testing.assert_close(transform(fused, x), transform(stock, x))


def test_checkpointing_recomputes(ran):
    stock, fused = twins(small)
    x = batch().requires_grad_()
    stock(x).square().sum().backward()
    torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close([p.grad for p in fused.parameters()], [p.grad for p in stock.parameters()])
    assert ran == SMALL * 2


# ── What is left alone ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_image_without_a_batch_axis_goes_through_the_layers(ran):
    stock, fused = twins(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()))
    image = torch.randn(4, 4, 9, dtype=torch.float64)  # where the channels would stand are as many rows
    torch.testing.assert_close(fused(image), stock(image))
    assert ran == []


@pytest.mark.parametrize(
    "bad",
    [
        batch(channels=3),
        batch().long(),
        batch(torch.float32),
        batch()[0],
        batch().to("meta"),
        "not a tensor",
    ],
    ids=["channels", "integers", "dtype", "dimensions", "device", "string"],
)
def test_bad_input_gets_stock_s_own_error(bad):
    messages = []
    for model in twins(small):
        with pytest.raises(Exception) as raised:
            model(bad)
        messages.append((raised.type, str(raised.value)))
    assert messages[1] == messages[0]


def test_one_value_per_channel_in_training_is_an_error_as_in_stock():
    for model in twins(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.randn(1, 4, 3, 3, dtype=torch.float64))


def test_layers_that_do_not_fit_each_other_get_stock_s_own_error():
    for model in twins(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(5), nn.ReLU())):
        with pytest.raises(RuntimeError, match="running_mean should contain 6 elements not 5"):
            model(batch())


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_explain_names_every_layer_and_the_reason():
    model = nn.Module()
    model.chain = nn.Sequential(
        *small(), nn.InstanceNorm2d(4, track_running_stats=True), Scaled(4, 4, 3), nn.Dropout(), nn.BatchNorm2d(4)
    )
    model.hooked = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
    model.normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.ReLU())
    model.residual = Residual()
    model.twice = Twice(nn.Conv2d(4, 4, 3))
    model.ours = nn.Sequential(nn.Linear(2, 2), ConvBnAct2d(4, 4, 3))
    model.head = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    assert [row for row in explain(model) if row.fused] == [("ours.1", "ConvBnAct2d", True, "")]
    assert {row.reason for row in explain(model) if "–" in row.place} == {"fastgan.fuse has not been called"}
    rows = explain(fuse(model))
    assert list(rows) == [
        ("chain.0–2", "Conv2d → BatchNorm2d → ReLU", True, ""),
        ("chain.3–4", "ConvTranspose2d → BatchNorm2d", True, ""),
        ("chain.5–7", "Conv2d → BatchNorm2d → LeakyReLU", True, ""),
        ("chain.8", "InstanceNorm2d", True, ""),
        ("chain.9", "Scaled", False, "Scaled is a subclass of Conv2d"),
        ("chain.11", "BatchNorm2d", True, ""),
        ("hooked.0", "Conv2d", False, "it has a forward pre-hook"),
        ("hooked.1–2", "BatchNorm2d → ReLU", True, ""),
        ("normed.0", "ParametrizedConv2d", False, "its weight is parametrized"),
        ("residual.norm", "BatchNorm2d", True, ""),
        ("residual.body.0–2", "Conv2d → BatchNorm2d → ReLU", True, ""),
        ("twice.0", "Conv2d", False, "Twice has a forward of its own"),
        ("ours.1", "ConvBnAct2d", True, ""),
        ("hooked.0.weight", "spectral norm", True, ""),
        ("normed.0.weight", "spectral norm", True, ""),
    ]
    lines = str(rows).splitlines()
    assert lines[0].split() == ["place", "pattern"] and lines[-1] == "11 of 15 fused"
    assert lines[5].split("  ")[-1] == "not fused: Scaled is a subclass of Conv2d"
    assert type(model.head) is nn.Sequential and type(model.twice) is Twice


def test_a_bare_layer_is_returned_unchanged():
    layer = nn.Conv2d(3, 4, 3)
    assert fuse(layer) is layer and type(layer) is nn.Conv2d
    assert list(explain(layer)) == [("(the model)", "Conv2d", False, "it is not in an nn.Sequential")]
    assert list(explain(nn.Linear(2, 2))) == []


def test_a_container_with_a_forward_or_call_of_its_own_is_left_alone():
    class Calls(nn.Sequential):
        def __call__(self, x):
            return super().__call__(x) * 2

    patched = small()
    patched.forward = lambda x: x
    for model in (Calls(*small()), Twice(*small()), patched):
        kind = type(model)
        assert type(fuse(model)) is kind


def test_a_class_that_others_make_from_a_fused_one_is_theirs_to_take_back():
    model = fuse(small())
    model.__class__ = type("Wrapped", (type(model),), {})
    assert type(unfuse(model)).__name__ == "Wrapped"


def test_lazy_layers_are_fused_once_they_know_their_size(ran):
    torch.manual_seed(0)
    fused = fuse(nn.Sequential(nn.LazyConv2d(6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    x = batch(torch.float32)
    for _ in range(2):
        fused(x)
    assert ran == ["batch_norm_act", "conv2d_batch_norm_act"]


@pytest.mark.parametrize("function", [fuse, unfuse, explain])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, not list$"):
        function([nn.Conv2d(1, 1, 1)])


# ── Spectral norms ───────────────────────────────────────────────────────────────────────────────────────────────────

SPECTRAL = {"parametrisation": parametrizations.spectral_norm, "hook": spectral_norm_hook}


class SpectralCritic(nn.Module):
    """As critics are written: a chain, a block with a residual, and a layer of its own."""

    def __init__(self, norm):
        super().__init__()
        self.main = nn.Sequential(
            norm(nn.Conv2d(4, 5, 3, padding=1)), nn.LeakyReLU(0.1),
            norm(nn.Conv2d(5, 5, 4, stride=2, padding=1)), nn.InstanceNorm2d(5), nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.last = norm(nn.Linear(5, 1))

    def forward(self, x):
        return self.last(self.main(x).mean((2, 3)))


@pytest.mark.parametrize("kind", SPECTRAL)
def test_spectral_norms_are_taken_over_and_given_back(kind):
    stock, fused = twins(lambda: SpectralCritic(SPECTRAL[kind]))
    keys, kinds = list(stock.state_dict()), [type(found.norm) for found in norms(stock)]
    assert_agree(stock, fused, batch(), steps=3)
    assert list(fused.state_dict()) == keys
    stock.load_state_dict(fused.state_dict())
    fused.load_state_dict(stock.state_dict())
    assert all(isinstance(found.norm, kind) for found, kind in zip(norms(fused), kinds, strict=True))
    unfuse(fused)
    assert [type(found.norm) for found in norms(fused)] == kinds
    assert not fused._forward_pre_hooks and not fused._forward_hooks and not fused._forward_hooks_always_called
    assert_agree(stock, fused, batch())


def test_unfuse_leaves_what_spectral_norm_all_has_made():
    model = fastgan.spectral_norm_all(SpectralCritic(SPECTRAL["parametrisation"]))
    before = [type(found.norm) for found in norms(model)], list(model._forward_pre_hooks.values())
    unfuse(fuse(model))
    assert ([type(found.norm) for found in norms(model)], list(model._forward_pre_hooks.values())) == before


@pytest.mark.parametrize("kind", SPECTRAL)
def test_explain_names_spectral_norms(kind):
    model = SpectralCritic(SPECTRAL[kind])
    rows = [row for row in explain(model) if row.pattern == "spectral norm"]
    assert [row.place for row in rows] == ["main.0.weight", "main.2.weight", "last.weight"]
    assert {(row.fused, row.reason) for row in rows} == {(False, "fastgan.fuse has not been called")}
    assert all(row.fused for row in explain(fuse(model)) if row.pattern == "spectral norm")


def test_spectral_norms_under_distributed_training():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stock, fused = twins(lambda: SpectralCritic(SPECTRAL["parametrisation"]))
        real, fake = batch(), batch()
        for model in (DistributedDataParallel(stock), DistributedDataParallel(fused)):
            (model(real).mean() - model(fake).mean()).backward()
        for a, b in zip(stock.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad)
        torch.testing.assert_close(dict(fused.named_buffers()), dict(stock.named_buffers()))
    finally:
        dist.destroy_process_group()
