"""SRGAN's data, the steps of both phases, what it measures, and runs that continue exactly."""

import copy
import itertools
import os
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from rich.console import Console
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from fastgan.models import srgan as models
from fastgan.models.srgan import Generator, VGGFeatures
from fastgan.training import checkpoint, crops, run
from fastgan.training import srgan as module
from fastgan.training.crops import EPOCH, CropSet
from fastgan.training.data import open_pictures
from fastgan.training.errors import InputError, Interrupted
from fastgan.training.images import to_pixels
from fastgan.training.srgan import SRGAN, SRGANSettings, enlarge, luma, shrink, upscale

TINY = {"image_size": 32, "batch_size": 2, "features": 4, "blocks": 1, "pretrain_steps": 2}


@pytest.fixture
def make_system(accelerator):
    def make(**settings):
        torch.manual_seed(0)
        chosen = SRGANSettings(**TINY | settings)
        chosen.check()
        system = SRGAN(chosen, channels=3, accelerator=accelerator)
        system.prepare()
        return system

    return make


@pytest.fixture
def reals():
    torch.manual_seed(1)
    return itertools.cycle(torch.rand(4, 2, 3, 32, 32) * 2 - 1)


@pytest.fixture
def pictures(tmp_path):
    """`pictures((60, 40), ...)` is a folder of images of these sizes, of which pixel (x, y) of image i is (x, y, 10 i)."""

    def make(*sizes):
        folder = tmp_path / "pictures"
        folder.mkdir()
        for number, (width, height) in enumerate(sizes):
            across, down = np.meshgrid(np.arange(width), np.arange(height))
            pixels = np.stack([across, down, np.full_like(down, 10 * number)], axis=2).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
        return folder

    return make


@pytest.fixture
def train(tmp_path):
    def train(out, settings=None, **options):
        given = settings or {} if options.get("resume") else TINY | {"fuse": False} | (settings or {})
        return run.train("srgan", given, **{"out": out, "device": "cpu"} | options)

    return train


def load(folder, size=32):
    return CropSet(open_pictures(str(folder), "--data", whole=True), size)


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_crops_lie_everywhere_in_their_picture_and_in_all_eight_poses(pictures):
    images = load(pictures(*[(40, 36)] * 10))
    assert len(images) == EPOCH // 9 * 9 and len(images.whole) == 9 and len(images.held_out) == 1
    batch = images.draw(np.arange(len(images)), np.random.default_rng(0))
    assert batch.shape == (len(images), 3, 32, 32) and batch.dtype == np.uint8
    corners, poses, numbers = set(), set(), set()
    for across, down, number in batch.astype(int):
        numbers.add(number[0, 0])
        corners.add((across.min(), down.min()))
        poses.add(
            (across[0, 1] - across[0, 0], across[1, 0] - across[0, 0], down[0, 1] - down[0, 0], down[1, 0] - down[0, 0])
        )
        assert np.ptp(across) == np.ptp(down) == 31
    assert corners == {(x, y) for x in range(9) for y in range(5)}
    assert poses == {
        *((sx, 0, 0, sy) for sx in (1, -1) for sy in (1, -1)), *((0, sx, sy, 0) for sx in (1, -1) for sy in (1, -1)),
    }  # fmt: skip
    assert numbers == {10 * i for i in range(1, 10)}


