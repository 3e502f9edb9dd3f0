"""The change between NCHW and channels_last: the same tensor, in another order."""

import itertools

import pytest
import torch

from fastgan.ops._tensors import dense, is_channels_last

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Whole vectors and ragged ones in both directions, one image and several, many channels and many pixels.
SHAPES = ((2, 64, 32, 32), (1, 256, 16, 17), (3, 37, 29, 31), (1, 16, 64, 65), (5, 1000, 4, 4))


@pytest.mark.instruction_sets
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_bit_finds_its_place(channels_last, shape, dtype, poisoned):
    x = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).to(dtype)
    if not channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.ops.fastgan.layout(x, channels_last)
    assert torch.equal(y, x)
    assert is_channels_last(y) == channels_last and is_channels_last(x) != channels_last


@pytest.mark.instruction_sets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_keeps_its_bits(dtype):
    kind = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    info = torch.iinfo(kind)
    bits = torch.randint(info.min, info.max, (1, 64, 32, 32), dtype=kind)
    y = torch.ops.fastgan.layout(bits.view(dtype), True)
    assert torch.equal(y.contiguous().view(kind), bits)


def test_other_strides_are_copied_too():
    base = torch.randn(4, 64, 40, 32)
    for view, channels_last in itertools.product((base.transpose(2, 3), base[::2], base[:, :, ::2]), (True, False)):
        y = dense(view, channels_last)
        assert torch.equal(y, view) and is_channels_last(y) == channels_last


def test_the_gradient_is_that_of_a_copy():
    x = torch.randn(1, 64, 32, 32, dtype=torch.float64, requires_grad=True)
    y = dense(x, channels_last=True)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, 3 * x**2)
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), x)[0], 6 * x)


def test_opcheck():
    x = torch.randn(1, 64, 32, 32, requires_grad=True)
    torch.library.opcheck(torch.ops.fastgan.layout, (x, True))
    torch.library.opcheck(torch.ops.fastgan.layout, (x.detach().contiguous(memory_format=torch.channels_last), False))
