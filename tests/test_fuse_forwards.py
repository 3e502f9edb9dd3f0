"""`fuse` on instance norms, on resampled images, and on what a hand-written forward adds, scales and convolves."""

import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fusing import assert_agree, batch, twins
from torch import nn

from fastgan import backend
from fastgan.fuse import explain, fuse

C = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def agree(make, expected, ran, steps=2):
    """The fused twin computes the same, by the `expected` operators at each of its calls."""
    stock, fused = twins(make)
    assert_agree(stock, fused, batch(), steps)
    assert ran == expected * (2 * steps)


# ── Instance norms in chains ─────────────────────────────────────────────────────────────────────────────────────────

INSTANCE_CHAINS = {
    "after a convolution": (
        lambda: [nn.Conv2d(C, 6, 3), nn.InstanceNorm2d(6), nn.ReLU(True)],
        ["conv2d", "instance_norm_act"],
    ),
    "affine": (
        lambda: [nn.Conv2d(C, 6, 3, bias=False), nn.InstanceNorm2d(6, affine=True), nn.LeakyReLU(0.2)],
        ["conv2d", "instance_norm_act"],
    ),
    "CycleGAN's up-sampling": (
        lambda: [nn.ConvTranspose2d(C, 6, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(6), nn.ReLU()],
        ["conv_transpose2d", "instance_norm_act"],
    ),
    "reflected borders": (
        lambda: [nn.ReflectionPad2d(1), nn.Conv2d(C, 6, 3), nn.InstanceNorm2d(6), nn.ReflectionPad2d(2), nn.Tanh()],
        ["conv2d", "instance_norm_act"],
    ),
    "first": (
        lambda: [nn.InstanceNorm2d(C), nn.ReLU(), nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6)],
        ["instance_norm_act", "conv2d_batch_norm_act"],
    ),
    "eps": (lambda: [nn.InstanceNorm2d(C, 0.8)], ["instance_norm_act"]),
}


@pytest.mark.parametrize("name", INSTANCE_CHAINS)
def test_a_chain_with_an_instance_norm_computes_the_same(name, ran):
    make, expected = INSTANCE_CHAINS[name]
    agree(lambda: nn.Sequential(*make()), expected, ran)


# ── Group and layer norms in chains ──────────────────────────────────────────────────────────────────────────────────

SAMPLE_CHAINS = {
    "a group norm after a convolution": (
        lambda: [nn.Conv2d(C, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(True)],
        ["conv2d", "group_norm_act"],
    ),
    "a group norm first": (
        lambda: [nn.GroupNorm(1, C, 0.8, affine=False), nn.LeakyReLU(0.2), nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6)],
        ["group_norm_act", "conv2d_batch_norm_act"],
    ),
    "a group norm and another activation": (
        lambda: [nn.Conv2d(C, 6, 3), nn.GroupNorm(3, 6), nn.PReLU(6), nn.GroupNorm(6, 6), nn.SiLU()],
        ["conv2d", "group_norm_act", "group_norm_act"],
    ),
    "a layer norm of the samples": (
        lambda: [nn.Conv2d(C, 6, 3), nn.LayerNorm((6, 6, 7)), nn.LeakyReLU(0.2)],
        ["conv2d", "layer_norm_act"],
    ),
    "a layer norm without parameters": (
        lambda: [nn.Conv2d(C, 6, 3, 2), nn.LayerNorm((6, 3, 4), 0.1, elementwise_affine=False)],
        ["conv2d", "layer_norm_act"],
    ),
    "a layer norm without a bias": (
        lambda: [nn.LayerNorm((C, 8, 9), bias=False), nn.ReLU()],
        ["layer_norm_act"],
    ),
    "a layer norm of the lines": (lambda: [nn.Conv2d(C, 6, 3), nn.LayerNorm(7), nn.ReLU()], ["conv2d"]),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", SAMPLE_CHAINS)
def test_a_chain_with_a_norm_of_samples_computes_the_same(name, layout, ran):
    make, expected = SAMPLE_CHAINS[name]
    stock, fused = twins(lambda: nn.Sequential(*make()).to(memory_format=layout))
    x = batch().contiguous(memory_format=layout)
    assert_agree(stock, fused, x)
    assert ran == expected * 4
    with pytest.raises(RuntimeError) as of_stock:
        stock(x[:, :3])
    with pytest.raises(RuntimeError, match=re.escape(str(of_stock.value))):
        fused(x[:, :3])


class NormFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gain, self.offset = (
            nn.Conv2d(C, 6, 3),
            nn.Parameter(torch.rand(6)),
            nn.Parameter(torch.randn(6)),
        )
        self.gains = nn.Parameter(torch.rand(6, 6, 7))

    def forward(self, x):
        y = F.relu(F.group_norm(self.conv(x), 3, self.gain, self.offset, eps=1e-3))
        y = F.group_norm(F.layer_norm(y, (6, 6, 7)), num_groups=2)
        return F.leaky_relu(F.layer_norm(y, [6, 6, 7], self.gains, self.gains + 1, 0.1), 0.2)


class NormFunctionsOfStock(NormFunctions):
    """None is a norm of samples with both parameters or neither."""

    def forward(self, x):
        y = F.group_norm(self.conv(x), 3, self.gain)
        return F.relu(F.layer_norm(F.layer_norm(y, (7,)), y.shape[1:], self.gains))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (NormFunctions, ["conv2d", "group_norm_act", "layer_norm_act", "group_norm_act", "layer_norm_act"]),
        (NormFunctionsOfStock, ["conv2d"]),
    ],
)
def test_norms_of_samples_that_are_functions_run_by_the_operators(kind, expected, ran):
    agree(kind, expected, ran)


