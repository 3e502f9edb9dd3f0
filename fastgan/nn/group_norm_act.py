"""The norms with the statistics of one sample as modules, each followed by an activation."""

import math
from typing import Any

from torch import Tensor, nn

from fastgan import ops
from fastgan.nn.norm_act import Activation
from fastgan.ops._norm import activate, with_zero_gradient
from fastgan.ops._types import FixedAct


def tracks_planes(layer: nn.Module) -> bool:
    """Whether an instance norm has running statistics, which no operator keeps."""
    return isinstance(layer, nn.InstanceNorm2d) and (layer.track_running_stats or layer.running_mean is not None)


def instance_norm_act(
    x: Tensor,
    norm: nn.InstanceNorm2d,
    activation: Activation,
    residual: Tensor | None = None,
    conv_bias: Tensor | None = None,
) -> Tensor:
    """act(norm(x + conv_bias) + residual) by the operator, for a norm without running statistics. Every plane's mean is
    subtracted, and the bias of a convolution with it: what is left of that is a gradient of zeros."""
    if math.prod(x.shape[2:]) == 1:  # of which stock says that it is too small
        y = norm(x)
        return activate(y if residual is None else y + residual, *activation)
    return ops.instance_norm_act(
        x, norm.weight, with_zero_gradient(norm.bias, conv_bias), norm.eps, **activation.fixed, residual=residual
    )


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

    Parameters, buffers and state_dict are `nn.InstanceNorm2d`'s. With `track_running_stats`, which no GAN asks for, it runs
    as stock does; without, planes of a single element are taken too, and give act(bias + residual).

    Raises:
        ValueError: `act` is unknown, x has not 3 or 4 dimensions or another number of channels, or what
            `fastgan.ops.instance_norm_act` raises.
    """

    def __init__(self, *args: Any, act: FixedAct = "none", negative_slope: float = 0.01, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.activation = Activation.named(act, negative_slope)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if tracks_planes(self):
            y = super().forward(x)
            return activate(y if residual is None else y + residual, *self.activation)
        self._check_input_dim(x)
        batched = x.dim() == 4
        images = x if batched else x[None]
        if images.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, not x of shape {tuple(x.shape)}")
        y = ops.instance_norm_act(
            images, self.weight, self.bias, self.eps, **self.activation.fixed,
            residual=residual if batched or residual is None else residual[None],
        )  # fmt: skip
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
