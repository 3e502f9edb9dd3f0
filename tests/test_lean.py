"""lean_double_backward: what stock autograd computes, to the last zero, with less."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from critics import CRITICS, SIZE, CountConvolutions, Residual, conv, extra, leaky, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastgan import backend, fuse, lean_double_backward
from fastgan.ops import _autograd


def penalise(make, dtype, lean, autocast=False):
    """Gradients of a penalty and a loss on one graph: by name, for the images too, and the buffers afterwards."""
    torch.manual_seed(0)
    critic = make().to(dtype)
    images = torch.randn(4, 3, SIZE, SIZE, dtype=dtype, requires_grad=True)
    args, kwargs = extra(critic)
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with precision, lean_double_backward() if lean else nullcontext():
        output = critic(images, *args, **kwargs)
    score = output[0] if isinstance(output, tuple) else output
    (gradient,) = torch.autograd.grad(score.sum(), images, create_graph=True)
    gradient.flatten(1).norm(dim=1).sub(1).square().mean().backward()
    grads = {name: p.grad for name, p in critic.named_parameters()} | {"images": images.grad}
    return grads, dict(critic.named_buffers()) | {"score": score, "gradient": gradient}


def assert_same(make, dtype=torch.float64, **tolerance):
    found, expected = (penalise(make, dtype, lean) for lean in (True, False))
    assert [n for n, g in found[0].items() if g is None] == [n for n, g in expected[0].items() if g is None]
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, stock, **tolerance)
        for name, grad in ours.items():
            assert grad is None or grad.is_contiguous() == stock[name].is_contiguous(), name


@pytest.mark.parametrize("kind", CRITICS)
def test_every_parameter_has_stock_s_gradient(kind):
    assert_same(CRITICS[kind], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CRITICS)
def test_in_float32_to_rounding(kind):
    """No further from float64's than twice as far as stock's own float32."""
    exact = penalise(CRITICS[kind], torch.float64, False)[0]
    errors = []
    for lean in (True, False):
        grads = penalise(CRITICS[kind], torch.float32, lean)[0]
        pairs = [(g.double(), exact[n]) for n, g in grads.items() if g is not None]
        errors.append(sum((g - e).square().sum() for g, e in pairs).sqrt())
        size = sum(e.square().sum() for _, e in pairs).sqrt()
    assert errors[0] <= 2 * errors[1] + 4e-6 * size


def test_under_autocast():
    """bfloat16 has 8 bits: a few steps for a few layers."""
    grads, others = penalise(CRITICS["leaky_relu in place"], torch.float32, True, autocast=True)
    expected, stock = penalise(CRITICS["leaky_relu in place"], torch.float32, False, autocast=True)
    assert others["score"].dtype == stock["score"].dtype == torch.bfloat16
    for name, grad in grads.items():
        if grad is not None:
            assert grad.dtype == expected[name].dtype == torch.float32
            assert (grad - expected[name]).norm() <= 0.02 * expected[name].norm()


@st.composite
def critics(draw):
    """A function that builds a random critic, from a description that prints well."""
    activations = st.sampled_from(["relu", "leaky", "leaky_", "relu6_", "hardtanh", "prelu", "tanh", "none"])
    norms = st.sampled_from(["none", "none", "batch", "batch in evaluation", "instance", "group"])
    kinds = st.sampled_from(["conv", "transposed", "pool", "max_pool", "skip", "shared", "up"])
    layer = st.tuples(kinds, st.integers(1, 4), st.integers(1, 2), st.integers(1, 2), activations, norms, st.booleans())
    layers = draw(st.lists(layer, min_size=1, max_size=4))
    return layers, draw(st.booleans())


class Random(nn.Module):
    def __init__(self, layers, ends_in_linear):
        super().__init__()
        self.described, self.ends_in_linear = layers, ends_in_linear
        self.first, self.shared, self.last, self.head = conv(3, 4), conv(4, 4), conv(4, 1), nn.Linear(4, 1)
        self.convs, self.norms, self.acts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for kind, kernel, stride, groups, act, norm, bias in layers:
            options = dict(groups=groups, bias=bias)
            if kind == "transposed":
                self.convs.append(nn.ConvTranspose2d(4, 4, kernel, stride, kernel // 2, stride - 1, **options))
            else:
                self.convs.append(
                    nn.Conv2d(4, 4, kernel, stride if kind == "conv" else 1, 2, dilation=groups, **options)
                )
            self.norms.append({
                "none": nn.Identity(), "batch": nn.BatchNorm2d(4), "batch in evaluation": nn.BatchNorm2d(4).eval(),
                "instance": nn.InstanceNorm2d(4, affine=True), "group": nn.GroupNorm(2, 4),
            }[norm])  # fmt: skip
            self.acts.append({
                "relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2), "leaky_": nn.LeakyReLU(0.2, True), "relu6_": nn.ReLU6(True),
                "hardtanh": nn.Hardtanh(), "prelu": nn.PReLU(4), "tanh": nn.Tanh(), "none": nn.Identity(),
            }[act])  # fmt: skip

    def forward(self, x):
        h = self.first(F.avg_pool2d(x, 2))
        for (kind, *_), layer, norm, act in zip(self.described, self.convs, self.norms, self.acts, strict=True):
            before = h = h if min(h.shape[2:]) > 4 else F.interpolate(h, scale_factor=3)
            h = act(norm(layer(h)))
            if kind == "pool":
                h = F.avg_pool2d(h, 2, ceil_mode=True)
            elif kind == "max_pool":
                h = F.max_pool2d(h, 2, 1)
            elif kind == "up":
                h = F.interpolate(h, size=(9, 7))
            elif kind == "skip":
                h = h + F.adaptive_avg_pool2d(before, h.shape[2:])
            elif kind == "shared":
                h = self.shared(F.relu(self.shared(h)))
        return self.head(h.mean((2, 3))) if self.ends_in_linear else self.last(h)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(critics())
def test_random_critics_have_stock_s_gradients(description):
    assert_same(lambda: Random(*description), rtol=1e-10, atol=1e-10)


def count(make, lean):
    with CountConvolutions() as counter:
        penalise(make, torch.float32, lean)
    return counter


def layers_of(make):
    return sum(isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) for layer in make().modules())


@pytest.mark.parametrize(
    "kind", ["leaky_relu", "hardtanh and relu6", "prelu", "residual", "dcgan, fused, in evaluation"]
)
def test_four_convolutions_a_layer_at_most(kind):
    assert count(CRITICS[kind], True).total <= 4 * layers_of(CRITICS[kind])


def test_stock_autograd_needs_more():
    assert count(CRITICS["leaky_relu"], False).total > 4 * layers_of(CRITICS["leaky_relu"])


def test_the_reference_backend_is_stock_torch(use_backend):
    use_backend("reference")
    counter = count(CRITICS["batch norm"], True)
    assert counter.calls == count(CRITICS["batch norm"], False).calls


def test_small_tensors_are_no_exception(monkeypatch):
    monkeypatch.setattr(backend, "is_automatic", lambda: True)
    counter = count(lambda: plain(leaky()), True)
    assert counter.calls["aten::convolution"] == counter.calls["aten::convolution_backward"] == 0


def test_the_third_derivative_is_exact():
    def third(lean):
        torch.manual_seed(0)
        critic = plain(leaky(True), nn.PReLU, nn.ReLU).double()
        x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
        with lean_double_backward() if lean else nullcontext():
            y = critic(x).pow(3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        second = torch.autograd.grad(
            first.pow(2).sum(), list(critic.parameters()), create_graph=True, materialize_grads=True
        )
        return torch.autograd.grad(sum(g.pow(2).sum() for g in second), [x, critic[0].weight])

    torch.testing.assert_close(third(True), third(False))


def test_the_model_and_its_ordinary_gradients_are_what_they_were():
    critic = Residual().double()
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    kept = {name: t.clone() for name, t in critic.state_dict().items()}
    results = []
    for context in (nullcontext(), lean_double_backward()):
        with context:
            y = critic(x)
        results.append((y, *torch.autograd.grad(y.sum(), list(critic.parameters()))))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(dict(critic.state_dict()), kept, rtol=0, atol=0)


def test_what_leaves_the_context_has_stock_s_layout():
    features = []
    critic = plain(leaky(True), leaky())
    critic[2].register_forward_hook(lambda module, args, output: features.append(output))
    with lean_double_backward():
        critic(torch.randn(4, 3, SIZE, SIZE))
    assert features[0].is_contiguous()
    features[0].view(-1)
    torch.autograd.grad(features[0].sum(), critic[0].weight)


def test_what_autograd_alone_keeps_stays_as_it_is_fast():
    critic = plain(leaky(), leaky())
    with lean_double_backward():
        y = critic(torch.randn(4, 3, SIZE, SIZE))
    (kept, _) = y.grad_fn.saved_tensors
    assert kept.shape == (4, 8, 4, 4) and kept.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", [nn.LayerNorm((4, SIZE, SIZE)), nn.LayerNorm(SIZE), nn.InstanceNorm2d(4)], ids=str)
def test_norms_that_stock_torch_returns_in_nchw(norm):
    x = torch.randn(2, 4, SIZE, SIZE).contiguous(memory_format=torch.channels_last).requires_grad_()
    with lean_double_backward():
        y = norm(x)
        assert y.view(2, -1).shape == (2, 4 * SIZE * SIZE)
        after = F.relu(norm(x))
    assert y.is_contiguous() and after.is_contiguous()


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)], ids=str)
def test_a_little_norm_is_lean_in_a_fused_model_too(norm, monkeypatch):
    monkeypatch.setattr(backend, "is_automatic", lambda: True)
    critic = fuse(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.LeakyReLU(0.2)))
    with lean_double_backward():
        y = critic(torch.randn(2, 3, SIZE, SIZE))
    before, nodes = [y.grad_fn], set()
    while before:
        node = before.pop()
        nodes.add(node.name())
        before += [edge for edge, _ in node.next_functions if edge is not None]
    assert "group_norm_actBackward" in nodes and "NativeGroupNormBackward0" not in nodes


@pytest.mark.parametrize("order", [1, -1])
def test_a_sum_with_an_image_in_channels_last_has_stock_s_layout(order):
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    image = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    strides = []
    for context in (nullcontext(), lean_double_backward()):
        with context:
            a, b = (F.conv2d(x, weight), image)[::order]
            strides.append((a + b).stride())
    assert strides[0] == strides[1]


def test_channels_last_stays_channels_last():
    critic = plain(leaky(True), leaky()).to(memory_format=torch.channels_last)
    outputs = []
    for context in (nullcontext(), lean_double_backward()):
        with context:
            outputs.append(critic[:3](torch.randn(4, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)))
    assert outputs[0].stride() == outputs[1].stride()


def test_a_second_penalty_on_one_graph_gets_its_zeros_too():
    critic = plain(leaky(), leaky())
    x = torch.randn(4, 3, SIZE, SIZE, requires_grad=True)
    with lean_double_backward():
        y = critic(x)
    for _ in range(2):
        critic.zero_grad()
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        gradient.pow(2).sum().backward(retain_graph=True)
        assert torch.equal(critic[0].bias.grad, torch.zeros(4))


def test_zeros_add_up_with_a_loss_in_one_backward():
    results = []
    for context in (nullcontext(), lean_double_backward()):
        torch.manual_seed(0)
        critic, x = plain(leaky(), leaky()).double(), torch.randn(4, 3, SIZE, SIZE).double().requires_grad_()
        with context:
            y = critic(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (gradient.pow(2).sum() + y.pow(2).sum()).backward()
        results.append([p.grad for p in critic.parameters()])
    torch.testing.assert_close(*results)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise KeyError("backward")


def test_an_error_in_backward_does_not_keep_the_graph_alive():
    critic = plain(leaky())
    x = torch.randn(4, 3, SIZE, SIZE, requires_grad=True)
    image = Fails.apply(x)
    with lean_double_backward():
        y = critic(image)
    with pytest.raises(KeyError):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    node = weakref.ref(image.grad_fn)
    del y, image
    gc.collect()
    assert node() is None


def test_zeros_can_be_written_to():
    """As a hook does that scales gradients."""
    critic = plain(leaky(), leaky())
    for parameter in critic.parameters():
        parameter.register_hook(lambda grad: grad.mul_(2))
    x = torch.randn(4, 3, SIZE, SIZE, requires_grad=True)
    with lean_double_backward():
        y = critic(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    gradient.pow(2).sum().backward()
    assert torch.equal(critic[0].bias.grad, torch.zeros(4))


@pytest.mark.parametrize("private", ["_current_graph_task_id", "_will_engine_execute_node"])
def test_without_torch_s_private_functions_all_is_as_exact(private, monkeypatch):
    monkeypatch.delattr(torch._C, private)
    monkeypatch.setattr(_autograd, "_current_task", getattr(torch._C, "_current_graph_task_id", object))
    assert_same(CRITICS["prelu"], rtol=1e-10, atol=1e-12)


def test_the_graph_is_not_kept_alive():
    x = torch.randn(4, 3, SIZE, SIZE, requires_grad=True)
    critic = plain(leaky())
    with lean_double_backward():
        y = critic(x * 1)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    gradient.sum().backward()
    node = weakref.ref(y.grad_fn)
    del y, gradient
    gc.collect()
    assert node() is None


def test_function_transforms_and_integers_run_as_stock():
    critic = plain(leaky(True), leaky()).double()
    x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64)
    results = []
    for context in (nullcontext(), lean_double_backward()):
        with context:
            results.append(torch.func.grad(lambda x: critic(x).pow(2).sum())(x))
    torch.testing.assert_close(*results)
    with lean_double_backward(), torch.no_grad():
        assert torch.equal(F.relu(torch.tensor([-1, 2])), torch.tensor([0, 2]))
        assert torch.equal(critic(x), critic(x))


def test_an_empty_batch_runs_as_stock():
    critic, x = plain(leaky(), leaky(True), norm=nn.InstanceNorm2d), torch.randn(0, 3, SIZE, SIZE)
    with lean_double_backward():
        assert critic(x).shape == (0, 1, 1, 1)


def test_unbatched_images_run_as_stock():
    critic, x = fuse(plain(leaky(True))), torch.randn(3, SIZE, SIZE)
    with lean_double_backward():
        found = critic(x)
    torch.testing.assert_close(found, critic(x))
