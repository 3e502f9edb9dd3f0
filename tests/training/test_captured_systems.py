"""Every system's steps as recordings: on the CPU what was launched is launched again, as a CUDA graph does it."""

from contextlib import nullcontext

import pytest
import torch
from recording import Launches, record
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgan.ops import norm_act
from fastgan.training import captured
from fastgan.training.captured import WARMUP
from fastgan.training.data import Labelled
from fastgan.training.processes import OneProcess
from fastgan.training.run import SYSTEMS

ALONE = OneProcess(torch.device("cpu"))
STEPS = 3 * (WARMUP + 3)
SMALL = {"image_size": 16, "features": 4}
STYLEGAN = SMALL | {"batch_size": 4, "latent_dim": 5, "w_dim": 6, "mapping_layers": 2}
RUNS = {
    "dcgan": ("dcgan", SMALL | {"batch_size": 4}),
    "dcgan, two discriminator steps": ("dcgan", SMALL | {"batch_size": 4, "d_steps": 2}),
    "wgan-gp": ("wgan-gp", SMALL | {"batch_size": 4, "critic_steps": 2}),
    "wgan-gp residual": ("wgan-gp", SMALL | {"batch_size": 4, "critic_steps": 1, "architecture": "residual"}),
    "sngan": ("sngan", SMALL | {"batch_size": 4}),
    "stylegan growing": ("stylegan", STYLEGAN | {"phase_images": 4 * (WARMUP + 3)}),
    "stylegan, lazy penalty": (
        "stylegan",
        STYLEGAN | {"phase_images": 0, "penalty_every": 2, "mixing_probability": 0.5},
    ),
    "cyclegan": ("cyclegan", {"image_size": 24, "features": 2, "blocks": 1}),
    "srgan": ("srgan", {"image_size": 32, "features": 4, "blocks": 1, "batch_size": 2, "pretrain_steps": WARMUP + 3}),
    "dann": ("dann", {"image_size": 16, "features": 4, "batch_size": 4}),
}


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """The kinds of steps that were recorded."""
    kinds = []
    monkeypatch.setattr(captured, "_are_on_cuda", bool)
    monkeypatch.setattr(captured, "_beside", nullcontext)
    monkeypatch.setattr(captured, "make_capturable", make_capturable)
    monkeypatch.setattr(captured, "_record", lambda step, inputs: (kinds.append(inputs[0]), record(step, inputs))[1])
    monkeypatch.setattr(norm_act, "_move_at_once", lambda *_: False)  # a call of the CPU's alone, past all operators
    monkeypatch.setattr("fastgan.training.cyclegan.POOL", 3)
    return kinds


def make_capturable(optimizer):
    """The part of it that there is on the CPU: the learning rate is read from a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)


def make(run, fused, process=ALONE):
    name, settings = RUNS[run]
    torch.manual_seed(0)
    system_type = SYSTEMS[name]
    chosen = system_type.settings_type(**settings)
    chosen.check()
    system = system_type(chosen, 3, process)
    if fused:
        system.fuse()
    return system


def batches(system):
    """Different ones at every step."""
    torch.manual_seed(1)
    settings = system.settings
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    while True:
        images = torch.rand(shape) * 2 - 1
        yield Labelled(images, torch.randint(10, (len(images),))) if system.name == "dann" else images


def train(system, steps=STEPS):
    reals, metrics = batches(system), []
    given = [[next(reals) for _ in range(system.draws)] for _ in range(steps)]
    torch.manual_seed(2)
    for step in range(steps):
        system.begin_step(step, steps)
        metrics.append(system.step(iter(given[step])))
    return metrics


def weights(system):
    found = [value for network in system.networks.values() for value in network.state_dict().values()]
    return found + [image for pool in getattr(system, "pools", {}).values() for image in pool.images]


@pytest.mark.parametrize("run", RUNS)
def test_recorded_steps_train_as_steps_do(run, recorded):
    plain, twin = make(run, fused=True), make(run, fused=True)
    for optimizer in plain.optimizers.values():
        make_capturable(optimizer)  # whose rate is rounded to float32
    twin.capture()
    expected, found = train(plain), train(twin)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(twin), weights(plain), rtol=1e-4, atol=1e-5)
    assert len(set(recorded)) == len(recorded) >= 1, "one recording for each kind of step"
    assert len(recorded) < STEPS - WARMUP, "and launched more than once"


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fused", [False, True])
def test_steps_wait_for_no_value_and_draw_nothing_in_python(run, fused, monkeypatch):
    system = make(run, fused)
    train(system, WARMUP + 1)
    reals = batches(system)
    given = [next(reals) for _ in range(system.draws)]
    for draw in ("random.random", "random.randint", "numpy.random.rand", "numpy.random.randint"):
        monkeypatch.setattr(draw, None)
    with Launches() as launches:
        system.launch(*given)
    assert launches.calls


class OnMeta(OneProcess):
    def autocast(self):
        return nullcontext()


@pytest.mark.parametrize("run", RUNS)
def test_nothing_of_a_step_lies_on_another_device_than_its_images(run):
    """A meta tensor has no value, and does not compute with one of the CPU."""
    system = make(run, False, OnMeta(torch.device("meta")))
    batch = pytree.tree_map(lambda part: part.to("meta"), next(batches(system)))
    metrics = system.launch(*[batch] * system.draws)
    assert all(isinstance(value, Tensor) and value.is_meta for value in metrics.values())
