"""Minibatch standard deviation: how much the samples of a batch differ, told to the discriminator as a feature."""

import torch
from torch import Tensor

from fastgan.ops._tensors import accumulation_dtype, check_count, check_input, dense, is_channels_last


def minibatch_stddev(x: Tensor, group_size: int | None = 4, num_channels: int = 1) -> Tensor:
    """x with `num_channels` more channels, in which each sample has how much the samples of its group differ.

    The standard deviation over a group, √(σ² + 1e-8) with the biased σ², is taken of every feature of every pixel, and its
    mean over all pixels and C / num_channels consecutive channels is the value of one new channel (Karras et al. 2018,
    section 3; groups and channels as in StyleGAN2, Karras et al. 2020). With M groups, group m is the samples m, m + M,
    m + 2M, ….

    Args:
        x: (N, C, \\*), at least 2 dimensions; float32, float64, bfloat16 or float16, of any strides. The output keeps the
            layout of NCHW and of channels_last.
        group_size: at most so many samples in a group; None, as any number above N, for the whole batch. Where it does not
            divide N, the largest divisor of N below it is taken: the last batch of a data set works, where NVIDIA's layer
            raises.
        num_channels: divides C.

    Made of stock operations, on every device, and deterministic as these are; the statistics are float32 (float64 for
    float64). Differentiable to every order, where all samples are equal too.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x has no axis of channels, or group_size or num_channels do not fit.
    """
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape (N, C, *), not {tuple(x.shape)}")
    n, c = x.shape[:2]
    if group_size is not None:
        group_size = check_count("group_size", group_size)
    num_channels = check_count("num_channels", num_channels)
    if c % num_channels:
        raise ValueError(f"num_channels must divide the {c} channels of x, not {num_channels}")
    if x.numel() == 0:
        return torch.cat([x, x.new_zeros(n, num_channels, *x.shape[2:])], 1)
    largest = n if group_size is None else min(group_size, n)
    group = next(size for size in range(largest, 0, -1) if n % size == 0)
    members = x.to(accumulation_dtype(x.dtype)).reshape(group, n // group, num_channels, c // num_channels, -1)
    deviations = (members.var(0, correction=0) + 1e-8).sqrt()
    value = deviations.mean((2, 3)).to(x.dtype).repeat(group, 1)
    told = value.view(n, num_channels, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return torch.cat([x, dense(told, is_channels_last(x))], 1)
