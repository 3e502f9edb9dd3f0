"""One of two processes that train together over gloo, the stock model and the fused one.

What each case finds is saved in a folder, for the tests to compare. `run` starts both.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastgan import backend, chains, ops


def run(folder: Path) -> list[dict]:
    """What the two processes have found: of each case (outcome of stock, outcome of fused, the operators that ran)."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, __file__, str(rank), folder], env=env) for rank in range(2)]
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def distributed(model: nn.Module) -> list[torch.Tensor] | str:
    """Real and fake images in two forwards, between which the buffers of the first process are handed to the other. That
    spoils what stock norms have saved, up to torch 2.11: then what is said of it."""
    parallel = DistributedDataParallel(model)
    real, fake = images(), images()
    try:
        (parallel(real).mean() - parallel(fake).square().mean()).backward()
    except RuntimeError as error:
        return str(error)
    return [*(p.grad for p in model.parameters()), *model.buffers()]


def sharded(model: nn.Module) -> list[torch.Tensor]:
    """FSDP2, the model as one group of parameters."""
    fully_shard(model)
    x = images().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.full_tensor() for p in model.parameters()), *model.buffers()]


def sharded_in_parts(model: nn.Module) -> list[torch.Tensor]:
    """FSDP2, each chain and each block a group of its own, which makes a class of its own for it."""
    for module in list(model.modules())[1:]:
        if not isinstance(module, nn.ModuleList) and any(True for _ in module.children()):
            fully_shard(module)
    return sharded(model)


def synchronised(model: nn.Module) -> list[torch.Tensor]:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return [model.eval()(images()).detach()]


def refused(model: nn.Module) -> str:
    """What stock says of synchronised norms, which train on GPUs only."""
    try:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)(images())
    except ValueError as error:
        return str(error)
    return ""


def half_of_a_batch(model: nn.Module) -> list[torch.Tensor]:
    """What should be as in one process with the whole of it: gradients and statistics, the norms synchronised. On the CPU
    DistributedDataParallel takes no such norms, so the gradients are averaged by hand."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model(whole_batch().chunk(2)[dist.get_rank()]).square().mean().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    return [*(p.grad for p in model.parameters()), *model.buffers()]


def whole_batch() -> torch.Tensor:
    return torch.randn(4, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CASES = {case.__name__: case for case in (distributed, sharded, sharded_in_parts, synchronised)}


def images() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, dtype=torch.float64)


def main(rank: int, folder: Path) -> None:
    from fusing import twins
    from test_fuse_with_torch import MODELS, WITHOUT_CHANCE, critic

    backend.is_automatic = functools.cache(lambda: False)  # type: ignore[assignment]
    torch.set_num_threads(1)
    ran: list[str] = []
    for name in ops.__all__:
        setattr(ops, name, functools.partial(note, ran, name, getattr(ops, name)))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for kind, make in {**MODELS, "critic": critic}.items():
        for name, case in {**CASES, "refused": refused}.items():
            if kind == "critic" and case is not distributed:
                continue
            outcomes = []
            for model in twins(make):
                ran.clear()
                torch.manual_seed(10 + rank)
                outcomes.append(case(model))
            found[kind, name] = (*outcomes, ran[:])
    chains._is_synchronised_on = lambda device: True  # which on the CPU stock refuses
    for kind, make in WITHOUT_CHANCE.items():
        found[kind, "half"] = half_of_a_batch(twins(make)[1])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def note(ran, name, op, *args, **kwargs):
    ran.append(name)
    return op(*args, **kwargs)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