def test_groups_that_do_not_divide_the_channels_are_stock_s_error():
    class Odd(nn.Module):
        def forward(self, x):
            return F.group_norm(x.relu(), 3)

    for model in twins(Odd):
        with pytest.raises(RuntimeError, match="divisible"):
            model(batch())


def test_a_group_that_is_the_batch_is_stock_s_own_error():
    stock, fused = twins(lambda: nn.Sequential(nn.GroupNorm(C, C), nn.ReLU()))
    x = torch.randn(1, C, 1, 1, dtype=torch.float64)
    for model in (stock, fused):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model(x)


def test_a_group_norm_of_another_dtype_than_x_is_stock_s(ran):
    stock, fused = twins(lambda: nn.Sequential(nn.GroupNorm(2, C), nn.ReLU()), torch.float32)
    x = batch(torch.bfloat16)
    torch.testing.assert_close(fused(x), stock(x), rtol=0, atol=0)
    assert ran == []


def test_an_instance_norm_gives_a_contiguous_output_as_in_stock():
    stock, fused = twins(lambda: nn.Sequential(nn.Conv2d(C, 6, 3), nn.InstanceNorm2d(6), nn.ReLU()))
    x = batch().contiguous(memory_format=torch.channels_last)
    assert fused(x).stride() == stock(x).stride()


class TrackedBlock(nn.Module):
    """As StarGAN's."""

    def __init__(self, **settings):
        super().__init__()
        norm = partial(nn.InstanceNorm2d, C, track_running_stats=True, **settings)
        self.main = nn.Sequential(nn.Conv2d(C, C, 3, 1, 1), norm(), nn.ReLU(True), nn.Conv2d(C, C, 1), norm())

    def forward(self, x):
        return x + self.main(x)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"affine": True}, {"momentum": None}, {"affine": True, "momentum": 0.5}], ids=str
)
def test_running_statistics_of_planes_are_kept_as_in_stock(settings, automatic, monkeypatch):
    monkeypatch.setattr(backend, "is_automatic", lambda: automatic)  # and then little norms are left to stock
    norm = nn.InstanceNorm2d(C, track_running_stats=True, **settings)
    up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(C, C, 3, 1, 1), copy.deepcopy(norm), nn.LeakyReLU(0.2))
    stock, fused = twins(lambda: nn.Sequential(norm, nn.ReLU(), TrackedBlock(**settings), up, TrackedBlock(**settings)))
    assert_agree(stock, fused, batch())
    assert_agree(stock.eval(), fused.eval(), batch())
    for model in (stock, fused):
        for module in model.modules():
            if isinstance(module, nn.InstanceNorm2d):
                module.train()
    assert_agree(stock, fused, batch())


def test_planes_of_one_pixel_raise_stock_s_error_in_training_and_have_statistics_in_evaluation():
    stock, fused = twins(lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.InstanceNorm2d(C, track_running_stats=True)))
    x = batch()[..., :1, :1]
    for model in (stock, fused):
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            model(x)
    torch.testing.assert_close(fused.eval()(x), stock.eval()(x))


# ── Convolutions beside a pool or an upsampling ──────────────────────────────────────────────────────────────────────

