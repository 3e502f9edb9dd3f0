"""StyleGAN's step, its growth, its average, and what it must leave alone."""

import copy
import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import softplus

from fastgan.fuse import fuse
from fastgan.training.errors import InputError
from fastgan.training.stylegan import StyleGAN, StyleGANSettings, growth

TINY = {"image_size": 16, "batch_size": 4, "features": 4, "latent_dim": 5, "w_dim": 6, "mapping_layers": 2}


@pytest.fixture
def make_system(accelerator):
    """Builds a small StyleGAN at its full resolution; the same settings give the same weights."""

    def make(**settings):
        torch.manual_seed(0)
        chosen = StyleGANSettings(**TINY | {"phase_images": 0} | settings)
        chosen.check()
        return StyleGAN(chosen, channels=1, accelerator=accelerator)

    return make


@pytest.fixture
def reals():
    torch.manual_seed(1)
    return itertools.cycle(torch.rand(3, 4, 1, 16, 16) * 2 - 1)


def gradients(network):
    """Of what has grown so far."""
    return [p.grad for p in network.parameters() if p.grad is not None]


def test_growth_settles_and_fades_in_turns_and_ends_at_the_full_size():
    stages = [growth(images, 100, 32) for images in (0, 99, 100, 150, 199, 200, 299, 300, 375, 400, 10**9)]
    assert stages == [
        (8, 1.0), (8, 1.0), (16, 0.0), (16, 0.5), (16, 0.99), (16, 1.0), (16, 1.0), (32, 0.0), (32, 0.75), (32, 1.0),
        (32, 1.0),
    ]  # fmt: skip
    assert growth(0, 0, 32) == (32, 1.0)
    assert growth(150, 100, 8) == (8, 1.0)


def test_steps_grow_all_networks_by_the_images_that_were_seen(make_system, reals):
    system = make_system(phase_images=8)
    seen = []
    for _ in range(6):
        seen.append((system.resolution, system.alpha))
        stages = {(network.level, float(network.alpha)) for network in system.networks.values()}
        assert stages == {(system.generator.level, system.alpha)}
        system.step(reals)
        assert system.sample(system.noise(2)).shape == (2, 1, 16, 16)
    assert seen == [(8, 1.0), (8, 1.0), (16, 0.0), (16, 0.5), (16, 1.0), (16, 1.0)]


