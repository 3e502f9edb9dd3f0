"""What the cases would take at least on a GPU by its maker's data sheet."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastgan.bench import suite
from fastgan.bench.op import OpCase


class Gpu(NamedTuple):
    """Peaks by the data sheet, per second. Of products of float32 that of TF32."""

    name: str
    bytes: float
    flops: dict[torch.dtype, float]


H200 = Gpu("NVIDIA H200", 4.8e12, {torch.float32: 494e12, torch.bfloat16: 989e12})


class Prediction(NamedTuple):
    case: OpCase
    bytes: int
    flops: int
    ms: float


def predictions(gpu: Gpu = H200) -> Iterator[Prediction]:
    """Of the headline cases of all operators on tensors: the bytes at the memory's speed or the operations at that of matrix
    products, whichever takes longer."""
    for part in suite.OPERATORS:
        for case in suite.cases(part, torch.device("cuda")):
            if case.headline and isinstance(case, OpCase):
                moved, flops = case.least_work()
                yield Prediction(case, moved, flops, 1e3 * max(moved / gpu.bytes, flops / gpu.flops[case.dtype]))
