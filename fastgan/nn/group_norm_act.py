"""The norms with the statistics of one sample as modules, each followed by an activation."""

import math
from typing import Any

from torch import Tensor, nn

from fastgan import ops
from fastgan.nn.norm_act import Activation
from fastgan.ops._norm import activate, with_zero_gradient
from fastgan.ops._tensors import check_is_tensor
from fastgan.ops._types import FixedAct
from fastgan.ops.group_norm_act import check_group_norm, normalise_planes
from fastgan.ops.norm_act import move


def tracks_planes(norm: nn.InstanceNorm2d) -> bool:
    """Whether an instance norm has running statistics."""
    return norm.track_running_stats or norm.running_mean is not None


def subtracts_means(norm: nn.InstanceNorm2d) -> bool:
    """Whether an instance norm subtracts each plane's own mean, and the bias of a convolution with it."""
    return norm.training or not norm.track_running_stats


def instance_norm_act(
    x: Tensor,
    norm: nn.InstanceNorm2d,
    activation: Activation,
    residual: Tensor | None = None,
    conv_bias: Tensor | None = None,
) -> Tensor:
    """act(norm(x + conv_bias) + residual) by an operator, with all that `norm` does in a forward pass. The bias of a
    convolution is given where it `subtracts_means`: then it only moves their running mean, and gets a gradient of zeros."""
    if subtracts_means(norm) and math.prod(x.shape[2:]) == 1:  # of which stock says that it is too small
        y = norm(x)
        return activate(y if residual is None else y + residual, *activation)
    settings: Any = {**activation.fixed, "residual": residual}
    if not subtracts_means(norm):
        running = (norm.running_mean, norm.running_var)
        return ops.batch_norm_act(x, *running, norm.weight, norm.bias, False, 0.0, norm.eps, **settings)
    bias = with_zero_gradient(norm.bias, conv_bias)
    if not tracks_planes(norm):
        return ops.instance_norm_act(x, norm.weight, bias, norm.eps, **settings)
    check_group_norm(x, x.shape[1], norm.weight, bias, norm.eps, activation.act, residual)
    y, mean, var = normalise_planes(x, norm.weight, bias, norm.eps, **settings)
    _move_statistics(norm, mean if conv_bias is None else mean + conv_bias.detach(), var, math.prod(x.shape[2:]))
    return y


def _move_statistics(norm: nn.InstanceNorm2d, mean: Tensor, var: Tensor, pixels: int) -> None:
    """Towards the averages over the batch of the planes' statistics, (N, C), of a biased variance."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    assert norm.running_mean is not None and norm.running_var is not None
    move(norm.running_mean, mean.mean(0), momentum)
    move(norm.running_var, var.mean(0) * (pixels / (pixels - 1)), momentum)


class GroupNormAct(nn.GroupNorm):
    """y = act(group_norm(x) + residual), by `fastgan.ops.group_norm_act`.

    Takes the arguments of `nn.GroupNorm`, and by keyword:

    Args:
        act: "none", "relu" or "leaky_relu".
        negative_slope: of "leaky_relu".

    Parameters and state_dict are `nn.GroupNorm`'s.

    Raises:
        ValueError: `act` is unknown, or what `fastgan.ops.group_norm_act` raises.
    """

    def __init__(self, *args: Any, act: FixedAct = "none", negative_slope: float = 0.01, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.activation = Activation.named(act, negative_slope)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.group_norm_act(
            x, self.num_groups, self.weight, self.bias, self.eps, **self.activation.fixed, residual=residual
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.activation}"


class InstanceNormAct2d(nn.InstanceNorm2d):
    """y = act(instance_norm(x) + residual), by `fastgan.ops.instance_norm_act`.

    Takes the arguments of `nn.InstanceNorm2d`, and by keyword:

    Args:
        act: "none", "relu" or "leaky_relu".
        negative_slope: of "leaky_relu".

    Parameters, buffers and state_dict are `nn.InstanceNorm2d`'s. Without `track_running_stats` planes of a single element
    are taken too, and give act(bias + residual).

    Raises:
        ValueError: `act` is unknown, x has not 3 or 4 dimensions or another number of channels, or what
            `fastgan.ops.instance_norm_act` raises.
    """

    def __init__(self, *args: Any, act: FixedAct = "none", negative_slope: float = 0.01, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.activation = Activation.named(act, negative_slope)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_is_tensor("x", x)
        self._check_input_dim(x)
        batched = x.dim() == 4
        images = x if batched else x[None]
        if images.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, not x of shape {tuple(x.shape)}")
        added = residual if batched or residual is None else residual[None]
        if tracks_planes(self):
            y = instance_norm_act(images, self, self.activation, added)
        else:
            y = ops.instance_norm_act(images, self.weight, self.bias, self.eps, **self.activation.fixed, residual=added)
        return y if batched else y[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.activation}"


class LayerNormAct(nn.LayerNorm):
    """y = act(layer_norm(x)), by `fastgan.ops.layer_norm_act`.

    Takes the arguments of `nn.LayerNorm`, and by keyword:

    Args:
        act: "none", "relu" or "leaky_relu".
        negative_slope: of "leaky_relu".

    Parameters and state_dict are `nn.LayerNorm`'s.

    Raises:
        ValueError: `act` is unknown, or what `fastgan.ops.layer_norm_act` raises.
    """

    def __init__(self, *args: Any, act: FixedAct = "none", negative_slope: float = 0.01, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.activation = Activation.named(act, negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm_act(x, self.normalized_shape, self.weight, self.bias, self.eps, **self.activation.fixed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.activation}"