RESAMPLING_CHAINS = {
    "an upsampling generator": (
        lambda: [
            *[nn.Upsample(scale_factor=2), nn.Conv2d(C, 6, 3, 1, 1), nn.BatchNorm2d(6, 0.8), nn.LeakyReLU(0.2, True)],
            *[nn.Upsample(scale_factor=(2, 2)), nn.Conv2d(6, 6, 5, padding=2, groups=2, bias=False), nn.BatchNorm2d(6)],
            *[nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(6, C, (3, 2)), nn.Tanh()],
        ],
        ["conv_transpose2d_batch_norm_act"] * 2 + ["upsample_conv2d"],
    ),
    "instance norms": (
        lambda: [
            *[nn.Upsample(scale_factor=2), nn.Conv2d(C, 6, 3, 1, 1), nn.InstanceNorm2d(6), nn.ReLU()],
            *[nn.Upsample(scale_factor=2), nn.Conv2d(6, 6, 3, 1, 1), nn.InstanceNorm2d(6, affine=True)],
        ],
        ["upsample_conv2d", "instance_norm_act"] * 2,
    ),
    "a pooling critic": (
        lambda: [
            nn.Conv2d(C, 6, 3, 1, 1),
            nn.AvgPool2d(2),
            nn.ReLU(),
            nn.Conv2d(6, 6, 2, 1, 1),
            nn.AvgPool2d((2, 2), 2),
        ],
        ["conv2d_avg_pool2d"] * 2,
    ),
    "other settings": (
        lambda: [
            *[nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(C, 6, 3)],
            *[nn.Upsample(scale_factor=3), nn.Conv2d(6, 6, 3)],
            *[nn.Upsample(size=(40, 40)), nn.Conv2d(6, 6, 3, 2), nn.AvgPool2d(2)],
            *[nn.Upsample(scale_factor=2), nn.Conv2d(6, 6, 3, 1, 1, padding_mode="reflect"), nn.AvgPool2d(3)],
            *[nn.Upsample(scale_factor=2), nn.Conv2d(6, 6, 1), nn.AvgPool2d(2)],
            *[nn.Upsample(scale_factor=2), nn.Conv2d(6, 6, 3, padding="same"), nn.AvgPool2d(2, ceil_mode=True)],
        ],
        ["conv2d"] * 6,
    ),
}


@pytest.mark.parametrize("name", RESAMPLING_CHAINS)
def test_a_chain_that_resamples_computes_the_same(name, ran):
    make, expected = RESAMPLING_CHAINS[name]
    agree(lambda: nn.Sequential(*make()), expected, ran)


def test_the_layout_after_resampling_is_stock_s():
    stock, fused = twins(lambda: nn.Sequential(nn.Conv2d(C, 6, 3), nn.AvgPool2d(2)))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for model in (stock, fused):
            model.to(memory_format=memory_format)
        assert fused(batch()).stride() == stock(batch()).stride()


def test_few_pixels_are_resampled_as_in_stock(ran, monkeypatch):
    monkeypatch.setattr(backend, "is_automatic", lambda: True)
    model = fuse(nn.Sequential(nn.Conv2d(C, 64, 3, 1, 1), nn.AvgPool2d(2)))
    for pixels in (16, 64):
        model(torch.randn(1, C, pixels, pixels))
    assert ran == ["conv2d_avg_pool2d"]


def test_a_resampling_layer_with_a_hook_is_called():
    seen = []
    for layers in ([nn.Conv2d(C, 6, 3), nn.AvgPool2d(2)], [nn.Upsample(scale_factor=2), nn.Conv2d(C, 6, 3)]):
        for layer in layers:
            layer.register_forward_hook(lambda module, args, output: seen.append(type(module)))
        fuse(nn.Sequential(*layers))(batch(torch.float32))
    assert seen == [nn.Conv2d, nn.AvgPool2d, nn.Upsample, nn.Conv2d]


# ── Residual sums ────────────────────────────────────────────────────────────────────────────────────────────────────


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(C, C, 3, 1, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3, 1, 1), nn.BatchNorm2d(C)
        )

    def forward(self, x):
        return x + self.body(x)


class BodyFirst(Residual):
    def forward(self, x):
        return self.body(x) + x


class AddsInPlace(Residual):
    def forward(self, x):
        y = self.body(x)
        y += x
        return y


class AddsByName(Residual):
    def forward(self, x):
        return F.relu(torch.add(x, self.body(x)))


class AddsSomethingElse(Residual):
    def forward(self, x):
        return self.body(x) + x[:, :, :1]


class AddsTheSumToTheInput(Residual):
    def forward(self, x):
        out = x * 1
        out += self.body(x)
        return out


class Planes(Residual):
    def __init__(self):
        super().__init__()
        self.body[1], self.body[4] = nn.InstanceNorm2d(C), nn.InstanceNorm2d(C)


class Groups(Residual):
    def __init__(self):
        super().__init__()
        self.body[1], self.body[4] = nn.GroupNorm(1, C), nn.GroupNorm(2, C)


