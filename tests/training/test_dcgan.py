"""DCGAN's step: Algorithm 1, and what it must leave alone."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import logsigmoid

from fastgan.fuse import fuse


@pytest.fixture
def reals():
    torch.manual_seed(1)
    return itertools.cycle(torch.rand(3, 6, 1, 8, 8) * 2 - 1)


def count_calls(module):
    sizes = []
    module.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    return sizes


def gradients(network):
    return [p.grad.clone() for p in network.parameters()]


def test_the_losses_are_goodfellows_with_the_non_saturating_one_for_the_generator(make_system, reals):
    system = make_system()
    logits = []
    system.discriminator.register_forward_hook(lambda _, __, output: logits.append(output.detach().flatten()))
    metrics = system.step(reals)
    real, fake, fooled = logits
    torch.testing.assert_close(metrics["loss_d"], -(logsigmoid(real).mean() + logsigmoid(-fake).mean()))
    torch.testing.assert_close(metrics["loss_g"], -logsigmoid(fooled).mean())
    torch.testing.assert_close(metrics["d_real"], real.sigmoid().mean())
    torch.testing.assert_close(metrics["d_fake"], fake.sigmoid().mean())


def test_gradient_norms_are_those_of_the_whole_networks(make_system, reals):
    system = make_system()
    metrics = system.step(reals)
    for letter, network in (("d", system.discriminator), ("g", system.generator)):
        flat = torch.cat([g.flatten() for g in gradients(network)])
        torch.testing.assert_close(metrics[f"grad_norm_{letter}"], flat.norm())


@pytest.mark.parametrize("d_steps", [1, 3])
def test_each_discriminator_step_sees_new_reals_and_new_fakes(make_system, reals, d_steps):
    system = make_system(d_steps=d_steps)
    generated, judged = count_calls(system.generator), count_calls(system.discriminator)
    drawn = []
    system.step(drawn.append(batch) or batch for batch in reals)
    assert len(drawn) == system.draws == d_steps
    assert generated == [6] * d_steps
    assert judged == [6] * (2 * d_steps + 1), "real and fake images go in batches of their own"
    steps = {name: int(next(iter(o.state.values()))["step"]) for name, o in system.optimizers.items()}
    assert steps == {"generator": 1, "discriminator": d_steps}


def test_the_generator_step_leaves_the_discriminators_weights_and_gradients_alone(make_system, reals):
    system = make_system()
    fake = system.generator(system.noise(6))
    system.discriminator_step(next(reals), fake.detach())
    kept, weights = gradients(system.discriminator), [p.clone() for p in system.discriminator.parameters()]
    before = [p.clone() for p in system.generator.parameters()]
    system.generator_step(fake)
    assert all(map(torch.equal, kept, gradients(system.discriminator)))
    assert all(map(torch.equal, weights, system.discriminator.parameters()))
    assert not any(map(torch.equal, before, system.generator.parameters()))
    assert all(p.requires_grad for p in system.discriminator.parameters())


def test_the_discriminator_step_leaves_the_generator_alone(make_system, reals):
    system = make_system()
    before = [p.clone() for p in system.generator.parameters()]
    system.discriminator_step(next(reals), system.generator(system.noise(6)).detach())
    assert all(p.grad is None for p in system.generator.parameters())
    assert all(map(torch.equal, before, system.generator.parameters()))


def test_label_smoothing_moves_only_the_target_of_real_images(make_system, reals):
    plain, smooth = make_system(), make_system(label_smoothing=0.1)
    real, fake = next(reals), plain.sample(plain.noise(6))
    logits = plain.judge(plain.discriminator, real).mean()
    difference = smooth.discriminator_step(real, fake)["loss_d"] - plain.discriminator_step(real, fake)["loss_d"]
    torch.testing.assert_close(difference, 0.1 * logits)  # BCE(x, 1 - s) = BCE(x, 1) + s x
    plain.load_state_dict(smooth.state_dict())
    torch.manual_seed(2)
    expected = plain.generator_step(plain.generator(plain.noise(6)))["loss_g"]
    torch.manual_seed(2)
    assert smooth.generator_step(smooth.generator(smooth.noise(6)))["loss_g"] == expected


def test_sampling_changes_nothing(make_system):
    system = make_system()
    noise = system.noise(4)
    before = {key: value.clone() for key, value in system.generator.state_dict().items()}
    random = torch.get_rng_state()
    images = system.sample(noise)
    assert torch.equal(system.sample(noise[:1]), images[:1]), "a sample does not depend on its neighbours"
    assert all(torch.equal(before[key], value) for key, value in system.generator.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert system.generator.training and not images.requires_grad


def test_several_processes_step_on_their_mean_gradient(make_system):
    system = make_system()
    for p in system.generator.parameters():
        p.grad = torch.ones_like(p)
    total = sum(p.numel() for p in system.generator.parameters())
    system.accelerator = SimpleNamespace(num_processes=2, reduce=lambda tensor, how: tensor * {"mean": 3}[how])
    torch.testing.assert_close(system.update("generator"), torch.tensor(3.0 * total**0.5))
    assert all((p.grad == 3).all() for p in system.generator.parameters())


def test_bf16_runs_the_networks_in_bf16_and_the_losses_in_fp32(make_system, reals):
    system = make_system()
    AcceleratorState._reset_state(reset_partial_state=True)
    system.accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    seen = []
    system.discriminator.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    metrics = system.step(reals)
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in metrics.values()} == {torch.float32}
    assert {p.grad.dtype for p in system.generator.parameters()} == {torch.float32}


def test_fused_and_stock_train_alike(make_system, reals):
    batches = list(itertools.islice(reals, 3)) * 4
    curves, weights = [], []
    for fused in (True, False):
        system = make_system()
        for network in system.networks.values() if fused else ():
            fuse(network)
        torch.manual_seed(3)
        draws = iter(batches)
        curves.append([torch.stack(list(system.step(draws).values())) for _ in batches])
        weights.append([value for network in system.networks.values() for value in network.state_dict().values()])
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)