def test_the_generator_that_is_given_decides_the_crops(pictures):
    images, rows = load(pictures(*[(40, 36)] * 10)), np.arange(6)
    first, same, other = (images.draw(rows, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == same).all() and (first != other).any()


def test_larger_pictures_are_drawn_more_often_and_each_at_least_once(pictures, monkeypatch):
    monkeypatch.setattr(crops, "EPOCH", 100)
    images = load(pictures((32, 32), (32, 32), (320, 160), *[(32, 32)] * 8))
    assert np.bincount(images.places).tolist() == [1, 86, *[1] * 7]


@pytest.mark.parametrize(("size", "axis"), [((160, 40), 0), ((40, 160), 1)], ids=["wide", "high"])
def test_few_pictures_are_cut_and_no_crop_has_a_pixel_of_what_is_kept_for_testing(pictures, size, axis):
    images = load(pictures(size, size))
    assert len(images.whole) == 4 and len(images.held_out) == 2
    batch = images.draw(np.arange(len(images)), np.random.default_rng(0))
    assert set(np.unique(batch[:, axis])) == {*range(80), *range(120, 160)}
    for row in range(2):
        assert set(np.unique(images.held_out[row][axis])) == set(range(80, 120))
        assert images.held_out[row][2].max() == 10 * row


def test_of_ten_pictures_or_more_one_in_ten_is_kept(pictures):
    images = load(pictures(*[(32, 32)] * 21))
    assert [int(images.held_out[row][2, 0, 0]) for row in range(3)] == [0, 100, 200]
    assert {int(images.whole[row][2, 0, 0]) for row in range(18)} == {10 * i for i in range(21) if i % 10}


def test_the_photographs_are_whole_and_cut():
    images = load("photos", 96)
    assert [images.held_out[row].shape for row in range(2)] == [(3, 427, 160)] * 2
    assert [images.whole[row].shape for row in range(4)] == [(3, 427, 320), (3, 427, 160)] * 2


def test_pictures_too_large_for_memory_are_read_for_every_batch_with_the_same_result(pictures, monkeypatch):
    folder = pictures(*[(40, 36)] * 10)
    kept = load(folder)
    monkeypatch.setattr(crops, "IN_MEMORY", 0)
    images, rows = load(folder), np.arange(5)
    assert images.whole.pixels is None
    assert (images.draw(rows, np.random.default_rng(0)) == kept.draw(rows, np.random.default_rng(0))).all()


@pytest.mark.parametrize(("mode", "color"), [("L", 90), ("LA", (90, 255)), ("RGBA", (90, 90, 90, 255)), ("1", 1)])
def test_grayscale_and_transparent_pictures_are_taken_in_three_channels(tmp_path, mode, color):
    for number in range(10):
        Image.new(mode, (32, 32), color).save(tmp_path / f"{number}.png")
    images = load(tmp_path)
    assert images.channels == 3
    assert (images.draw(np.arange(3), np.random.default_rng(0)) == (255 if mode == "1" else 90)).all()


def test_a_picture_smaller_than_the_crop_is_named(pictures):
    folder = pictures(*[(40, 36)] * 12, (50, 31))
    with pytest.raises(InputError, match=r"^--data: .*12\.png, 50x31, does not fit; expected sides of 32 or more$"):
        load(folder)


def test_a_part_smaller_than_the_crop_is_named(pictures):
    with pytest.raises(
        InputError, match=r"^--data: 75% to 100% of .*00\.png, 25x60, does not fit; expected sides of 32"
    ):
        load(pictures((100, 60)))


def test_a_broken_picture_is_named(pictures):
    folder = pictures(*[(40, 36)] * 10)
    (folder / "text.png").write_text("text")
    with pytest.raises(InputError, match=r"^--data: cannot read image .*text\.png"):
        load(folder)


# ── The step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def gradients(network):
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_the_first_phase_descends_the_squared_difference_of_pixels(make_system, reals):
    system, twin, large = make_system(), make_system(), next(reals)
    metrics = system.step(iter([large]))
    loss = mse_loss(twin.generator(shrink(large, 4)), large)
    loss.backward()
    torch.testing.assert_close(gradients(system.generator), gradients(twin.generator))
    torch.testing.assert_close(metrics["loss_content"], loss.detach())
    assert not gradients(system.discriminator) and not system.optimizers["discriminator"].state


def bce(logits, target):
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


@pytest.mark.parametrize("content", ["pixels", "vgg"])
def test_the_second_phase_descends_the_papers_losses(make_system, reals, vgg_file, content):
    settings = {"pretrain_steps": 0, "adversarial_weight": 0.3, "vgg_weights": vgg_file if content == "vgg" else ""}
    system, twin, large = make_system(**settings), make_system(**settings), next(reals)
    metrics = system.step(iter([large]))
    fake = twin.generator(shrink(large, 4))
    loss_d = bce(twin.discriminator(large), 1) + bce(twin.discriminator(fake.detach()), 0)
    loss_d.backward()
    torch.testing.assert_close(gradients(system.discriminator), gradients(twin.discriminator))
    twin.optimizers["discriminator"].step()
    of_pixels = mse_loss(fake, large)
    of_features = 0.006 * mse_loss(twin.vgg(fake), twin.vgg(large)) if twin.vgg else None
    loss_content = of_pixels if content == "pixels" else of_features
    adversarial = bce(twin.discriminator(fake), 1)
    (loss_content + 0.3 * adversarial).backward()
    torch.testing.assert_close(gradients(system.generator), gradients(twin.generator))
    expected = {"loss_content": loss_content, "loss_adversarial": adversarial, "loss_d": loss_d}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach())


