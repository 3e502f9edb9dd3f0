"""sync_batch_norm_act in three processes, one of which may have no images, against one process that has all of them."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import Errors, arange_like
from torch import nn

from fastgan import backend, chains, fuse
from fastgan.ops import sync_batch_norm_act
from fastgan.ops.norm_act import _composed
from fastgan.ops.sync_batch_norm_act import reference

PARTS = {"as many": [2, 2, 2], "uneven": [1, 4, 2], "none in one": [3, 0, 2]}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ACTS = ("none", "relu", "leaky_relu", "prelu")
CASES = {
    **{(parts, dtype, "leaky_relu", True): {} for parts, dtype in itertools.product(PARTS, DTYPES)},
    **{("uneven", torch.float64, act, affine): {} for act, affine in itertools.product(ACTS, (True, False))},
    ("uneven", torch.float64, "relu", True): dict(momentum=torch.tensor(0.3)),
}
NAMES = ["y", "residual", "first", "second", "weight", "bias", "running_mean", "running_var"]


def outcome(apply, parts, dtype, act, affine, settings):
    """Of `apply`, which takes what one process, or all of them, have: y, the gradients, and the running statistics."""
    torch.manual_seed(0)
    count = sum(PARTS[parts])
    x, residual = 3 + 2 * torch.randn(count, 4, 3, 5), torch.randn(count, 4, 3, 5)
    x, residual = (t.bfloat16().to(dtype).split(PARTS[parts]) for t in (x, residual))
    x, residual = ([part.clone().requires_grad_() for part in tensors] for tensors in (x, residual))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(4, dtype=wide).requires_grad_() if affine else None for _ in range(2))
    running = [torch.zeros(4, dtype=wide), torch.ones(4, dtype=wide)]
    if act == "prelu":
        settings = settings | {"prelu_weight": torch.full((1,), 0.2, dtype=wide)}
    mine, y = apply(x, *running, weight, bias, residual=residual, act=act, negative_slope=0.2, **settings)
    x, residual = [x[i] for i in mine], [residual[i] for i in mine]
    everyone = arange_like(torch.empty(count, 4, 3, 5)).to(wide).split(PARTS[parts])
    score = sum((part.to(wide).square() * everyone[i]).sum() for i, part in zip(mine, y, strict=True))
    first = torch.autograd.grad(score, x, create_graph=True)
    second = torch.autograd.grad(sum(g.to(wide).square().sum() for g in first), x, create_graph=True)
    (score + 0.1 * sum(g.to(wide).square().mean() if g.numel() else g.sum() for g in second)).backward()
    results = [torch.cat([t.detach() for t in tensors]) for tensors in (y, [r.grad for r in residual], first, second)]
    return [*results, *([weight.grad, bias.grad] if affine else [None, None]), *running]


def in_one_process(x, running_mean, running_var, *affine, residual, act, negative_slope, prelu_weight=None, **settings):
    """Of torch's own batch norm no third derivative is right, and from torch 2.15 on there is none."""
    counts, x, residual = [len(part) for part in x], torch.cat(x), torch.cat(residual)
    reference([x.detach()], running_mean, running_var, **settings)
    wide = [None if t is None else t.to(running_mean.dtype) for t in (x, *affine, residual, prelu_weight)]
    y = _composed([*wide, None, None], 1e-5, act, negative_slope).to(x.dtype)
    return range(len(counts)), y.split(counts)


def in_this_process(rank, x, *tensors, residual, **settings):
    return [rank], [sync_batch_norm_act(x[rank], *tensors, residual=residual[rank], **settings)]


MODELS = {
    "a convolution": lambda norm: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), norm(6), nn.LeakyReLU(0.2)),
    "a doubled one": lambda norm: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1), norm(6)),
    "alone": lambda norm: nn.Sequential(nn.MaxPool2d(2), norm(4, momentum=None), nn.ReLU()),
}


def outcome_of_model(model, images):
    y = model(images)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers(), model.eval()(images).detach()]


def make_model(name, norm):
    torch.manual_seed(0)
    return MODELS[name](norm).double()


def images():
    return torch.randn(6, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # On the CPU stock refuses to synchronise, and so does a fused model.
    chains._is_synchronised_on = lambda device: True
    backend.is_automatic = functools.cache(lambda: False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    apply = functools.partial(in_this_process, rank)
    found = {case: outcome(apply, *case, settings) for case, settings in CASES.items()}
    for name in MODELS:
        found[name] = outcome_of_model(fuse(make_model(name, nn.SyncBatchNorm)), images().split(2)[rank])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of three processes has found, of every case."""
    folder = tmp_path_factory.mktemp("processes")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, __file__, str(rank), folder], env=env) for rank in range(3)]
    assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def together(results):
    """Of each process's outcome the whole: images one after the other, gradients of parameters added up."""
    columns = list(zip(*results, strict=True))
    joined = [torch.cat(column) for column in columns[:4]]
    added = [None if column[0] is None else sum(column) for column in columns[4:6]]
    for column in columns[6:]:
        assert all(torch.equal(column[0], other) for other in column)
    return [*joined, *added, *(column[0] for column in columns[6:])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_values_and_three_derivatives_are_those_of_one_process(case, found):
    ours = together([results[case] for results in found])
    eager = outcome(in_one_process, *case, CASES[case])
    truth = outcome(in_one_process, case[0], torch.float64, *case[2:], CASES[case])
    errors = Errors()
    errors.add(NAMES, ours, eager, truth)
    errors.check()


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_synchronises_its_norms(name, found):
    stock = outcome_of_model(make_model(name, nn.BatchNorm2d), images())
    ours = list(zip(*(results[name] for results in found), strict=True))
    parameters = len(list(make_model(name, nn.BatchNorm2d).parameters()))
    torch.testing.assert_close(torch.cat(ours[0]), stock[0])
    for i in range(1, 1 + parameters):
        torch.testing.assert_close(sum(ours[i]), stock[i])
    for i in range(1 + parameters, len(stock) - 1):
        torch.testing.assert_close(list(ours[i]), [stock[i]] * 3)
    torch.testing.assert_close(torch.cat(ours[-1]), stock[-1])


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="running_mean and running_var must be given together"):
        sync_batch_norm_act(torch.randn(2, 3, 4, 4), torch.zeros(3), None)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
