"""From NCHW to channels_last and back, several times as fast as `contiguous` on the CPU."""

import torch
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import register_gradient
from fastgan.ops._kernels import tell_openmp
from fastgan.ops._tensors import DTYPES

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(x: Tensor, channels_last: bool) -> Tensor:
    """A copy of x (N, C, H, W) that lies in the layout."""
    return x.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────

torch.library.define("fastgan::layout", "(Tensor x, bool channels_last) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.register_fake("fastgan::layout")(reference)


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _save(ctx, inputs, output) -> None:
    pass


def _backward(ctx, grad):
    return grad, None


register_gradient("layout", _backward, _save)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.library.impl("fastgan::layout", "CompositeExplicitAutograd")
def _(x, channels_last):
    return reference(x, channels_last)


@torch.library.impl("fastgan::layout", "cpu")
def _(x, channels_last):
    lies = x.is_contiguous() if channels_last else x.is_contiguous(memory_format=torch.channels_last)
    if not lies or x.dtype not in DTYPES or backend.serving("cpu") != "cpp":
        return reference(x, channels_last)
    from fastgan import _C

    tell_openmp()
    n, c, h, w = x.shape
    y = torch.empty(
        x.shape, dtype=x.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    _C.transpose_matrices(
        DTYPES[x.dtype], (n, c, h * w) if channels_last else (n, h * w, c), x.data_ptr(), y.data_ptr()
    )
    return y