def test_the_generator_s_update_leaves_the_discriminator_alone(make_system, reals):
    system = make_system(pretrain_steps=0)
    system.step(reals)
    grads = copy.deepcopy(gradients(system.discriminator))
    system.optimizers["discriminator"].zero_grad()
    fake = system.generator(shrink(next(reals), 4))
    system.discriminator.requires_grad_(False)
    bce(system.discriminator(fake), 1).backward()
    assert grads and not gradients(system.discriminator)
    assert all(p.requires_grad for p in make_system().discriminator.parameters())
    system.discriminator.requires_grad_(True)
    system.step(reals)
    assert all(p.requires_grad for p in system.discriminator.parameters())


def test_srresnet_is_kept_as_it_was_before_the_second_phase(make_system, reals):
    system = make_system(pretrain_steps=2)
    for _ in range(2):
        system.step(reals)
    before = copy.deepcopy(system.generator.state_dict())
    assert not system.optimizers["discriminator"].state
    for _ in range(2):
        system.step(reals)
    torch.testing.assert_close(dict(system.srresnet.state_dict()), dict(before), rtol=0, atol=0)
    assert not torch.equal(before["conv1.weight"], system.generator.conv1.weight)
    assert len(system.optimizers["discriminator"].state) > 0


def rates(system):
    return {group["lr"] for optimizer in system.optimizers.values() for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("pretrain_steps", "steps", "expected"),
    [(4, 8, [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]), (0, 4, [0.1, 0.1, 0.01, 0.01]), (8, 4, [1, 1, 1, 1])],
)
def test_the_learning_rate_falls_in_each_phase(make_system, pretrain_steps, steps, expected):
    system = make_system(pretrain_steps=pretrain_steps, lr=0.01)
    for step, factor in enumerate(expected):
        system.begin_step(step, steps)
        assert list(rates(system)) == [pytest.approx(0.01 * factor)]


def test_both_phases_have_the_same_metrics(make_system, reals):
    system = make_system(pretrain_steps=1)
    first, second = system.step(reals), system.step(reals)
    assert list(first) == list(second)
    assert not any(first[name] for name in ("loss_adversarial", "loss_d", "d_real", "d_fake", "grad_norm_d"))
    assert all(second[name] > 0 for name in second)


def test_a_fused_system_trains_as_the_stock_one(make_system, reals):
    batches, losses = [next(reals) for _ in range(5)], []
    for fused in (True, False):
        system = make_system(lr=1e-4)
        if fused:
            system.fuse()
        draws = iter(batches)
        losses.append([torch.stack(list(system.step(draws).values())) for _ in range(5)])
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)


# ── VGG19 ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def vgg_file(tmp_path, monkeypatch):
    """A state_dict as torchvision's vgg19 has it, of a narrow one."""
    monkeypatch.setattr(models, "VGG19", (2, 2, 0, 3, 3, 0, 4))
    torch.manual_seed(3)
    state = VGGFeatures().state_dict() | {"features.99.weight": torch.ones(2), "classifier.0.weight": torch.ones(4, 4)}
    torch.save(state, tmp_path / "vgg19.pth")
    return str(tmp_path / "vgg19.pth")


def test_a_torchvision_file_is_loaded_and_frozen(vgg_file):
    torch.manual_seed(4)
    vgg, state = module.load_vgg(vgg_file), torch.load(vgg_file, weights_only=True)
    for name, weight in vgg.state_dict().items():
        assert torch.equal(weight, state[name])
    assert not any(p.requires_grad for p in vgg.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {f"module.{key}": value for key, value in state.items()}, "features.0.weight is missing"),
        (lambda state: {**state, "features.2.bias": torch.ones(7)}, r"features.2.bias has shape \(7,\)"),
        (lambda state: {**state, "features.0.weight": 3}, "features.0.weight is missing"),
        (lambda state: [state], "features.0.weight is missing"),
    ],
    ids=["other keys", "another shape", "no tensor", "a list"],
)
def test_another_state_dict_is_named_before_anything_is_written(train, vgg_file, tmp_path, change, message):
    torch.save(change(torch.load(vgg_file, weights_only=True)), vgg_file)
    with pytest.raises(InputError, match=rf"^--vgg-weights: .*vgg19\.pth: {message}; expected the state_dict of torch"):
        train(tmp_path / "out", {"vgg_weights": vgg_file}, steps=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_a_file_that_cannot_be_read_is_named(train, tmp_path, content):
    path = tmp_path / "vgg19.pth"
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"^--vgg-weights: cannot read .*vgg19\.pth \(.*\); expected the state_dict"):
        train(tmp_path / "out", {"vgg_weights": str(path)}, steps=1)