def test_the_discriminator_s_gradient_is_that_of_the_logistic_loss_and_r1(make_system, reals):
    system = make_system(gamma=3.0)
    real, fake = next(reals), system.sample(system.noise(4))
    metrics = system.discriminator_step(real, fake)
    ours = gradients(system.discriminator)

    system = make_system()
    real.requires_grad_()
    scores = system.discriminator(real)
    (grad,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    penalty = 3 / 2 * grad.square().sum((1, 2, 3)).mean()
    loss = softplus(-scores).mean() + softplus(system.discriminator(fake)).mean()
    (loss + penalty).backward()
    torch.testing.assert_close(metrics["penalty"], penalty.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["loss_d"], loss.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours, gradients(system.discriminator), rtol=1e-3, atol=1e-6)


def test_a_lazy_penalty_is_computed_every_few_steps_and_counts_for_as_many(make_system, reals):
    system = make_system(penalty_every=3)
    penalties = [system.step(reals)["penalty"].item() for _ in range(7)]
    assert [value > 0 for value in penalties] == [True, False, False, True, False, False, True]
    real, fake = next(reals), system.sample(system.noise(4))
    results = []
    for settings in ({"gamma": 1.0, "penalty_every": 6}, {"gamma": 6.0}):
        system = make_system(**settings)
        system.discriminator_step(real, fake)
        results.append(gradients(system.discriminator))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_the_generator_s_loss_is_the_non_saturating_one_and_leaves_the_discriminator_alone(make_system):
    system = make_system(mixing_probability=0.0)
    before = [p.clone() for p in system.discriminator.parameters()]
    torch.manual_seed(2)
    loss = system.generator_step(4)["loss_g"]
    assert all(p.grad is None and p.requires_grad for p in system.discriminator.parameters())
    assert all(map(torch.equal, before, system.discriminator.parameters()))
    system = make_system(mixing_probability=0.0)
    torch.manual_seed(2)
    scores = system.discriminator(system.generate(4))
    torch.testing.assert_close(loss, softplus(-scores).mean().detach())


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_images_have_the_styles_of_two_latents_as_often_as_was_asked(make_system, probability):
    system = make_system(mixing_probability=probability)
    crossovers = []
    system.generator.register_forward_hook(lambda _, args, __: crossovers.append(args[2] if len(args) > 1 else None))
    for _ in range(60):
        system.generate(2)
    layers = system.generator.layers
    mixed = [int(crossover) for crossover in crossovers if crossover is not None and crossover < layers]
    assert len(mixed) == pytest.approx(60 * probability, abs=12 if 0 < probability < 1 else 0)
    assert set(mixed) == (set(range(1, layers)) if probability else set())


def test_the_average_goes_half_the_way_in_its_half_life_and_is_what_samples_come_from(make_system, reals):
    system = make_system(average_images=4)
    start = [p.clone() for p in system.average.parameters()]
    assert all(map(torch.equal, start, system.generator.parameters()))
    system.step(reals)
    halfway = [(a + b) / 2 for a, b in zip(start, system.generator.parameters(), strict=True)]
    torch.testing.assert_close(list(system.average.parameters()), halfway)
    assert not torch.equal(start[0], system.generator.mapping[1].weight)
    assert system.generator.w_avg.abs().sum() > 0
    assert torch.equal(system.average.w_avg, system.generator.w_avg)
    noise = system.noise(3)
    torch.testing.assert_close(system.sample(noise), system.average(noise).clamp(-1, 1))
    assert not any(p.requires_grad for p in system.average.parameters())


def test_sampling_changes_nothing(make_system, reals):
    system = make_system()
    system.step(reals)
    noise, random = system.noise(4), torch.get_rng_state()
    before = {key: value.clone() for key, value in system.average.state_dict().items()}
    assert torch.equal(system.sample(noise), system.sample(noise))
    assert all(torch.equal(before[key], value) for key, value in system.average.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert system.generator.training and not system.average.training


def test_truncation_at_zero_is_the_mean_image_whatever_the_latents(make_system, reals):
    system = make_system()
    system.step(reals)
    full = system.sample(system.noise(3))
    system.truncation = 0.0
    images = system.sample(system.noise(3))
    mean = system.draw(system.average.w_avg.expand(3, system.average.layers, -1))
    assert torch.equal(images, mean)
    torch.testing.assert_close(images[0], images[1])  # rows of a matrix product may be rounded in two ways
    assert not torch.allclose(full[0], full[1])


def test_a_walk_is_a_straight_line_in_w(make_system):
    system = make_system()
    start, end = system.noise(2)
    walk = system.walk(start, end, 5)
    ends = system.sample(torch.stack([start, end]))
    torch.testing.assert_close(walk[[0, 4]], ends)
    middle = system.average.styles(torch.stack([start, end])).mean(0, keepdim=True)
    torch.testing.assert_close(walk[2:3], system.draw(middle))


def test_the_matrix_has_its_row_s_coarse_styles_and_its_column_s_fine_ones(make_system):
    system = make_system()
    coarse, fine = system.noise(2), system.noise(3)
    matrix = system.style_matrix(coarse, fine).view(3, 4, 1, 16, 16)
    assert (matrix[0, 0] == -1).all()
    torch.testing.assert_close(matrix[0, 1:], system.sample(fine))
    torch.testing.assert_close(matrix[1:, 0], system.sample(coarse))
    for row, column in itertools.product(range(2), range(3)):
        expected = system.average(coarse[row : row + 1], fine[column : column + 1], 2).clamp(-1, 1)
        torch.testing.assert_close(matrix[row + 1, column + 1], expected[0])


def test_a_restored_system_goes_on_at_its_step_with_its_average(make_system, reals):
    system = make_system(phase_images=8)
    for _ in range(3):
        system.step(reals)
    other = make_system(phase_images=8)
    other.load_state_dict(copy.deepcopy(system.state_dict()))  # optimisers keep what they are given
    assert (other.steps, other.resolution, other.alpha) == (3, 16, 0.5)
    noise = system.noise(2)
    assert torch.equal(other.sample(noise), system.sample(noise))
    batch = next(reals)
    losses = []
    for each in (system, other):
        torch.manual_seed(3)
        losses.append(torch.stack(list(each.step(iter([batch])).values())))
    assert torch.equal(*losses)
    assert torch.equal(other.average.w_avg, system.average.w_avg)


def test_bf16_runs_the_networks_in_bf16_and_the_losses_in_fp32(make_system, reals):
    system = make_system()
    AcceleratorState._reset_state(reset_partial_state=True)
    system.accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    seen = []
    system.discriminator.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    metrics = system.step(reals)
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in metrics.values()} == {torch.float32}
    assert {p.grad.dtype for p in system.generator.parameters() if p.grad is not None} == {torch.float32}
    assert system.generator.w_avg.dtype == torch.float32


def test_fused_and_stock_train_alike(make_system, reals):
    batches = list(itertools.islice(reals, 3)) * 2
    curves = []
    for change in (fuse, lambda network: network):
        system = make_system(phase_images=8)
        for network in system.networks.values():
            change(network)
        torch.manual_seed(3)
        draws = iter(batches)
        curves.append([torch.stack(list(system.step(draws).values())) for _ in batches])
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-3)


BAD = {
    "gamma": (-1.0, "--gamma: -1.0 does not fit"),
    "penalty_every": (0, "--penalty-every: 0 does not fit"),
    "features": (0, "--features: 0 does not fit"),
    "latent_dim": (0, "--latent-dim: 0 does not fit"),
    "w_dim": (0, "--w-dim: 0 does not fit"),
    "mapping_layers": (0, "--mapping-layers: 0 does not fit"),
    "mixing_probability": (1.5, "--mixing-probability: 1.5 does not fit; expected from 0 to 1"),
    "phase_images": (-1, "--phase-images: -1 does not fit"),
    "average_images": (0, "--average-images: 0 does not fit"),
    "image_size": (24, "--image-size: image_size must be a power of two"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_name_the_option(name):
    value, message = BAD[name]
    with pytest.raises(InputError, match=message):
        StyleGANSettings(**TINY | {name: value}).check()
