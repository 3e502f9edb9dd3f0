"""SN-GAN's step: the hinge losses, and what it must leave alone."""

import itertools

import pytest
import torch

from fastgan.training.errors import InputError
from fastgan.training.sngan import SNGAN, SNGANSettings

TINY = {"image_size": 16, "batch_size": 6, "features": 4, "latent_dim": 5}


@pytest.fixture
def make_system(accelerator):
    def make(**settings):
        torch.manual_seed(0)
        chosen = SNGANSettings(**TINY | settings)
        chosen.check()
        return SNGAN(chosen, channels=1, accelerator=accelerator)

    return make


@pytest.fixture
def reals():
    torch.manual_seed(1)
    return itertools.cycle(torch.rand(3, 6, 1, 16, 16) * 2 - 1)


@pytest.mark.parametrize("architecture", ["standard", "residual"])
def test_the_losses_are_the_hinge_s(make_system, reals, architecture):
    system = make_system(architecture=architecture)
    scores = []
    system.discriminator.register_forward_hook(lambda _, __, output: scores.append(output.detach()))
    metrics = system.step(reals)
    real, fake, fooled = scores
    torch.testing.assert_close(metrics["loss_d"], (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    torch.testing.assert_close(metrics["loss_g"], -fooled.mean())
    assert set(metrics) == {"loss_d", "d_real", "d_fake", "grad_norm_d", "loss_g", "grad_norm_g"}


@pytest.mark.parametrize("d_steps", [1, 3])
def test_the_discriminator_learns_from_new_images_at_each_of_its_steps(make_system, reals, d_steps):
    system = make_system(d_steps=d_steps)
    drawn = []
    system.step(drawn.append(batch) or batch for batch in reals)
    assert len(drawn) == system.draws == d_steps
    steps = {name: int(next(iter(o.state.values()))["step"]) for name, o in system.optimizers.items()}
    assert steps == {"generator": 1, "discriminator": d_steps}


def test_the_generator_step_leaves_the_discriminator_s_weights_alone(make_system):
    system = make_system()
    before = [p.clone() for p in system.discriminator.parameters()]
    system.generator_step(system.generator(system.noise(6)))
    assert all(map(torch.equal, before, system.discriminator.parameters()))
    assert all(p.grad is None and p.requires_grad for p in system.discriminator.parameters())


def test_a_fused_step_is_the_step(make_system, reals):
    metrics, batch = [], next(reals)
    for fused in (False, True):
        system = make_system()
        if fused:
            system.fuse()
        torch.manual_seed(3)
        metrics.append(system.step(itertools.repeat(batch)))
    torch.testing.assert_close(*metrics, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "dcgan"}, "--architecture: .*dcgan.* does not fit; expected standard or residual"),
        (
            {"architecture": "residual", "image_size": 8},
            "--image-size: 8 does not fit; expected 16 or more for this architecture",
        ),
        ({"d_steps": 0}, "--d-steps: 0 does not fit; expected 1 or more"),
    ],
)
def test_settings_that_do_not_fit_are_named(make_system, settings, message):
    with pytest.raises(InputError, match=message):
        make_system(**settings)