def test_a_run_says_when_its_content_loss_is_of_pixels(train, tmp_path, vgg_file, capsys):
    for settings, says in (({}, True), ({"vgg_weights": vgg_file}, False)):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(tmp_path / "out", settings, steps=3, console=Console(width=200))
        assert ("no --vgg-weights: the content loss" in capsys.readouterr().out) == says


def test_a_moved_vgg_can_be_resumed_and_none_cannot_become_one(train, tmp_path, vgg_file):
    train(tmp_path / "with", {"vgg_weights": vgg_file}, steps=1)
    train(tmp_path / "without", steps=1)
    os.rename(vgg_file, moved := str(tmp_path / "moved.pth"))
    assert train(tmp_path / "with", {"vgg_weights": moved}, resume=True, steps=2).steps == 2
    with pytest.raises(InputError, match=r"^--vgg-weights .*moved\.pth does not fit .*; a resumed run keeps it$"):
        train(tmp_path / "without", {"vgg_weights": moved}, resume=True, steps=2)


# ── Sizes and scores ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_shrinking_and_enlarging_are_pillows_bicubic():
    pixels = np.random.default_rng(0).integers(
        80, 170, (24, 32, 3), dtype=np.uint8
    )  # Pillow clips between its two passes
    picture = Image.fromarray(pixels)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    for ours, size in ((shrink(images, 4), (8, 6)), (enlarge(images, 2), (64, 48))):
        expected = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).astype(int)
        found = to_pixels(ours)[0].permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() <= 1
        torch.testing.assert_close((ours + 1) * 127.5, ((ours + 1) * 127.5).round(), rtol=0, atol=1e-4)


