"""`CapturedStep`: what it computes is what the step computes, call after call. Without a GPU a recording is a stand-in."""

import copy
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from needs import needs_cuda
from torch import nn
from torch.nn.functional import softplus

import fastgan
from fastgan.training import captured
from fastgan.training.captured import WARMUP, CapturedStep, make_capturable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def recorded(monkeypatch):
    """The steps that were recorded. On the CPU a graph is the call of the step on the recording's own tensors: like a graph
    it reads what lies in those, and its result lies in the same memory each time."""
    steps = []
    if DEVICE == "cuda":
        record = captured._record
    else:
        monkeypatch.setattr(captured, "_are_on_cuda", lambda tensors: bool(tensors))
        monkeypatch.setattr(captured, "_beside", nullcontext)
        monkeypatch.setattr(captured, "make_capturable", lambda optimizer: None)  # which Adam refuses on the CPU

        def record(step, inputs):
            own = captured.pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
            result = {"loss": torch.zeros(())}
            launch = lambda: result["loss"].copy_(step(*own)["loss"])  # noqa: E731
            tensors = [leaf for leaf in captured.pytree.tree_leaves(own) if isinstance(leaf, torch.Tensor)]
            return captured._Recording(launch, tensors, result)

    monkeypatch.setattr(captured, "_record", lambda step, inputs: (steps.append(step), record(step, inputs))[1])
    return steps


class Twin:
    """A generator, a critic under a gradient penalty, their optimisers and an average of weights."""

    def __init__(self):
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.ConvTranspose2d(4, 3, 4), nn.BatchNorm2d(3), nn.Tanh()).to(DEVICE)
        self.critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 2)).to(DEVICE)
        self.average = copy.deepcopy(self.generator)
        self.adams = [torch.optim.Adam(net.parameters(), 0.01) for net in (self.generator, self.critic)]

    def step(self, real):
        of_generator, of_critic = self.adams
        fake = self.generator(torch.randn(len(real), 4, 1, 1, device=DEVICE))
        of_critic.zero_grad()
        penalty = fastgan.gradient_penalty(self.critic, real, fake.detach())
        loss = (softplus(self.critic(fake.detach())) + softplus(-self.critic(real))).mean() + penalty
        loss.backward()
        of_critic.step()
        of_generator.zero_grad()
        softplus(-self.critic(fake)).mean().backward()
        of_generator.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 0.1)
        return {"loss": loss.detach()}

    def state(self):
        return [*self.generator.state_dict().values(), *self.critic.state_dict().values(), *self.average.parameters()]


def test_a_captured_step_trains_as_the_step_does(recorded):
    plain, twin = Twin(), Twin()
    step = CapturedStep(twin.step, optimizers=twin.adams)
    reals = [torch.rand(n, 3, 4, 4, device=DEVICE) for n in [5] * (WARMUP + 3) + [2] + [5] * 2]
    losses = []
    for take in (plain.step, step):
        torch.manual_seed(1)
        losses.append([take(real)["loss"] for real in reals])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(twin.state(), plain.state())
    assert recorded == [twin.step]


def test_inputs_are_copied_and_results_are_copies(recorded):
    step = CapturedStep(lambda x: {"loss": x.sum()})
    inputs = [torch.full((3,), float(i), device=DEVICE) for i in range(WARMUP + 3)]
    results = [step(x)["loss"] for x in inputs]
    assert [result.item() for result in results] == [3.0 * i for i in range(WARMUP + 3)]


def test_every_shape_has_a_recording_and_that_not_used_for_longest_gives_way(recorded, monkeypatch):
    monkeypatch.setattr(captured, "MOST_GRAPHS", 2)
    step = CapturedStep(lambda x: {"loss": x.sum()})
    for turn, (size, count) in enumerate([(1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)]):  # 3 takes the place of 2
        for _ in range(WARMUP + 2):
            assert step(torch.ones(size, device=DEVICE))["loss"] == size
        assert len(recorded) == count, turn


def test_flags_decide_which_recording_is_launched(recorded):
    step = CapturedStep(lambda doubled, x: {"loss": (2 if doubled else 1) * x.sum()})
    for _ in range(WARMUP + 2):
        for flag, loss in ((True, 6), (1, 6), (False, 3), (None, 3)):
            assert step(flag, torch.ones(3, device=DEVICE))["loss"] == loss
    assert len(recorded) == 4


def test_inputs_may_be_nested(recorded):
    class Labelled(NamedTuple):
        images: torch.Tensor
        labels: torch.Tensor

    step = CapturedStep(lambda batch, more: {"loss": batch.images.sum() + batch.labels.sum() + more["x"].sum()})
    for i in range(WARMUP + 2):
        x = torch.full((2,), float(i), device=DEVICE)
        assert step(Labelled(x, x + 1), {"x": x})["loss"] == 6 * i + 2
    assert len(recorded) == 1


def test_a_step_that_cannot_be_captured_runs_as_it_is_and_says_so_once(recorded, monkeypatch):
    def refuse(step, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nlong explanation")

    monkeypatch.setattr(captured, "_record", refuse)
    step = CapturedStep(lambda x: {"loss": x.sum()})
    x = torch.ones(3, device=DEVICE)
    for _ in range(WARMUP):
        step(x)
    with pytest.warns(UserWarning, match=r"uncaptured: operation not permitted when stream is capturing$"):
        assert step(x)["loss"] == 3
    assert step(x)["loss"] == 3


def test_on_the_cpu_the_step_is_called(monkeypatch):
    def refuse(step, inputs):
        raise AssertionError

    monkeypatch.setattr(captured, "_record", refuse)
    plain, twin = Twin(), Twin()
    plain_adam, adam = (one.adams[1].param_groups[0] for one in (plain, twin))
    for one in (plain, twin):
        one.generator.cpu(), one.critic.cpu(), one.average.cpu()
    step = CapturedStep(lambda x, scale: x.sum() * scale, optimizers=twin.adams)
    for _ in range(WARMUP + 2):
        assert step(torch.ones(2), 3) == 6
    assert adam["lr"] == plain_adam["lr"] and not adam["capturable"]


def test_the_learning_rate_of_a_capturable_optimiser_is_a_tensor_that_schedulers_change():
    weight = nn.Parameter(torch.ones(2, device=DEVICE))
    adam = torch.optim.Adam([weight], 0.5)
    make_capturable(adam)
    rate = adam.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 1, 0.5)
    if DEVICE == "cuda":  # elsewhere torch refuses to step it
        weight.sum().backward()
        adam.step()
    scheduler.step()
    assert adam.param_groups[0]["lr"] is rate and rate == 0.25
    make_capturable(adam)
    assert adam.param_groups[0]["lr"] is rate


@needs_cuda
def test_a_graph_is_launched_and_python_does_not_run_again():
    calls = []
    step = CapturedStep(lambda x: (calls.append(1), x * 2)[1])
    for i in range(WARMUP + 5):
        assert step(torch.full((2,), float(i), device="cuda")).eq(2 * i).all()
    assert len(calls) == WARMUP + 1
