"""Domain-adversarial training: its data, its step, its schedules, and what a run says."""

import copy
import math
import os
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from typer.testing import CliRunner

from fastgan import cli
from fastgan.fuse import explain
from fastgan.training import checkpoint, run
from fastgan.training.dann import DANN, DANNSettings, principal_components
from fastgan.training.data import Batches, Labelled
from fastgan.training.domains import COPIES, SOURCE, TEST, load_domains
from fastgan.training.errors import InputError, Interrupted
from fastgan.training.generate import generate

TINY = {"image_size": 16, "batch_size": 8, "features": 2}


@pytest.fixture
def make_system(accelerator):
    def make(**settings):
        torch.manual_seed(0)
        return DANN(DANNSettings(**TINY | settings), channels=3, accelerator=accelerator)

    return make


@pytest.fixture
def pair():
    """A batch of the source and one of the target."""
    return [Labelled(torch.rand(8, 3, 16, 16) * 2 - 1, torch.randint(10, (8,))) for _ in range(2)]


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_sets_have_labels_and_share_no_digit():
    domains = load_domains(16)
    assert [len(images) for images in domains] == [SOURCE * COPIES, (1797 - SOURCE - TEST) * COPIES, TEST]
    assert all(images.channels == 3 and len(images.labels) == len(images) for images in domains)
    from sklearn.datasets import load_digits

    order = np.random.default_rng(0).permutation(1797)
    labels = load_digits().target
    assert np.array_equal(domains.test.labels, labels[order[:TEST]])
    assert np.array_equal(domains.source.labels, labels[order[TEST : TEST + SOURCE]].repeat(COPIES))
    assert np.array_equal(domains.target.labels, labels[order[TEST + SOURCE :]].repeat(COPIES))


def test_the_domains_look_as_they_should():
    domains = load_domains(16)
    source, target, test = (images[np.arange(len(images))] for images in domains)
    assert (source == source[:, :1]).all()  # gray
    assert (target != target[:, :1]).any(axis=(1, 2, 3)).mean() > 0.9
    corners = source[..., :2, :2].mean(), target[..., :2, :2].mean(), test[..., :2, :2].mean()
    assert corners[0] < 10 < 60 < min(corners[1:])  # black against photographs
    assert len(np.unique(source.reshape(len(source), -1), axis=0)) > 0.99 * len(source)


def test_a_blended_digit_is_the_difference_of_patch_and_digit(monkeypatch):
    from fastgan.training import domains

    patch = np.random.default_rng(0).integers(256, size=(6, 6, 3), dtype=np.uint8)
    digit = np.repeat(np.random.default_rng(1).integers(256, size=(6, 6, 1), dtype=np.uint8), 3, axis=2)
    blended = domains._blended(digit, [patch], np.random.default_rng(0))
    assert np.array_equal(blended, abs(patch.astype(int) - digit))


def test_no_part_of_a_photograph_is_in_the_target_and_in_the_test_set(monkeypatch):
    """Photographs that number their parts instead of showing them, and digits that are black."""
    import sklearn.datasets

    from fastgan.training import domains

    photos = [np.zeros((domains.ROWS * 20, domains.COLUMNS * 20, 3), np.uint8) for _ in range(2)]
    for number, part in enumerate(domains._parts(photos)):
        part[:] = number + 1
    sample = sklearn.datasets.load_sample_images()
    sample.images = photos
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: sample)
    digits = sklearn.datasets.load_digits()
    digits.images = np.zeros_like(digits.images)
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)
    _, target, test = load_domains.__wrapped__(16)
    in_target, in_test = (set(np.unique(images[np.arange(len(images))])) for images in (target, test))
    assert in_target | in_test == set(range(1, 2 * domains.ROWS * domains.COLUMNS + 1))
    assert not in_target & in_test and len(in_target) > 2 * len(in_test)


