"""minibatch_stddev against its definition, sample by sample."""

import pytest
import torch
from oracle import Errors, two_orders

from fastgan.ops import minibatch_stddev

# Batch, channels and pixels; group_size and num_channels; the size of the groups that come of it.
CASES = (
    ((8, 6, 3, 4), 4, 1, 4),
    ((8, 6, 3, 4), 4, 3, 4),
    ((8, 6, 3, 4), None, 2, 8),
    ((3, 5, 2, 2), 4, 1, 3),
    ((6, 4, 2, 2), 4, 1, 3),
    ((7, 4, 2, 2), 4, 2, 1),
    ((4, 6), 2, 2, 2),
)


def definition(x, group, num_channels):
    """The new channels in Python's loops."""
    n, c = x.shape[:2]
    groups, width = n // group, c // num_channels
    rows = []
    for sample in range(n):
        members = x[sample % groups :: groups]
        deviation = ((members - members.mean(0)).pow(2).mean(0) + 1e-8).sqrt()
        parts = [deviation[i * width : (i + 1) * width].mean() for i in range(num_channels)]
        rows.append(torch.stack(parts))
    told = torch.stack(rows).view(n, num_channels, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return torch.cat([x, told], 1)


@pytest.mark.parametrize(("shape", "group_size", "num_channels", "group"), CASES)
def test_the_definition(shape, group_size, num_channels, group):
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(minibatch_stddev(x, group_size, num_channels), definition(x, group, num_channels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_both_derivatives_are_as_exact_as_eager(dtype):
    errors = Errors()
    for shape, group_size, num_channels, group in CASES:
        if group == 1:
            continue
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        results = [
            two_orders(lambda x, f=f, g=g, c=num_channels: f(x, g, c), [x.to(d).requires_grad_()], dtype)
            for f, g, d in (
                (minibatch_stddev, group_size, dtype), (definition, group, dtype), (definition, group, torch.float64)
            )
        ]  # fmt: skip
        errors.add(["y", "grad_x", "g_x", "g_grad_y"], *results)
    errors.check()


def test_gradcheck_and_gradgradcheck():
    x = torch.randn(4, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: minibatch_stddev(x, 2, 2), x)
    assert torch.autograd.gradgradcheck(lambda x: minibatch_stddev(x, 2, 2), x)


def test_equal_samples_differ_by_the_root_of_eps_and_have_finite_derivatives():
    x = torch.ones(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    y = minibatch_stddev(x)
    torch.testing.assert_close(y[:, 3], torch.full((4, 2, 2), 1e-4, dtype=torch.float64))
    (grad,) = torch.autograd.grad(y[:, 3].sum(), x, create_graph=True)
    assert not grad.any()
    assert torch.autograd.grad(grad.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_output_keeps_the_layout(layout):
    x = torch.randn(4, 6, 4, 4).contiguous(memory_format=layout)
    assert minibatch_stddev(x).is_contiguous(memory_format=layout)


def test_an_empty_batch_gets_its_channels():
    assert minibatch_stddev(torch.randn(0, 3, 4, 4), num_channels=3).shape == (0, 6, 4, 4)


BAD = {
    "integers": (dict(x=torch.ones(2, 3, dtype=torch.int64)), TypeError, "x must be float32"),
    "one axis": (dict(x=torch.ones(3)), ValueError, r"x must have shape \(N, C, \*\), not \(3,\)"),
    "no group": (dict(group_size=0), ValueError, "group_size must be 1 or more, not 0"),
    "channels": (dict(num_channels=2), ValueError, "num_channels must divide the 3 channels of x, not 2"),
    "no channels": (dict(num_channels=0), ValueError, "num_channels must be 1 or more, not 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        minibatch_stddev(**(dict(x=torch.ones(2, 3)) | changes))
