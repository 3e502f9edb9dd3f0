"""Blur is the binomial filter of StyleGAN, of the same size."""

import copy
import pickle

import torch
import torch.nn.functional as F

from fastgan.nn import Blur


def test_the_default_is_the_normalised_binomial_filter():
    x = torch.randn(2, 3, 6, 5)
    taps = torch.tensor([1.0, 2, 1])
    expected = F.conv2d(x, (taps.outer(taps) / 16).expand(3, 1, 3, 3), padding=1, groups=3)
    torch.testing.assert_close(Blur()(x), expected)


def test_any_kernel_keeps_the_size():
    x = torch.randn(2, 3, 6, 5)
    for kernel in ((1, 3, 3, 1), (1, 4, 6, 4, 1), torch.rand(9), torch.rand(2, 3)):
        assert Blur(kernel)(x).shape == x.shape


def test_the_filter_is_a_buffer_that_moves_copies_and_loads():
    blur = Blur((1, 3, 3, 1), gain=2.0)
    assert list(blur.state_dict()) == ["kernel"] and not list(blur.parameters())
    x = torch.randn(1, 2, 8, 8)
    for twin in (copy.deepcopy(blur), pickle.loads(pickle.dumps(blur))):
        assert torch.equal(twin(x), blur(x))
    assert blur.double()(x.double()).dtype == torch.float64
    assert blur.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_settings_are_shown():
    assert repr(Blur()) == "Blur((3, 3), flip_filter=False, gain=1)"