def test_batches_bring_the_labels_of_their_images(accelerator):
    images = load_domains(16).source
    batches = Batches(images, 64, seed=1, accelerator=accelerator)
    batch, labels = next(batches)
    rows = np.random.default_rng((1, 0, 0)).permutation(len(images))[:64]
    assert torch.equal(labels, torch.from_numpy(images.labels[rows]))
    torch.testing.assert_close(batch, torch.from_numpy(images[rows]) / 127.5 - 1)


# ── The step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_features_descend_the_loss_of_labels_and_ascend_that_of_domains(make_system, pair):
    source, target = pair
    system, twin = make_system(), make_system()
    system.reversal.coeff = 0.3
    torch.manual_seed(1)
    metrics = system.adapt(source, target.images)

    torch.manual_seed(1)
    features = [twin.adapted.features(images) for images in (source.images, target.images)]
    loss = cross_entropy(twin.adapted.labels(features[0]), source.labels)
    scores, truth = twin.domains(torch.cat(features))[:, 0], torch.tensor([1.0] * 8 + [0.0] * 8)
    loss_domains = binary_cross_entropy_with_logits(scores, truth)
    conv, head = twin.adapted.features[0].weight, twin.domains[1].weight
    twin.reversal.coeff = -1.0  # no reversal
    scores = twin.domains(torch.cat(features))[:, 0]
    of_labels = torch.autograd.grad(loss, conv, retain_graph=True)[0]
    of_domains, of_head = torch.autograd.grad(binary_cross_entropy_with_logits(scores, truth), (conv, head))
    torch.testing.assert_close(system.adapted.features[0].weight.grad, of_labels - 0.3 * of_domains)
    torch.testing.assert_close(system.domains[1].weight.grad, of_head)
    torch.testing.assert_close(metrics["loss_adapted"], loss.detach())
    torch.testing.assert_close(metrics["loss_domains"], loss_domains.detach())


def test_adapting_never_sees_the_target_s_labels(make_system, pair):
    source, target = pair
    weights = []
    for labels in (target.labels, target.labels.flip(0) + 1):
        system = make_system()
        torch.manual_seed(1)
        metrics = system.step(iter([source, Labelled(target.images, labels % 10)]))
        weights.append(
            [p.clone() for name in ("adapted", "domains", "source_only") for p in system.networks[name].parameters()]
        )
    assert all(map(torch.equal, *weights))
    names = {"adapted", "domains", "source_only", "on_target"}
    assert set(metrics) == {f"{kind}_{name}" for kind in ("loss", "grad_norm") for name in names}


def test_the_baselines_learn_from_one_domain_each(make_system, pair):
    system = make_system()
    before = copy.deepcopy(system.networks)
    system.learn("source_only", pair[0])
    moved = {
        name for name, network in system.networks.items()
        if any((a != b).any() for a, b in zip(network.parameters(), before[name].parameters(), strict=True))
    }  # fmt: skip
    assert moved == {"source_only"}


def test_the_schedules_are_the_paper_s(make_system):
    system = make_system(lr=0.1)
    for step in (0, 50, 99):
        system.begin_step(step, 100)
        done = step / 100
        assert system.reversal.coeff.item() == pytest.approx(2 / (1 + math.exp(-10 * done)) - 1)
        rates = {group["lr"] for optimizer in system.optimizers.values() for group in optimizer.param_groups}
        assert len(rates) == 1 and rates.pop() == pytest.approx(0.1 / (1 + 10 * done) ** 0.75)


def test_a_fused_system_trains_as_the_stock_one_and_folds_the_reversal(make_system, pair):
    losses = []
    for fused in (False, True):
        system = make_system()
        if fused:
            system.fuse()
            assert ("0–1", "GradientReversal → Linear", True, "") in explain(system.domains)
        torch.manual_seed(3)
        for step in range(5):
            system.begin_step(step, 5)
            metrics = system.step(iter(pair))
        losses.append(metrics)
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


