"""A case that takes no time, and rows of it."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from fastgan.bench import results
from fastgan.bench.case import OURS, Contest
from fastgan.bench.op import Contender, Inputs, OpCase


def scaled_relu(x, weight):
    return F.relu(x * weight, inplace=True)


def make_case(ours=scaled_relu, **changes):
    case = OpCase(
        part="part",
        op="scaled_relu",
        work="second order",
        shape="2×3×4×5",
        dtype=torch.float32,
        layout="channels_last",
        inputs=lambda: Inputs(torch.randn(2, 3, 4, 5), [torch.randn(1, 3, 1, 1)]),
        contenders={OURS: Contender(ours, "channels_last"), "NCHW": Contender(scaled_relu)},
        reference=scaled_relu,
        preactivation=lambda x, weight: x * weight,
        tensors_moved=(1, 1),
    )
    return replace(case, **changes)


def make_row(gate="", **seconds):
    contest = Contest(dict.fromkeys([OURS, "NCHW", "compile"], lambda: None), gate, bytes_moved=300, floor_bytes=200)
    return results.make_row(make_case(), contest, {"copy_": 1e-3, **seconds}, torch.device("cpu"))
