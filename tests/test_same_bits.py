"""The same inputs give the same bits, of every operator and order: run after run, on any number of threads, in several
threads at once, and in the workers of a DataLoader."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from calls import CONSTANTS, DTYPES, fitting
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from needs import needs_cpp
from oracle import arange_like
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastgan import ops

CALLS = fitting(4, 8, (37, 40))
"""Of more elements than the kernels leave to one thread."""

SUMS_OF_TORCH_S = {
    *("conv2d", "conv2d_avg_pool2d", "conv2d_batch_norm_act", "conv_transpose2d", "conv_transpose2d_batch_norm_act"),
    *("upsample_conv2d", "prelu"),
}
"""Those among whose sums are oneDNN's or torch's own, which depend on the number of threads."""

CONSTANTS_HERE = {*CONSTANTS, "noise"}
"""And the noise, of which torch sums the gradient."""


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@st.composite
def calls(draw, name):
    dtype, channels_last = draw(st.sampled_from(DTYPES)), draw(st.booleans())

    def made(value):
        if isinstance(value, tuple) and tensors_of(value):
            return [made(each) for each in value]
        if not isinstance(value, Tensor):
            return value
        last = channels_last and value.dim() == 4
        return value.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)

    return {key: made(draw(strategy)) for key, strategy in CALLS[name].items()}


def drawn_calls(name, count):
    """Always the same ones, that fit."""
    found = []

    @given(calls(name))
    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    def keep(arguments):
        try:
            getattr(ops, name)(**arguments)
        except ValueError:
            reject()
        found.append(arguments)

    keep()
    return found


def tensors_of(value):
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, (list, tuple)) else []


def outcome(name, arguments):
    """The results, their gradients and the gradients of these; and what was changed in place."""
    arguments = copy.deepcopy(arguments)
    leaves = [
        t.requires_grad_() for key, value in arguments.items() if key not in CONSTANTS_HERE for t in tensors_of(value)
    ]
    results = tensors_of(getattr(ops, name)(**arguments))
    first = gradients(results, leaves)
    second = gradients(first, leaves)
    running = [t for key in CONSTANTS for t in tensors_of(arguments.get(key))]
    return [t.detach() for t in (*results, *first, *second, *running)]


def gradients(results, leaves):
    results = [t for t in results if t.requires_grad]
    if not results:
        return []
    given = [arange_like(t) for t in results]
    grads = torch.autograd.grad(results, leaves, given, create_graph=True, allow_unused=True)
    return [g for g in grads if g is not None]


def assert_same_bits(found, expected, what):
    assert len(found) == len(expected)
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.stride() == b.stride()
        assert torch.equal(bits(a), bits(b)), f"{what}: tensor {place}, {tuple(a.shape)} of {a.dtype}"


def bits(t):
    return t.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("name", CALLS)
def test_the_bits_do_not_depend_on_the_run_or_the_number_of_threads(name):
    for arguments in drawn_calls(name, 3):
        torch.set_num_threads(1)
        expected = outcome(name, arguments)
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            if name in SUMS_OF_TORCH_S:
                expected = outcome(name, arguments)
            assert_same_bits(outcome(name, arguments), expected, f"{threads} threads")


@pytest.mark.parametrize("name", CALLS)
def test_threads_of_python_s_do_not_disturb_each_other(name):
    torch.set_num_threads(2)
    drawn = drawn_calls(name, 2) * 2
    expected, start = [outcome(name, arguments) for arguments in drawn], Barrier(len(drawn))

    def work(arguments):
        start.wait()
        return [outcome(name, arguments) for _ in range(2)]

    with ThreadPoolExecutor(len(drawn)) as pool:
        for found, right in zip(pool.map(work, drawn), expected, strict=True):
            for each in found:
                assert_same_bits(each, right, "beside others")


class Outcomes(Dataset):
    """Computed where they are asked for."""

    def __len__(self):
        return len(CALLS)

    def __getitem__(self, index):
        name = list(CALLS)[index]
        return outcome(name, drawn_calls(name, 1)[0])


def test_the_workers_of_a_data_loader_compute_the_same():
    """They are copies of a process whose threads they do not have, and use one."""
    torch.set_num_threads(8)
    outcome("batch_norm_act", drawn_calls("batch_norm_act", 1)[0])
    torch.set_num_threads(1)
    expected = [outcome(name, drawn_calls(name, 1)[0]) for name in CALLS]
    loader = DataLoader(Outcomes(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    for name, found, here in zip(CALLS, loader, expected, strict=True):
        assert_same_bits(found, here, name)


@needs_cpp
def test_set_num_threads_holds_for_kernels_in_threads_of_python_s():
    from fastgan import _C

    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    kernels = [lambda: ops.sample_squares(x), lambda: ops.conv2d(x, torch.ones(3, 8, 3, 3))]
    torch.set_num_threads(1)
    for kernel in kernels:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(kernel).result()
            assert pool.submit(_C.max_threads).result() == 1