ADDS = ["conv2d_batch_norm_act", "conv2d", "batch_norm_act"]  # the last with the residual
ADDS_NOTHING = ["conv2d_batch_norm_act"] * 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Residual, ADDS),
        (BodyFirst, ADDS),
        (AddsInPlace, ADDS),
        (AddsByName, ADDS),
        (AddsTheSumToTheInput, ADDS_NOTHING),  # somebody may see what is added to
        (Planes, ["conv2d", "instance_norm_act", "conv2d", "instance_norm_act"]),
        (Groups, ["conv2d", "group_norm_act", "conv2d", "group_norm_act"]),
    ],
)
def test_a_residual_sum_is_added_by_the_last_norm(kind, expected, ran):
    agree(kind, expected, ran)


def test_a_sum_that_broadcasts_is_added_as_in_stock():
    stock, fused = twins(AddsSomethingElse)
    assert_agree(stock, fused, batch())


def test_residual_blocks_in_a_chain_hand_on_the_layout_that_is_fast(ran):
    def make():
        return nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), Residual(), Residual(), nn.Tanh())

    agree(make, ["conv2d_batch_norm_act", *ADDS, *ADDS], ran)


def test_a_chain_with_a_hook_is_called_and_not_asked_to_add(ran):
    model = fuse(Residual())
    seen = []
    model.body.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    x = batch(torch.float32)
    y = model(x)
    torch.testing.assert_close(y, x + seen[0])
    assert ran == ADDS_NOTHING


