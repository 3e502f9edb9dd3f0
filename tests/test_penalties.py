"""The gradient penalties against their formulas in stock torch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from critics import CRITICS, SIZE, CountConvolutions, extra, leaky, plain
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.models.dcgan import Generator

EPS = 1e-12


def images(seed, dtype=torch.float64):
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stock_gradient(critic, x, args=(), kwargs=None):
    output = critic(x.requires_grad_(), *args, **(kwargs or {}))
    score = output[0] if isinstance(output, tuple) else output
    return torch.autograd.grad(score.sum(), x, create_graph=True)[0].flatten(1)


def distance(gradient, center=1.0, one_sided=False):
    away = (gradient.square().sum(1) + EPS).sqrt() - center
    return (away.clamp(min=0) if one_sided else away).square().mean()


def between(real, fake, seed):
    t = torch.rand(len(real), 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=real.dtype)
    return real + t * (fake - real)


def around(real, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(real.shape, generator=generator, dtype=real.dtype)
    t = torch.rand(len(real), 1, 1, 1, generator=generator, dtype=real.dtype)
    return real + t * 0.5 * real.std(correction=0) * noise


def drawn():
    return torch.Generator().manual_seed(7)


# Ours and stock's, of (critic, real, fake, args, kwargs).
PENALTIES = {
    "gradient_penalty": (
        lambda c, r, f, a, k: fastgan.gradient_penalty(c, r, f, *a, generator=drawn(), **k),
        lambda c, r, f, a, k: 10 * distance(stock_gradient(c, between(r, f, 7), a, k)),
    ),
    "gradient_penalty, one-sided": (
        lambda c, r, f, a, k: fastgan.gradient_penalty(
            c, r, f, *a, weight=3.0, center=0.1, one_sided=True, generator=drawn(), **k
        ),
        lambda c, r, f, a, k: 3 * distance(stock_gradient(c, between(r, f, 7), a, k), 0.1, True),
    ),
    "dragan_penalty": (
        lambda c, r, f, a, k: fastgan.dragan_penalty(c, r, *a, generator=drawn(), **k),
        lambda c, r, f, a, k: 10 * distance(stock_gradient(c, around(r, 7), a, k)),
    ),
    "r1_penalty": (
        lambda c, r, f, a, k: fastgan.r1_penalty(c, r, *a, **k),
        lambda c, r, f, a, k: 5 * stock_gradient(c, r.clone(), a, k).square().sum(1).mean(),
    ),
    "r2_penalty": (
        lambda c, r, f, a, k: fastgan.r2_penalty(c, f, *a, gamma=2.0, **k),
        lambda c, r, f, a, k: stock_gradient(c, f.clone(), a, k).square().sum(1).mean(),
    ),
}


def results(make, penalty, dtype=torch.float64, prepare=lambda critic: critic):
    torch.manual_seed(0)
    critic = prepare(make().to(dtype))
    args, kwargs = extra(critic)
    value = penalty(critic, images(1, dtype), images(2, dtype), args, kwargs)
    value.backward()
    return value.detach(), {name: p.grad for name, p in critic.named_parameters()}


@pytest.mark.parametrize("kind", ["leaky_relu in place", "dcgan, fused", "residual", "conditional", "spectral norm"])
@pytest.mark.parametrize("name", PENALTIES)
def test_value_and_gradients_are_stock_s(name, kind):
    ours, stock = (results(CRITICS[kind], penalty) for penalty in PENALTIES[name])
    assert [n for n, g in ours[1].items() if g is None] == [n for n, g in stock[1].items() if g is None]
    torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CRITICS)
def test_any_critic(kind):
    ours, stock = (results(CRITICS[kind], penalty) for penalty in PENALTIES["gradient_penalty"])
    torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-11)


def test_a_critic_in_distributed_data_parallel():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        make = CRITICS["leaky_relu in place"]
        ours = results(make, PENALTIES["gradient_penalty"][0], prepare=DistributedDataParallel)
    finally:
        dist.destroy_process_group()
    stock = results(make, PENALTIES["gradient_penalty"][1])
    torch.testing.assert_close(ours[0], stock[0])
    torch.testing.assert_close(list(ours[1].values()), list(stock[1].values()))


def test_under_autocast_the_error_is_stock_s():
    """bfloat16 puts some elements on the other side of an activation, in stock torch as here."""
    make, found = CRITICS["leaky_relu"], []
    with torch.autocast("cpu", torch.bfloat16):
        for penalty in PENALTIES["gradient_penalty"]:
            found.append(results(make, penalty, torch.float32))
    exact, expected = results(make, PENALTIES["gradient_penalty"][1])
    assert found[0][0].dtype == torch.float32
    ours, stock = (
        sum((g - expected[n]).square().sum() for n, g in grads.items() if g is not None).sqrt() for _, grads in found
    )
    assert ours <= 2 * stock
    assert (found[0][0] - exact).abs() <= 0.02 * exact


def test_a_frozen_generator_and_the_images_get_no_gradient():
    real, fake = images(1).requires_grad_(), images(2).requires_grad_()
    fastgan.gradient_penalty(plain(leaky()).double(), real, fake).backward()
    assert real.grad is fake.grad is None


def test_without_create_graph_it_is_a_number():
    critic = plain(leaky()).double()
    values = [
        fastgan.gradient_penalty(critic, images(1), images(2), generator=drawn(), create_graph=c) for c in (False, True)
    ]
    assert not values[0].requires_grad
    assert torch.equal(*values)


def test_the_line_positions_come_from_the_generator():
    critic = plain(leaky()).double()
    state = torch.get_rng_state()
    first, second, third = (
        fastgan.gradient_penalty(critic, images(1), images(2), generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gradient_of_zero_is_finite():
    critic = plain(nn.ReLU)
    nn.init.constant_(critic[0].weight, 0)
    nn.init.constant_(critic[0].bias, -1)
    fastgan.gradient_penalty(critic, images(1, torch.float32), images(2, torch.float32)).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in critic.parameters())


def test_samples_of_any_shape():
    critic = nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(), nn.Linear(8, 1)).double()
    for judge, shape in ((critic, (6, 5)), (lambda x: critic(x.mean(1)), (6, 3, 5))):
        x = torch.randn(shape, dtype=torch.float64)
        expected = 5 * stock_gradient(judge, x.clone()).square().sum(1).mean()
        torch.testing.assert_close(fastgan.r1_penalty(judge, x), expected)


def test_four_convolutions_a_layer_at_most():
    with CountConvolutions() as counter:
        results(lambda: plain(leaky(True), leaky(True)), PENALTIES["gradient_penalty"][0], torch.float32)
    assert counter.total <= 4 * 3


@pytest.mark.parametrize("layers", [None, 4])
def test_path_length_is_stylegan2_s(layers):
    def penalty(ours):
        torch.manual_seed(0)
        network = Generator(SIZE, latent_dim=6, features=4).double()
        shape = (5, 6) if layers is None else (5, layers, 6)
        latents, mean = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.full((), 0.3).double()
        noise = torch.randn(5, 3, SIZE, SIZE, generator=drawn(), dtype=torch.float64) / SIZE
        context = fastgan.lean_double_backward() if ours else torch.enable_grad()
        with context:
            output = network((latents if layers is None else latents.cumsum(1)[:, -1])[..., None, None])
        if ours:
            value = fastgan.path_length_penalty(output, latents, mean, generator=drawn())
        else:
            (gradient,) = torch.autograd.grad((output * noise).sum(), latents, create_graph=True)
            lengths = gradient.square().sum(-1).view(5, -1).mean(1).sqrt()
            moved = mean + 0.01 * (lengths.mean() - mean)
            mean.copy_(moved.detach())
            value = 2 * (lengths - moved).square().mean()
        value.backward()
        return value.detach(), mean, [p.grad for p in network.parameters()]

    torch.testing.assert_close(penalty(True), penalty(False))


x = torch.randn(4, 3, SIZE, SIZE)
critic = plain(leaky())
BAD = {
    "other shapes": (lambda: fastgan.gradient_penalty(critic, x, x[:2]), ValueError, "fake must have real's shape"),
    "other dtypes": (
        lambda: fastgan.gradient_penalty(critic, x, x.double()),
        ValueError,
        "fake must have real's dtype",
    ),
    "other devices": (
        lambda: fastgan.gradient_penalty(critic, x, x.to("meta")),
        ValueError,
        "fake must have real's device",
    ),
    "integers": (lambda: fastgan.r1_penalty(critic, x.byte()), TypeError, "real must be float32"),
    "integer fakes": (lambda: fastgan.r2_penalty(critic, x.long()), TypeError, "fake must be float32"),
    "no tensor": (lambda: fastgan.dragan_penalty(critic, [x]), TypeError, "real must be a tensor, not list"),
    "one axis": (lambda: fastgan.r1_penalty(critic, x[0, 0, 0]), ValueError, r"real must have shape \(N, \*\)"),
    "constant": (lambda: fastgan.r1_penalty(lambda x: torch.zeros(4), x), ValueError, "does not depend on its input"),
    "cut off": (
        lambda: fastgan.r1_penalty(lambda x: critic(x.detach()), x),
        ValueError,
        "does not depend on its input",
    ),
    "no critic": (lambda: fastgan.r1_penalty(x, x), TypeError, "critic must be callable, not Tensor"),
    "a sparse center": (
        lambda: fastgan.dragan_penalty(critic, x, center=torch.ones(()).to_sparse()),
        TypeError,
        "center must be a dense tensor",
    ),
    "a complex gamma": (
        lambda: fastgan.r1_penalty(critic, x, gamma=torch.tensor(3 + 0j)),
        TypeError,
        "gamma must be a real number",
    ),
    "a dictionary": (
        lambda: fastgan.r1_penalty(lambda x: {"score": x}, x),
        TypeError,
        "critic must return .* not dict",
    ),
    "decisions": (lambda: fastgan.r1_penalty(lambda x: x > 0, x), TypeError, "critic must return .* not torch.bool"),
    "no_grad": (torch.no_grad()(lambda: fastgan.r1_penalty(critic, x)), ValueError, "torch.no_grad"),
    "inference_mode": (torch.inference_mode()(lambda: fastgan.r1_penalty(critic, x)), ValueError, "inference_mode"),
    "latents": (
        lambda: fastgan.path_length_penalty(x, x, torch.zeros(())),
        ValueError,
        r"latents must have shape \(4, D\)",
    ),
    "unused latents": (
        lambda: fastgan.path_length_penalty(critic[0](x), torch.randn(4, 2, requires_grad=True), torch.zeros(())),
        ValueError,
        "generator_output does not depend on latents",
    ),
    "center elsewhere": (
        lambda: fastgan.dragan_penalty(critic, x, center=torch.ones((), device="meta")),
        ValueError,
        "center is on meta, the images on cpu",
    ),
    "mean": (lambda: fastgan.path_length_penalty(x, x[:, 0, 0], torch.zeros(2)), ValueError, "mean must be one number"),
    "a mean that cannot move": (
        lambda: fastgan.path_length_penalty(x, x[:, 0, 0], torch.tensor(0)),
        TypeError,
        "mean must be float32, .* not torch.int64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_wgan_gp_critic_learns_as_with_stock_torch():
    """Twenty steps of Adam with weight decay, which sees the zeros."""
    trained = []
    for penalty in PENALTIES["gradient_penalty"]:
        torch.manual_seed(0)
        critic = plain(leaky(True), nn.PReLU).double()
        adam = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.0, 0.9), weight_decay=0.1)
        for step in range(20):
            real, fake = images(step), images(step + 100) + 0.5
            adam.zero_grad()
            (F.softplus(critic(fake)).mean() - critic(real).mean() + penalty(critic, real, fake, (), {})).backward()
            adam.step()
        trained.append(list(critic.parameters()))
    torch.testing.assert_close(*trained)


def test_a_compiled_critic_runs_eagerly():
    """torch.compile has no double backward, and says so."""
    make, penalty = CRITICS["leaky_relu"], PENALTIES["gradient_penalty"][0]
    compiled = results(make, penalty, prepare=lambda critic: torch.compile(critic, backend="aot_eager"))
    eager = results(make, penalty)
    torch.testing.assert_close(compiled[0], eager[0])
    torch.testing.assert_close(list(compiled[1].values()), list(eager[1].values()))


@pytest.mark.parametrize("kind", ["leaky_relu", "batch norm", "prelu", "residual"])
def test_a_critic_with_checkpoints(kind):
    make, penalty = CRITICS[kind], PENALTIES["gradient_penalty"][0]

    def through_a_checkpoint(critic, *arguments):
        return penalty(lambda x: checkpoint(critic, x, use_reentrant=False), *arguments)

    torch.testing.assert_close(results(make, through_a_checkpoint), results(make, penalty))