# ── What is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_are_accuracies_on_the_test_set_and_change_nothing(make_system, monkeypatch):
    system = make_system()
    test = load_domains(16).test
    before = copy.deepcopy(system.state_dict())
    scores = system.scores([])
    assert list(scores) == ["accuracy, source only", "accuracy, adapted", "accuracy, trained on target"]
    images = torch.from_numpy(test[np.arange(len(test))]) / 127.5 - 1
    with torch.no_grad():
        guesses = copy.deepcopy(system.adapted).eval()(images).argmax(1).numpy()
    assert scores["accuracy, adapted"].value == pytest.approx((guesses == test.labels).mean())
    torch.testing.assert_close(system.state_dict(), before)
    assert all(network.training for network in system.networks.values())


def test_principal_components_are_the_directions_of_most_variance():
    factors = torch.randn(200, 2) * torch.tensor([5.0, 2.0])
    rotation = torch.linalg.qr(torch.randn(6, 6))[0][:2]
    points = principal_components(factors @ rotation + 3)
    torch.testing.assert_close(points.var(0), torch.linalg.eigvalsh(factors.t().cov()).flip(0))
    torch.testing.assert_close(points.mean(0), torch.zeros(2), atol=1e-5, rtol=0)


def test_of_a_single_feature_the_second_component_is_zero():
    points = principal_components(torch.tensor([[1.0], [2.0], [6.0]]))
    torch.testing.assert_close(points.abs(), torch.tensor([[2.0, 0], [1, 0], [3, 0]]))


def test_the_plots_show_both_domains_and_all_classes_before_and_after(make_system):
    system, domains = make_system(), load_domains(16)
    draw = system.sample_grid([domains.source, domains.target])
    random = torch.get_rng_state()
    plots, columns = draw()
    assert columns == 2 and len(plots) == 4 and torch.equal(torch.get_rng_state(), random)
    blue, red, white = (
        (torch.tensor(c) / 127.5 - 1)[:, None, None] for c in ((65, 105, 225), (178, 34, 34), (255,) * 3)
    )
    for plot, colours in zip(plots, ((blue, red), None, (blue, red), None), strict=True):
        for colour in (white, *(colours or ())):
            assert (plot == colour).all(0).any()
    with torch.no_grad():
        system.adapted.features[0].weight.mul_(-1)
    again = draw().images
    assert torch.equal(again[:2], plots[:2]) and not torch.equal(again[2:], plots[2:])


def test_the_command_prints_the_three_accuracies(tmp_path):
    options = ["--image-size", "16", "--features", "2", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(cli.app, ["train", "dann", *options])
    assert result.exit_code == 0
    for name in ("accuracy, source only", "accuracy, adapted", "accuracy, trained on target"):
        assert name in result.output
    assert (tmp_path / "samples" / "final.png").stat().st_size > 0
    with pytest.raises(InputError, match=r"checkpoint\.pt: dann makes no images$"):
        generate(tmp_path)


def test_a_stopped_run_continues_exactly(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run.train("dann", TINY, out=whole, steps=6, device="cpu")
    original, calls = DANN.adapt, []

    def adapt(self, *batches):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *batches)

    with monkeypatch.context() as patch:
        patch.setattr(DANN, "adapt", adapt)
        with pytest.raises(Interrupted, match=r"^stopped after step 3;"):
            run.train("dann", TINY, out=parts, steps=6, device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    assert run.train("dann", {}, out=parts, steps=6, device="cpu", resume=True).steps == 6
    states = [checkpoint.load(out / "checkpoint.pt") for out in (whole, parts)]
    torch.testing.assert_close(states[0]["networks"], states[1]["networks"], rtol=0, atol=0)
    assert (whole / "samples/final.png").read_bytes() == (parts / "samples/final.png").read_bytes()


BAD = {
    "image_size": (30, "--image-size: 30 does not fit; expected a multiple of 4 from 16 to 84"),
    "batch_size": (1, "--batch-size: 1 does not fit; expected 2 or more, as batch norm needs"),
    "features": (0, "--features: 0 does not fit"),
    "lr": (0.0, "--lr: 0.0 does not fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_name_the_option(name):
    value, message = BAD[name]
    with pytest.raises(InputError, match=message):
        DANNSettings(**TINY | {name: value}).check()
