"""WGAN-GP's step: Algorithm 1 of Gulrajani et al., and what it must leave alone."""

import itertools
import warnings
from contextlib import nullcontext

import pytest
import torch
from critics import CountConvolutions

from fastgan.fuse import fuse
from fastgan.training import checkpoint, run
from fastgan.training.errors import InputError
from fastgan.training.wgan_gp import WGANGP, WGANGPSettings

TINY = {"image_size": 16, "batch_size": 6, "features": 4, "latent_dim": 5}


@pytest.fixture
def make_system(accelerator):
    def make(**settings):
        torch.manual_seed(0)
        chosen = WGANGPSettings(**TINY | settings)
        chosen.check()
        return WGANGP(chosen, channels=1, accelerator=accelerator)

    return make


@pytest.fixture
def reals():
    torch.manual_seed(1)
    return itertools.cycle(torch.rand(3, 6, 1, 16, 16) * 2 - 1)


@pytest.mark.parametrize("architecture", ["dcgan", "residual"])
def test_the_critic_s_gradient_is_that_of_the_paper_s_loss(make_system, reals, architecture):
    system = make_system(architecture=architecture, penalty_weight=3.0)
    real, fake = next(reals), system.sample(system.noise(6))
    torch.manual_seed(2)
    metrics = system.critic_step(real, fake)
    ours = [p.grad.clone() for p in system.critic.parameters()]

    system = make_system(architecture=architecture)
    torch.manual_seed(2)
    position = torch.rand(6, 1, 1, 1)
    between = torch.lerp(real, fake, position).requires_grad_()
    (grad,) = torch.autograd.grad(system.critic(between).sum(), between, create_graph=True)
    penalty = 3 * (grad.flatten(1).norm(dim=1) - 1).square().mean()
    distance = system.critic(real).mean() - system.critic(fake).mean()
    (penalty - distance).backward()
    torch.testing.assert_close(metrics["penalty"], penalty.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["wasserstein"], distance.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["loss_critic"], (penalty - distance).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, [p.grad for p in system.critic.parameters()], rtol=1e-3, atol=1e-5)


def test_the_critic_learns_several_times_from_new_images_before_the_generator_once(make_system, reals):
    system = make_system(critic_steps=3)
    drawn = []
    metrics = system.step(drawn.append(batch) or batch for batch in reals)
    assert len(drawn) == system.draws == 3
    steps = {name: int(next(iter(o.state.values()))["step"]) for name, o in system.optimizers.items()}
    assert steps == {"critic": 3, "generator": 1}
    names = {"loss_critic", "penalty", "wasserstein", "grad_norm_critic", "loss_generator", "grad_norm_generator"}
    assert set(metrics) == names


def test_the_generator_step_leaves_the_critic_alone(make_system):
    system = make_system()
    before = [p.clone() for p in system.critic.parameters()]
    system.generator_step(6)
    assert all(p.grad is None for p in system.critic.parameters())
    assert all(map(torch.equal, before, system.critic.parameters()))
    assert all(p.requires_grad for p in system.critic.parameters())


def test_the_stock_step_of_a_comparison_knows_no_operator_of_fastgan_s(make_system, reals):
    metrics, batches = [], [next(reals) for _ in range(WGANGPSettings.critic_steps)]
    for is_stock in (False, True):
        system = make_system()
        system.is_stock = is_stock
        with CountConvolutions() as counter:
            metrics.append(system.step(iter(batches)))
        assert (counter.calls["fastgan::convolution"] == 0) == is_stock
    torch.testing.assert_close(*metrics, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "layer", "instance"])
@pytest.mark.parametrize("architecture", ["dcgan", "residual"])
def test_a_fused_system_trains_as_the_stock_one(make_system, reals, architecture, norm):
    losses = []
    for change in (fuse, lambda network: network):
        system = make_system(architecture=architecture, critic_norm=norm, critic_steps=2)
        for network in system.networks.values():
            change(network)
        torch.manual_seed(3)
        batches = itertools.cycle([next(reals) for _ in range(3)])
        losses.append([system.step(batches)["loss_critic"] for _ in range(5)])
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_batch_norm_in_the_critic_draws_a_warning_that_says_why(make_system):
    with pytest.warns(UserWarning, match="batch norm makes every score depend on every image"):
        make_system(critic_norm="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_system(critic_norm="layer")


@pytest.mark.parametrize(("architecture", "fits"), [("residual", True), ("resnet", False), (3, False)])
def test_a_checkpoint_is_read_again_if_its_words_are_known(tmp_path, architecture, fits):
    run.train("wgan-gp", TINY | {"fuse": False, "architecture": "residual"}, out=tmp_path, steps=1, device="cpu")
    path = tmp_path / "checkpoint.pt"
    state = checkpoint.load(path)
    state["settings"]["architecture"] = architecture
    checkpoint.save(path, state)
    with nullcontext() if fits else pytest.raises(InputError, match=r"checkpoint\.pt: .*architecture.* (resnet|int)"):
        assert run.read_checkpoint(path)["step"] == 1


BAD = {
    "architecture": ("resnet", "--architecture: resnet does not fit; expected dcgan or residual"),
    "critic_norm": ("group", "--critic-norm: group does not fit; expected one of none, layer, instance, batch"),
    "critic_steps": (0, "--critic-steps: 0 does not fit"),
    "penalty_weight": (-1.0, "--penalty-weight: -1.0 does not fit"),
    "image_size": (20, "--image-size: image_size must be a power of two"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_name_the_option(name):
    value, message = BAD[name]
    with pytest.raises(InputError, match=message):
        WGANGPSettings(**TINY | {name: value}).check()
