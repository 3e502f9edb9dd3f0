"""CycleGAN's step: the paper's equations, the pool, the decay, and runs that continue exactly."""

import itertools
import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

from fastgan.fuse import fuse
from fastgan.training import checkpoint, run
from fastgan.training import cyclegan as module
from fastgan.training.cyclegan import CycleGAN, CycleGANSettings, ImagePool
from fastgan.training.data import load_images
from fastgan.training.errors import InputError, Interrupted

TINY = {"image_size": 24, "features": 2, "blocks": 1}


@pytest.fixture
def make_system(accelerator):
    def make(**settings):
        torch.manual_seed(0)
        chosen = CycleGANSettings(**TINY | settings)
        chosen.check()
        return CycleGAN(chosen, channels=3, accelerator=accelerator)

    return make


@pytest.fixture
def reals():
    torch.manual_seed(1)
    return itertools.cycle(torch.rand(4, 2, 3, 24, 24) * 2 - 1)


@pytest.fixture
def domains(tmp_path):
    """Two folders of few images, as settings."""
    for name, mode, count in (("a", "RGB", 5), ("b", "L", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.effect_noise((30, 30), 20 + number).convert(mode).save(tmp_path / name / f"{number}.png")
    return {"data_a": str(tmp_path / "a"), "data_b": str(tmp_path / "b")}


@pytest.fixture
def train(domains):
    def train(out, settings=None, **options):
        given = settings or {} if options.get("resume") else TINY | {"fuse": False} | domains | (settings or {})
        return run.train("cyclegan", given, **{"out": out, "device": "cpu"} | options)

    return train


def weights(network):
    return [p.detach().clone() for p in network.parameters()]


def least_squares(scores, target):
    return (scores - target).square().mean()


def log_loss(scores, target):
    return binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))


@pytest.mark.parametrize("generator", ["resnet", "unet"])
@pytest.mark.parametrize(("loss", "gan_loss"), [("lsgan", least_squares), ("log", log_loss)])
@pytest.mark.parametrize("identity_weight", [0.0, 0.5])
def test_the_generators_gradient_is_that_of_the_papers_loss(
    make_system, reals, generator, loss, gan_loss, identity_weight
):
    system = make_system(generator=generator, loss=loss, cycle_weight=7.0, identity_weight=identity_weight)
    real_a, real_b = next(reals), next(reals)
    plain = make_system(generator=generator)
    a2b, b2a = plain.generators["a2b"], plain.generators["b2a"]
    fake_b, fake_a = a2b(real_a), b2a(real_b)
    adversarial = gan_loss(plain.discriminator_b(fake_b), 1.0) + gan_loss(plain.discriminator_a(fake_a), 1.0)
    cycle = l1_loss(b2a(fake_b), real_a) + l1_loss(a2b(fake_a), real_b)
    identity = l1_loss(b2a(real_a), real_a) + l1_loss(a2b(real_b), real_b)
    (adversarial + 7 * cycle + 7 * identity_weight * identity).backward()

    metrics, shown_a, shown_b = system.generator_step(real_a, real_b)
    torch.testing.assert_close(metrics["loss_adversarial"], adversarial.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["loss_cycle"], cycle.detach(), rtol=1e-4, atol=1e-5)
    assert ("loss_identity" in metrics) == (identity_weight > 0)
    torch.testing.assert_close((shown_a, shown_b), (fake_a.detach(), fake_b.detach()), rtol=1e-4, atol=1e-5)
    for direction, network in plain.generators.items():
        expected = torch.cat([p.grad.flatten() for p in network.parameters()])
        ours = torch.cat([p.grad.flatten() for p in system.generators[direction].parameters()])
        assert (ours - expected).norm() < 1e-4 * expected.norm()
        torch.testing.assert_close(metrics[f"grad_norm_generator_{direction}"], expected.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("loss", "gan_loss"), [("lsgan", least_squares), ("log", log_loss)])