def test_luma_is_that_of_bt_601():
    colors = torch.tensor([[1, 1, 1], [-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).float()[..., None, None]
    expected = torch.tensor([235, 16, 16 + 65.481, 16 + 128.553, 16 + 24.966])
    torch.testing.assert_close(luma(colors).flatten(), expected)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("size", [(1, 1), (7, 50), (41, 23)], ids=str)
def test_tiles_make_what_the_whole_image_makes(monkeypatch, scale, size):
    torch.manual_seed(0)
    network = Generator(scale, 3, features=4, blocks=1)
    network(torch.randn(4, 3, 16, 16))  # statistics of its own
    monkeypatch.setattr(module, "TILE", 9)
    pixels = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    seen = []
    hook = network.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    found = upscale(network, pixels)
    hook.remove()
    assert max(max(shape) for shape in seen) <= 9 + 2 * network.reach, "memory is bounded"
    with torch.no_grad():
        expected = to_pixels(network.eval()(pixels / 127.5 - 1))
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    assert (found.int() - expected.int()).abs().max() <= 1 and (found != expected).float().mean() < 0.01


def test_upscaling_changes_nothing_in_the_network():
    network = Generator(2, 3, features=4, blocks=1)
    before = copy.deepcopy(network.state_dict())
    upscale(network, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert network.training


def test_scores_are_means_over_the_test_images_on_luma_without_the_border(make_system, reals, pictures):
    system, sets = make_system(pretrain_steps=1), [load(pictures(*[(50, 45)] * 11))]
    random = np.random.default_rng(0)
    sets[0].held_out.pixels = [random.integers(0, 256, (3, 45, 50), dtype=np.uint8) for _ in range(2)]
    for _ in range(2):
        system.step(reals)
    scores = system.scores(sets)
    names = ["bicubic", "SRResNet", "SRGAN"]
    assert list(scores) == [f"{measure}, {name}" for measure in ("PSNR", "SSIM") for name in names]
    expected = []
    for pixels in sets[0].held_out.pixels:
        large = torch.from_numpy(pixels[:, :44, :48].copy())[None] / 127.5 - 1
        difference = (luma(enlarge(shrink(large, 4), 4)) - luma(large))[..., 4:-4, 4:-4]
        expected.append(10 * torch.log10(255**2 / difference.double().square().mean()).item())
    assert scores["PSNR, bicubic"].value == pytest.approx(np.mean(expected), abs=1e-3)
    assert str(scores["PSNR, bicubic"]) == f"{np.mean(expected):.2f} dB"
    assert 0 < scores["SSIM, bicubic"].value < 1
    assert scores["PSNR, SRResNet"].value != scores["PSNR, SRGAN"].value


def test_perfect_networks_score_highest(make_system, pictures, monkeypatch):
    system, sets = make_system(), [load(pictures(*[(50, 45)] * 10))]
    monkeypatch.setattr(SRGAN, "results", lambda _, large: {"perfect": large})
    scores = system.scores(sets)
    assert scores["SSIM, perfect"].value == pytest.approx(1) and scores["PSNR, perfect"].value > 100


def test_a_grid_shows_bicubic_ours_and_the_original(make_system, reals, pictures):
    system, sets = make_system(pretrain_steps=1), [load(pictures(*[(70, 60)] * 10, (61, 71)))]
    draw = system.sample_grid(sets)
    images, columns = draw()
    assert columns == 3 and images.shape == (6, 3, 60, 60)
    bicubic, ours, original = images.view(2, 3, 3, 60, 60).unbind(1)
    torch.testing.assert_close(bicubic, enlarge(shrink(original, 4), 4))
    torch.testing.assert_close(to_pixels(original[0, 0, 0]).int(), torch.arange(4, 64, dtype=torch.int32))
    with torch.no_grad():
        expected = copy.deepcopy(system.generator).eval()(shrink(original, 4)).clamp(-1, 1)
    torch.testing.assert_close(ours, expected, atol=1.1 / 127.5, rtol=0)
    for _ in range(2):
        system.step(reals)
    assert draw().columns == 4, "of both phases"


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stop", [2, 4], ids=["first phase", "second phase"])
@pytest.mark.parametrize("settings", [{}, {"fuse": True}, {"precision": "bf16"}], ids=["plain", "fused", "bf16"])
def test_a_stopped_run_continues_exactly(train, tmp_path, monkeypatch, settings, stop):
    settings = settings | {"pretrain_steps": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, settings, steps=6)
    original, calls = SRGAN.step, []

    def step(self, reals):
        calls.append(None)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, reals)

    with monkeypatch.context() as patch:
        patch.setattr(SRGAN, "step", step)
        with pytest.raises(Interrupted, match=rf"^stopped after step {stop};"):
            train(parts, settings, steps=6)
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    assert train(parts, resume=True).steps == 6
    states = [checkpoint.load(out / "checkpoint.pt") for out in (whole, parts)]
    for key in ("networks", "drawn", "step"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    assert (whole / "samples/final.png").read_bytes() == (parts / "samples/final.png").read_bytes()


def test_a_run_says_how_good_it_is_and_shows_it(train, tmp_path):
    result = train(tmp_path / "out", steps=3)
    assert [str(score)[-2:] for name, score in result.scores.items() if name.startswith("PSNR")] == ["dB"] * 3
    shown = Image.open(tmp_path / "out/samples/final.png")
    assert shown.size == (4 * 162 + 2, 2 * 258 + 2), "bicubic, of both phases, and the original, of two photographs"


def test_another_number_of_pictures_is_named(train, tmp_path, pictures):
    train(tmp_path / "out", {"data": str(pictures(*[(40, 36)] * 10))}, steps=1)
    with pytest.raises(InputError, match=r"^--data: 2 images with 3 channels, but .* was trained on 10 with 3;"):
        train(tmp_path / "out", {"data": "photos"}, resume=True, steps=2)


BAD = {
    "image_size": [
        (40, "--image-size: 40 does not fit; expected a multiple of 16 from 32 to 16384"),
        (16, "--image-size: 16 "),
        (2**31, "--image-size: 2147483648 "),
    ],
    "batch_size": [(1, "--batch-size: 1 does not fit; expected 2 or more, as batch norm needs")],
    "scale": [(3, "--scale: 3 does not fit; expected 2, 4 or 8")],
    "features": [(0, "--features: 0 ")],
    "blocks": [(0, "--blocks: 0 ")],
    "pretrain_steps": [(-1, "--pretrain-steps: -1 ")],
    "adversarial_weight": [(-1.0, "--adversarial-weight: -1.0 ")],
    "data": [("nowhere", "--data: nowhere is no folder"), ("digits", "--data: digit 1, 8x8, does not fit; expected sides")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), [(name, *pair) for name, pairs in BAD.items() for pair in pairs])
def test_bad_settings_name_the_option_before_anything_is_written(train, tmp_path, name, value, message):
    with pytest.raises(InputError, match=f"^{message}"):
        train(tmp_path / "out", {name: value}, steps=1)
    assert not (tmp_path / "out").exists()