# ── AdaIN ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Styled(nn.Module):
    """The layer epilogue of StyleGAN, over an image whose style is its own mean."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, C, 1, 1))
        self.noise_weight = nn.Parameter(torch.randn(C, 1, 1))
        self.noise = nn.Buffer(torch.randn(1, 1, 8, 9))
        self.style = nn.Linear(C, 2 * C)
        self.norm = nn.InstanceNorm2d(C)

    def styles(self, x):
        return self.style(x.mean((2, 3))).view(-1, 2 * C, 1, 1).chunk(2, 1)

    def forward(self, x):
        scale, shift = self.styles(x)
        x = F.leaky_relu(x + self.noise_weight * self.noise + self.bias, 0.2)
        return (scale + 1) * F.instance_norm(x) + shift


class WithALayer(Styled):
    def forward(self, x):
        scale, shift = self.styles(x)
        return shift + self.norm(F.relu(self.bias + x + self.noise * self.noise_weight)) * scale


class NoActivation(Styled):
    def forward(self, x):
        scale, shift = self.styles(x)
        return F.instance_norm(x, eps=1e-3) * scale + shift


class OneStyleForAll(Styled):
    def forward(self, x):
        scale, shift = self.styles(x[:1])
        return F.instance_norm(x + self.noise) * scale + shift


class ShowsTheNorm(Styled):
    def forward(self, x):
        scale, shift = self.styles(x)
        normal = F.instance_norm(x)
        return normal * scale + shift + normal


class ScalesEachPixel(Styled):
    def forward(self, x):
        return F.instance_norm(x) * self.noise + self.bias


class ChangesItsInput(Styled):
    def forward(self, x):
        x = x * 1
        scale, shift = self.styles(x)
        normal = F.instance_norm(x + self.bias)
        x.mul_(2)
        return normal * scale + shift + x.mean()


@pytest.mark.parametrize("kind", [Styled, WithALayer, NoActivation, OneStyleForAll])
def test_a_norm_that_is_scaled_and_shifted_is_adain(kind, ran):
    agree(kind, ["adain"], ran)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(ShowsTheNorm, ["instance_norm_act"]), (ChangesItsInput, ["instance_norm_act"]), (ScalesEachPixel, [])],
)
def test_what_only_looks_like_adain_is_at_most_a_norm(kind, expected, ran):
    agree(kind, expected, ran)


def test_a_norm_layer_that_is_exchanged_or_observed_is_called_again(ran):
    stock, fused = twins(WithALayer)
    for change in (
        lambda model: model.norm.register_forward_hook(lambda module, args, output: 2 * output),
        lambda model: setattr(model, "norm", nn.InstanceNorm2d(C, affine=True).double()),
        lambda model: setattr(model, "norm", nn.Identity()),
    ):
        for model in (stock, fused):
            change(model)
        assert_agree(stock, fused, batch(), steps=1)
    assert ran == []


# ── Convolutions that are functions ──────────────────────────────────────────────────────────────────────────────────


class Equalized(nn.Module):
    """A learning rate that is the same for all weights, as in ProGAN."""

    shape: tuple[int, ...] = (6, C, 3, 3)

    def __init__(self):
        super().__init__()
        self.gain = 0.5
        self.weight, self.bias = nn.Parameter(torch.randn(self.shape)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.conv2d(x, self.weight * self.gain, self.bias, stride=2, padding=1)


class NamesItsInput(Equalized):
    def forward(self, x):
        return F.conv2d(weight=self.weight * self.gain, bias=self.bias, input=x)


class EqualizedTransposed(Equalized):
    shape = (C, 6, 4, 4)

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight * self.gain, self.bias, 2, 1)


@pytest.mark.parametrize(
    ("kind", "op"), [(Equalized, "conv2d"), (NamesItsInput, "conv2d"), (EqualizedTransposed, "conv_transpose2d")]
)
def test_a_functional_convolution_runs_by_the_operator(kind, op, ran):
    agree(kind, [op], ran)


class Modulated(Equalized):
    """A convolution whose weight depends on the image."""

    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean(), self.bias, padding=1)


class Plain(Equalized):
    def forward(self, x):
        return F.conv2d(x, self.weight * self.gain, self.bias, padding=1)


class Activated(Plain):
    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight, self.bias))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: [Plain(), nn.AvgPool2d(2)], ["conv2d_avg_pool2d"]),
        (lambda: [nn.Upsample(scale_factor=2), Plain()], ["upsample_conv2d"]),
        (lambda: [nn.Upsample(scale_factor=2), Activated()], ["upsample_conv2d"]),
        (lambda: [Activated(), nn.AvgPool2d(2)], ["conv2d"]),
        (lambda: [Equalized(), nn.AvgPool2d(2)], ["conv2d"]),
        (lambda: [nn.Upsample(scale_factor=2), Modulated(), nn.Tanh()], ["conv2d"]),
        (lambda: [Modulated(), nn.AvgPool2d(2)], ["conv2d_avg_pool2d"]),
    ],
)
def test_a_functional_convolution_is_resampled_with_the_layer_beside_it(make, expected, ran):
    agree(lambda: nn.Sequential(*make()), expected, ran)


class Pads(nn.Module):
    def __init__(self, padding):
        super().__init__()
        self.weight, self.padding = nn.Parameter(torch.randn(6, C, 3, 3)), padding

    def forward(self, x):
        return F.conv2d(x, self.weight, None, 1, self.padding)


def test_padding_by_name_and_an_image_without_a_batch_axis_go_to_stock():
    stock, fused = twins(lambda: Pads("same"))
    assert_agree(stock, fused, batch())
    stock, fused = twins(lambda: Pads(1))
    x = batch()[0]
    torch.testing.assert_close(fused(x), stock(x))


def test_an_error_in_a_functional_convolution_is_stock_s_own():
    stock, fused = twins(lambda: Pads(1))
    x = batch(channels=C + 1)
    with pytest.raises(RuntimeError) as expected:
        stock(x)
    with pytest.raises(RuntimeError) as found:
        fused(x)
    assert str(found.value) == str(expected.value)


# ── What explain says ────────────────────────────────────────────────────────────────────────────────────────────────


def test_explain_names_what_was_found_in_a_forward():
    model = nn.Module()
    model.residual, model.styled, model.layer = Residual(), Styled(), WithALayer()
    model.equalized, model.shows = Equalized(), ShowsTheNorm()
    assert [(row.place, row.pattern) for row in explain(fuse(model)) if row.fused] == [
        ("residual", "x + body(x)"),
        ("residual.body.0–2", "Conv2d → BatchNorm2d → ReLU"),
        ("residual.body.3–4", "Conv2d → BatchNorm2d"),
        ("styled", "leaky_relu → AdaIN"),
        ("layer", "relu → AdaIN"),
        ("equalized", "F.conv2d"),
        ("shows", "F.instance_norm"),
    ]


class ConvAsIs(nn.Conv2d):
    pass


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 0.5, self.bias)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.styled, self.own, self.scaled = WithALayer(), ConvAsIs(4, 4, 1), ScaledConv(4, 4, 1)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1)])

    def forward(self, x):
        x = self.scaled(self.own(x))
        return [layer(x) for layer in self.layers] if x.sum() > 0 else x


def test_explain_gives_the_reason_of_each_layer_and_names_none_that_is_in_a_pattern():
    why = "the way through the forward of Listed depends on tensors"
    assert list(explain(fuse(Listed()))) == [
        ("own", "ConvAsIs", False, "ConvAsIs is a subclass of Conv2d"),
        ("layers.0", "Conv2d", False, why),
        ("styled", "relu → AdaIN", True, ""),
        ("scaled", "F.conv2d", True, ""),
    ]