def test_a_discriminator_learns_half_the_loss_of_real_and_fake(make_system, reals, loss, gan_loss):
    system, plain = make_system(loss=loss), make_system()
    real, fake = next(reals), next(reals)
    expected = (gan_loss(plain.discriminator_b(real), 1.0) + gan_loss(plain.discriminator_b(fake), 0.0)) / 2
    expected.backward()
    metrics = system.discriminator_step("b", real, fake)
    torch.testing.assert_close(metrics["loss_discriminator_b"], expected.detach(), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(system.discriminator_b.parameters(), plain.discriminator_b.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_generators_and_discriminators_leave_each_other_alone(make_system, reals):
    system = make_system()
    judges = (system.discriminator_a, system.discriminator_b)
    before = [weights(network) for network in judges]
    _, fake_a, _ = system.generator_step(next(reals), next(reals))
    assert all(p.grad is None and p.requires_grad for network in judges for p in network.parameters())
    torch.testing.assert_close(before, [weights(network) for network in judges], rtol=0, atol=0)

    kept = [p.grad.clone() for p in system.generators["b2a"].parameters()]
    system.discriminator_step("a", next(reals), fake_a)
    assert all(map(torch.equal, kept, (p.grad for p in system.generators["b2a"].parameters())))


def test_a_step_updates_each_network_once_from_a_batch_of_each_domain(make_system, reals):
    system = make_system()
    drawn = []
    system.step(drawn.append(batch) or batch for batch in reals)
    assert len(drawn) == system.draws == 2
    steps = {name: int(next(iter(o.state.values()))["step"]) for name, o in system.optimizers.items()}
    assert steps == dict.fromkeys(system.networks, 1)


def test_discriminators_see_the_pool_and_the_pool_gets_the_fakes(make_system, reals, monkeypatch):
    system = make_system()
    seen = {}
    monkeypatch.setattr(
        CycleGAN, "discriminator_step", lambda _, domain, real, fake: seen.update({domain: (real, fake)}) or {}
    )
    real_a, real_b = next(reals), next(reals)
    with torch.no_grad():
        (fake_b,), (fake_a,) = system.translate("a2b", real_a), system.translate("b2a", real_b)
    system.step(iter([real_a, real_b]))
    assert seen["a"][0] is real_a and seen["b"][0] is real_b
    torch.testing.assert_close((seen["a"][1], seen["b"][1]), (fake_a, fake_b), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(system.pools["a"].images), fake_a, rtol=1e-4, atol=1e-5)


def numbered(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def test_a_pool_shows_what_is_new_until_it_is_full_and_then_half_of_what_it_kept():
    torch.manual_seed(0)
    pool = ImagePool(50)
    filling = numbered(*range(50))
    torch.testing.assert_close(pool.exchange(filling[:20]), filling[:20])
    torch.testing.assert_close(pool.exchange(filling[20:]), filling[20:])
    shown, ages = [], []
    for number in range(50, 2050):
        image = pool.exchange(numbered(number)).item()
        shown.append(image)
        ages.append(number - image)
    old = [age for age in ages if age]
    assert 900 < len(old) < 1100
    assert len(pool.images) == 50
    everything = sorted([*shown, *(image.item() for image in pool.images)])
    assert everything == list(range(2050)), "each image is shown once or still there"
    assert 80 < sum(old) / len(old) < 125, "a kept image waits for 100 steps on average"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_pool_takes_any_batch(batch):
    pool = ImagePool(2)
    assert all(pool.exchange(torch.randn(batch, 3, 4, 4)).shape == (batch, 3, 4, 4) for _ in range(4))


def rates(system):
    return {group["lr"] for optimizer in system.optimizers.values() for group in optimizer.param_groups}


@pytest.mark.parametrize(("steps", "expected"), [(8, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]), (3, [1, 1, 2 / 3]), (1, [1])])
def test_the_learning_rate_stays_and_then_falls_to_zero(make_system, steps, expected):
    system = make_system(lr=0.01)
    for step, factor in enumerate(expected):
        system.begin_step(step, steps)
        assert list(rates(system)) == [pytest.approx(0.01 * factor)]
    system.begin_step(steps, steps)
    assert rates(system) == {0.0}


def test_a_run_follows_the_decay_of_its_plan(train, tmp_path, monkeypatch):
    seen, original = [], CycleGAN.step
    monkeypatch.setattr(CycleGAN, "step", lambda self, reals: seen.append(rates(self)) or original(self, reals))
    train(tmp_path / "out", {"lr": 0.01}, steps=4)
    assert seen == [{0.01}, {0.01}, {0.01}, {0.005}]


@pytest.mark.parametrize(
    "settings",
    [{}, {"fuse": True}, {"generator": "unet", "loss": "log", "batch_size": 2}, {"precision": "bf16"}],
    ids=lambda settings: " ".join(map(str, settings.values())) or "plain",
)
def test_a_stopped_run_continues_exactly_pool_and_decay_included(train, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(module, "POOL", 3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, settings, steps=10)
    original, calls = CycleGAN.generator_step, []

    def generator_step(self, *images):
        calls.append(None)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *images)

    with monkeypatch.context() as patch:
        patch.setattr(CycleGAN, "generator_step", generator_step)
        with pytest.raises(Interrupted, match=r"^stopped after step 6;"):
            train(parts, settings, steps=10)
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    assert train(parts, resume=True).steps == 10
    states = [checkpoint.load(out / "checkpoint.pt") for out in (whole, parts)]
    for key in ("networks", "pools", "drawn"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    assert states[0]["drawn"] == 20 and len(states[0]["pools"][0]["a"]) == 3
    for grid in sorted((whole / "samples").iterdir()):
        assert grid.read_bytes() == (parts / "samples" / grid.name).read_bytes(), grid.name


def test_an_epoch_is_the_larger_domain_and_channels_are_those_of_the_colourful_one(train, tmp_path):
    assert train(tmp_path / "out", epochs=2).steps == 10
    state = checkpoint.load(tmp_path / "out" / "checkpoint.pt")
    assert (state["images"], state["channels"], state["drawn"]) == ([5, 3], 3, 20)
    assert {"epoch_0001.png", "epoch_0002.png", "final.png"} == {p.name for p in (tmp_path / "out/samples").iterdir()}


def test_a_domain_of_one_image_trains(train, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (30, 30), "red").save(tmp_path / "one" / "red.png")
    assert train(tmp_path / "out", {"data_b": str(tmp_path / "one")}, steps=2).steps == 2


def test_a_grid_shows_images_translations_and_the_way_back(make_system):
    system = make_system()
    sets = [load_images(f"photos:{name}", 24) for name in ("china", "flower")]
    draw, again = system.sample_grid(sets), system.sample_grid(sets)
    grid = draw()
    assert grid.columns == 6 and grid.images.shape == (48, 3, 24, 24)
    real_a, fake_b, cycled_a, real_b, fake_a, cycled_b = grid.images.view(8, 6, 3, 24, 24).unbind(1)
    with torch.no_grad():
        a2b, b2a = system.generators["a2b"], system.generators["b2a"]
        for ours, expected in (
            (fake_b, a2b(real_a)),
            (cycled_a, b2a(fake_b)),
            (fake_a, b2a(real_b)),
            (cycled_b, a2b(fake_a)),
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    pixels = [set(map(bytes, images.pixels)) for images in sets]
    for real, known in ((real_a, pixels[0]), (real_b, pixels[1])):
        assert {bytes(image.numpy()) for image in ((real + 1) * 127.5).round().byte()} <= known
    assert torch.equal(again().images, grid.images)
    for p in a2b.parameters():
        p.data.zero_()
    assert not torch.equal(draw().images, grid.images), "with the weights of the moment"


def test_a_fused_system_trains_as_the_stock_one(make_system, reals):
    batches, losses = [next(reals) for _ in range(10)], []
    for change in (fuse, lambda network: network):
        system = make_system(features=4)
        for network in system.networks.values():
            change(network)
        draws = iter(batches)
        losses.append([torch.stack(list(system.step(draws).values())) for _ in range(5)])
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)


def test_a_moved_domain_can_be_resumed_and_another_is_named(train, domains, tmp_path):
    train(tmp_path / "out", steps=1)
    (tmp_path / "b").rename(tmp_path / "moved")
    train(tmp_path / "out", {"data_b": str(tmp_path / "moved")}, resume=True, steps=2)
    with pytest.raises(InputError, match=r"^--data-b: 5 images with 3 channels, but .* was trained on 3 with 3;"):
        train(tmp_path / "out", {"data_b": domains["data_a"]}, resume=True, steps=3)


BAD = {
    "image_size": [
        (20, "--image-size: 20 "),
        (30, "--image-size: 30 does not fit; expected a multiple of 4 from 24 to 16384"),
        (2**31, "--image-size: 2147483648 "),
    ],
    "batch_size": [(0, "--batch-size: 0 "), (4, "--batch-size: 4 is more than the 3 images in --data-b")],
    "generator": [("vit", "--generator: vit does not fit; expected resnet or unet")],
    "loss": [("hinge", "--loss: hinge does not fit; expected lsgan or log")],
    "blocks": [(0, "--blocks: 0 ")],
    "features": [(0, "--features: 0 ")],
    "cycle_weight": [(-1.0, "--cycle-weight: -1.0 ")],
    "identity_weight": [(-1.0, "--identity-weight: -1.0 ")],
    "data_a": [("nowhere", "--data-a: nowhere is no folder"), ("photos:rome", "--data-a: no photos:rome")],
}


@pytest.mark.parametrize(("name", "value", "message"), [(name, *pair) for name, pairs in BAD.items() for pair in pairs])
def test_bad_settings_name_the_option_before_anything_is_written(train, tmp_path, name, value, message):
    with pytest.raises(InputError, match=f"^{message}"):
        train(tmp_path / "out", {name: value}, steps=1)
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_named_with_its_option(train, domains, tmp_path):
    (tmp_path / "b" / "text.png").write_text("text")
    with pytest.raises(InputError, match=r"^--data-b: cannot read image .*text\.png"):
        train(tmp_path / "out", steps=1)
