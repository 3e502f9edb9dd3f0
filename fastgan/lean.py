"""`lean_double_backward()`: whatever runs inside can be differentiated twice at the cost of what is asked, and no more.

A gradient penalty needs four passes through a critic: forward, input gradient, tangent forward, weight gradient. Stock
autograd makes more of it. The second derivatives of activations and poolings are tensors of zeros that it pushes back
through the whole network, and the weight gradient of an input gradient is a convolution with kernels as large as images.
Inside the context the functions of torch that have lean operators here are computed by them: the model needs no change.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fastgan import backend
from fastgan.ops import activation, avg_pool, conv, norm_act
from fastgan.ops._autograd import is_checkpointed
from fastgan.ops._tensors import dense, is_channels_last
from fastgan.ops.group_norm_act import check_group_norm, check_layer_norm
from fastgan.ops.group_norm_act import normalise as normalise_groups

# ── Functions ────────────────────────────────────────────────────────────────────────────────────────────────────────
# Each takes the arguments of the stock function, and returns NotImplemented where that has to serve.


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return _convolve(input, weight, bias, (stride, padding, dilation, False, 0, groups))


def _conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    return _convolve(input, weight, bias, (stride, padding, dilation, True, output_padding, groups))


def _convolve(x, weight, bias, settings):
    try:
        prepared = conv.prepare(x, weight, bias, settings, lean=True)
    except (TypeError, ValueError):  # no batch, integers, padding="same": stock has an answer, or an error of its own
        return NotImplemented
    stride, padding, dilation, transposed, output_padding, groups = prepared.settings
    if prepared.runs_as_stock and transposed and any(o >= s for o, s in zip(output_padding, stride, strict=True)):
        # Its input gradient is no convolution of the operator's, but that of the whole image is, and the rest is cropping.
        whole = _convolve(prepared.x, prepared.weight, None, (stride, 0, dilation, True, 0, groups))
        (top, left), (bottom, right) = padding, (o - p for o, p in zip(output_padding, padding, strict=True))
        image = F.pad(whole, (-left, right, -top, bottom))
        return image if prepared.bias is None else image + prepared.bias.view(-1, 1, 1)
    return conv.convolve(prepared, keep_layout=False)


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    try:
        norm_act.check_batch_norm(input, None, running_mean, running_var, weight, bias, training, eps, "none")
        if training:
            norm_act.check_batch_size(input.shape)
    except (TypeError, ValueError):
        return NotImplemented
    return norm_act.normalise(
        input, running_mean, running_var, weight, bias, training, momentum, eps, "none", 0.0, lean=True
    )


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    try:
        num_groups = check_group_norm(input, num_groups, weight, bias, eps, "none")
    except (TypeError, ValueError):
        return NotImplemented
    return normalise_groups(input, num_groups, weight, bias, eps, "none", 0.0, lean=True)


def _torch_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    return _group_norm(input, num_groups, weight, bias, eps)


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    # Running statistics are batch norm's affair, and of a plane of one element stock says that it is too small.
    if running_mean is not None or not use_input_stats or input.dim() < 3 or math.prod(input.shape[2:]) < 2:
        return NotImplemented
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    try:
        samples = check_layer_norm(input, normalized_shape, weight, bias, eps, "none")
    except (TypeError, ValueError):
        return NotImplemented
    y = normalise_groups(samples, 1, weight, bias, eps, "none", 0.0, lean=True)
    if samples is input:  # then no view of another tensor: `_restore` may have to lay it out anew
        return y
    return y.view(input.shape)


def _relu_(input):
    return activation.relu(input, inplace=True)


def _relu(input, inplace=False):
    return activation.relu(input, inplace)


def _leaky_relu(input, negative_slope=0.01, inplace=False):
    return activation.leaky_relu(input, negative_slope, inplace)


def _leaky_relu_(input, negative_slope=0.01):
    return activation.leaky_relu(input, negative_slope, inplace=True)


def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    return activation.hardtanh(input, min_val, max_val, inplace)


def _hardtanh_(input, min_val=-1.0, max_val=1.0):
    return activation.hardtanh(input, min_val, max_val, inplace=True)


def _relu6(input, inplace=False):
    return activation.hardtanh(input, 0.0, 6.0, inplace)


def _prelu(input, weight):
    return activation.prelu(input, weight)


def _avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    return avg_pool.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _adaptive_avg_pool2d(input, output_size):
    return avg_pool.adaptive_avg_pool2d(input, output_size)


# Linear layers, additions, padding with zeros, nearest and bilinear up-sampling, pixel shuffle and means are not here: their
# stock gradients do not depend on their inputs, or only through products that somebody asks for.
_LEAN: dict[Any, Callable] = {
    F.conv2d: _conv2d,
    F.conv_transpose2d: _conv_transpose2d,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _torch_group_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.relu: _relu,
    F.relu_: _relu_,
    torch.relu: _relu,
    torch.relu_: _relu_,
    Tensor.relu: _relu,
    Tensor.relu_: _relu_,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu_,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh_,
    F.relu6: _relu6,
    F.prelu: _prelu,
    torch.prelu: _prelu,
    Tensor.prelu: _prelu,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
}

# What stock torch returns in NCHW whatever the layout of its input.
_IN_NCHW = {F.instance_norm, F.layer_norm}

# What neither shows how a tensor lies in memory nor depends on it; the results lie as the tensors do.
_LAYOUT_BLIND = {
    Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, torch.add, torch.sub, torch.mul, torch.div, Tensor.dim, Tensor.size,
    Tensor.numel, Tensor.is_floating_point,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")),
}  # fmt: skip


# ── The context ──────────────────────────────────────────────────────────────────────────────────────────────────────


class lean_double_backward(TorchFunctionMode):
    """A context in which every forward gets a lean, exact double backward.

    ```
    with fastgan.lean_double_backward():
        score = critic(images)
    (gradient,) = torch.autograd.grad(score.sum(), images, create_graph=True)
    gradient.square().sum().backward()
    ```

    Convolutions and transposed convolutions, batch, group, instance and layer norm, ReLU, ReLU6, LeakyReLU, PReLU, Hardtanh
    and average pooling, as modules or as functions, in place or not, run as operators whose second derivatives compute only
    what is asked: a convolution costs four of its size in all (forward, input gradient, its tangent, weight gradient), six
    below a norm or a smooth activation, a norm two passes over its tensor for each order of derivative, an activation or a
    pooling one mask or pooling in each pass. What is not recognised runs as stock, and is as exact; below max pools and
    paddings by reflection or replication that means zeros through the network. Parameters to which stock autograd gives
    zeros get zeros. All orders of derivatives are exact.

    The model is not modified, and it may be fused. The context belongs to the thread: what DataParallel runs in others is
    stock, as is what runs in a `torch.utils.checkpoint`, and all where `FASTGAN_BACKEND=reference` is set.

    Convolutions leave their output in the layout that is fast. Whoever could tell the difference, inside the context or
    after it, finds the layout that stock torch would have.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_on = backend.requested() != "reference"
        self._owing = WeakTensorKeyDictionary()  # the tensors that lie in channels_last, and owe NCHW

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._restore(_held(list(self._owing)))
        self._owing.clear()  # autograd alone sees the rest, and takes any layout

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        lean = _LEAN.get(func) if self._is_on else None
        if lean is not None and _can_be_lean(types):
            result = lean(*args, **kwargs)
            if result is not NotImplemented:
                return self._note(result, () if func in _IN_NCHW else [*args, *kwargs.values()])
        if not self._owing:
            return func(*args, **kwargs)
        if func in _LAYOUT_BLIND and not self._any_in_channels_last(args):
            return self._note(func(*args, **kwargs), args)
        self._restore(_tensors((args, kwargs)))
        return func(*args, **kwargs)

    def _note(self, result: Any, operands: Iterable) -> Any:
        """`result`, noted where it lies in channels_last although no operand does in stock torch."""
        if isinstance(result, Tensor) and is_channels_last(result) and not self._any_in_channels_last(operands):
            self._owing[result] = None
        return result

    def _any_in_channels_last(self, operands: Iterable) -> bool:
        """In stock torch."""
        return any(isinstance(t, Tensor) and t not in self._owing and is_channels_last(t) for t in operands)

    def _restore(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor in self._owing:
                tensor.data = dense(
                    tensor.data, channels_last=False
                )  # the same tensor in the same graph, lying otherwise
                del self._owing[tensor]


_use_count: Any = getattr(Tensor, "_use_count", None)  # private to torch


def _references(tensors: list[Tensor]) -> list[int]:
    """How many references Python has to each, this function's own among them."""
    return [sys.getrefcount(tensor) - (_use_count(tensor) > 1) for tensor in tensors]  # one is C++'s, where it has any


def _references_to_unheld() -> int:
    """What `_references` says of a tensor that no variable holds; 0 where it cannot tell."""
    if _use_count is None:
        return 0
    with torch.enable_grad():
        held = torch.ones((), requires_grad=True) * 1
        kept_by = held * held
    (none,), (one,) = _references([torch.ones(())]), _references([held])
    return none if kept_by.requires_grad and one == none + 1 else 0


_UNHELD = _references_to_unheld()


def _held(tensors: list[Tensor]) -> list[Tensor]:
    """Those that Python code can look at: all, less those that only autograd keeps."""
    if not _UNHELD:
        return tensors
    return [tensor for tensor, n in zip(tensors, _references(tensors), strict=True) if n > _UNHELD]


def _can_be_lean(types: Iterable[type]) -> bool:
    """Not tensors of a kind that has a rule of its own, and not in a checkpoint: that computes once more outside the
    context."""
    if not torch.is_grad_enabled() or not all(kind in (Tensor, nn.Parameter) for kind in types):
        return False
    return not is_checkpointed()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)
