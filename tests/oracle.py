"""How close a fused operator has to be: the tolerance follows a rule, it is not chosen."""

from collections import defaultdict

import torch
from torch import Tensor


class Errors:
    """The errors of ours and of eager torch in the same dtype, pooled over cases so that luck evens out.

    The truth is eager torch on inputs upcast to float64; a gradient that is absent counts as zero.
    """

    def __init__(self) -> None:
        self._results: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, names: list[str], ours: list, eager: list, truth: list) -> None:
        for name, *results in zip(names, ours, eager, truth, strict=True):
            present = next((t for t in results if t is not None), None)
            if present is None:
                continue
            found, stock, exact = (torch.zeros_like(present) if t is None else t.detach() for t in results)
            # What overflows the dtype in truth has no right answer in it.
            if exact.numel() and exact.abs().max() < torch.finfo(found.dtype).max:
                self._results[name].append(tuple(t.double().flatten() for t in (found, stock, exact)))
                self._dtypes[name] = found.dtype

    def check(self) -> None:
        """Root-mean-square error at most twice eager's, plus one rounding step; the largest likewise, where many
        elements make it meaningful. In float64 there is no truer answer: sums of thousands may differ by 64 steps."""
        assert self._results
        for name, parts in self._results.items():
            ours, eager, truth = (torch.cat(column) for column in zip(*parts, strict=True))
            dtype = self._dtypes[name]
            step = torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 1)
            error, peer, scale = (ours - truth).norm(), (eager - truth).norm(), truth.norm()
            summary = f"{name}: RMS ratio {error / scale:.3g}, eager's {peer / scale:.3g}, rounding step {step:.3g}"
            assert error <= 2 * peer + step * scale, summary
            if truth.numel() >= 1000:
                worst, peer_worst = (ours - truth).abs().max(), (eager - truth).abs().max()
                summary = f"{name}: largest error {worst:.3g}, eager's {peer_worst:.3g}; {summary}"
                assert worst <= 2 * peer_worst + step * truth.abs().max(), summary


def arange_like(tensor: Tensor, rounding: torch.dtype = torch.float64) -> Tensor:
    """Weights from -1 to 1, different for every element; rounded, so that they are the same numbers in every dtype.

    Shuffled: over one plane of many a ramp is nearly constant, and a norm's derivatives would be all cancellation.
    """
    ramp = torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64)
    ramp = ramp[torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))]
    return ramp.to(rounding).to(tensor.device, tensor.dtype).view(tensor.shape)


def two_orders(function, inputs: list[Tensor | None], rounding: torch.dtype = torch.float64) -> list[Tensor | None]:
    """[output, gradients of inputs, and of those a second gradient for each input]; inputs are leaves, or None."""
    leaves = [t for t in inputs if t is not None]
    y = function(*inputs)
    grad_y = arange_like(y, rounding).requires_grad_()
    first = torch.autograd.grad(y, leaves, grad_y, create_graph=True)
    total = sum((g * arange_like(g, rounding)).sum() for g in first)
    second = torch.autograd.grad(total, [*leaves, grad_y], allow_unused=True)
    return [y, *first, *second]


# ── Kernels by themselves ────────────────────────────────────────────────────────────────────────────────────────────
# Their results are dictionaries of named tensors, and a problem holds their inputs: `x`, and `to(dtype)` for a copy.


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def assert_kernels_are_as_exact_as_eager(ours: dict[str, Tensor], by_autograd, p, terms: dict[str, float]) -> None:
    """Error at most twice that of eager torch in the same dtype, and one rounding step; `by_autograd(p, dtype)` is eager.

    float64 is also what the truth is computed in; there, eager's error is its error in float32, scaled. A parameter's
    gradient is given one rounding step of the `terms` that it sums besides, in the dtype of accumulation: the order of
    adding is free. The interpreter truncates to bfloat16, and adds the rows of a tile one after the other: that is a step
    more.
    """
    dtype = p.x.dtype
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
    rounding = torch.finfo(dtype).eps * (1 if p.x.is_cuda else 2)
    truth = by_autograd(p, torch.float64)
    eager, eager_truth = by_autograd(p, eager_dtype), by_autograd(p.to(eager_dtype), torch.float64)
    for name, found in ours.items():
        error = rms(found - truth[name])
        eager_error = scale * rms(eager[name] - eager_truth[name])
        size = rms(truth[name])
        free = min(torch.finfo(dtype).eps, 2**-23) * terms.get(name, 0.0)
        assert error <= 2 * eager_error + rounding * size + free, (
            f"{name}: error / size = {error / size:.2e}, eager's {eager_error / size:.2e}, rounding {rounding:.1e}"
        )


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], names: tuple[str, ...]) -> None:
    for name in names:
        torch.testing.assert_close(
            ours[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
