"""Operators in eager mode go without PyTorch's dispatcher, and with it wherever somebody would see the difference."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import backend
from fastgan.ops import batch_norm_act, conv2d
from fastgan.ops._autograd import operators

pytestmark = pytest.mark.skipif(backend.obstacle("cpp", "cpu") is not None, reason="the C++ kernels are not there")


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def layer(x, weight):
    return batch_norm_act(conv2d(x, weight), None, None, training=True)


def inputs():
    return torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)


SETTINGS = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # of the operator


def test_plain_tensors_go_without_the_dispatcher(monkeypatch):
    expected = layer(*again())
    for name in ("convolution", "batch_norm_act"):
        monkeypatch.setattr(torch.ops.fastgan, name, None)
    torch.testing.assert_close(layer(*again()), expected)


def again():
    torch.manual_seed(1)
    return inputs()


def test_a_dispatch_mode_sees_the_operators():
    with Seen() as seen:
        layer(*inputs())
    assert {"fastgan::convolution", "fastgan::batch_norm_act"} <= set(seen.names)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_function_holds_the_operators():
    x, weight = inputs()
    traced = torch.jit.trace(lambda x: operators.convolution(x, weight, None, *SETTINGS), x)
    assert "fastgan::convolution" in str(traced.graph)


def test_subclasses_are_the_dispatcher_s():
    x, weight = inputs()
    y = operators.convolution(x.as_subclass(Subclass), weight, None, *SETTINGS)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), conv2d(x, weight))


def test_both_ways_give_the_same_gradients_to_the_third_order():
    results = []
    for seen in (False, True):
        x, weight = (t.double().requires_grad_() for t in again())
        with Seen() if seen else torch.enable_grad():
            y = layer(x, weight)
            (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
            results.append([y, first, second, *torch.autograd.grad(second.pow(2).sum(), [x, weight])])
    torch.testing.assert_close(*results)


def test_inference_mode_makes_no_graph():
    x, weight = inputs()
    with torch.inference_mode():
        y = layer(x, weight.requires_grad_())
    assert y.is_inference() and not y.requires_grad
