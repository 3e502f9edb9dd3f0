"""`ConvBnAct2d` and `ConvTransposeBnAct2d`, and what every fused layer asks of a convolution."""

from typing import Any, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops
from fastgan.nn.norm_act import (
    Activation,
    BatchNorm,
    attachment,
    batch_norm_act,
    new_prelu_weight,
    next_statistics,
    waits_for_others,
)
from fastgan.ops._norm import activate
from fastgan.ops._types import Act
from fastgan.ops.conv import Size2
from fastgan.ops.conv_norm_act import Norm, conv_norm_act
from fastgan.ops.resampled_conv import up_padding, up_weight

Conv = nn.Conv2d | nn.ConvTranspose2d
Module = TypeVar("Module", bound="_ConvBnAct")


def _pad(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Size2]:
    """(x, padding) for the operators, which pad with zeros and both sides alike: any other padding is done here."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return x, conv.padding
    left, right, top, bottom = sides = conv._reversed_padding_repeated_twice
    if conv.padding_mode == "zeros" and (left, top) == (right, bottom):
        return x, (top, left)
    return F.pad(x, sides, "constant" if conv.padding_mode == "zeros" else conv.padding_mode), 0


def is_doubling(up: nn.Upsample) -> bool:
    """Whether an upsampling repeats each pixel along both axes."""
    by = up.scale_factor if isinstance(up.scale_factor, tuple) else (up.scale_factor,)
    return up.mode == "nearest" and up.size is None and set(by) == {2}


def is_halving(pool: nn.AvgPool2d) -> bool:
    """Whether a pool gives the means of 2×2 pixels."""
    kernel_size, stride = (
        size if isinstance(size, (list, tuple)) else (size,) for size in (pool.kernel_size, pool.stride)
    )
    is_plain = pool.padding in (0, (0, 0)) and not pool.ceil_mode and pool.divisor_override is None
    return is_plain and set(kernel_size) == set(stride) == {2}


def slides(conv: nn.Module) -> bool:
    """Whether a convolution has taps at every pixel of its input, zeros beyond it, and is wider than a pixel."""
    return (
        isinstance(conv, nn.Conv2d)
        and set(conv.stride) == set(conv.dilation) == {1}
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(padding < taps for padding, taps in zip(conv.padding, conv.kernel_size, strict=True))
        and min(conv.kernel_size) > 1
    )


def _prepare(x: Tensor, conv: Conv, output_size: list[int] | None) -> tuple[Tensor, dict[str, Any]]:
    """(x, settings) with which an operator does what `conv` does."""
    settings: dict[str, Any] = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    if isinstance(conv, nn.Conv2d):
        x, settings["padding"] = _pad(x, conv)
        return x, settings
    settings |= {"padding": conv.padding, "output_padding": conv.output_padding}
    if output_size is not None:
        geometry: list[Any] = [conv.stride, conv.padding, conv.kernel_size, 2, conv.dilation]
        settings["output_padding"] = conv._output_padding(x, output_size, *geometry)
    return x, settings


def conv2d(
    x: Tensor, conv: Conv, output_size: list[int] | None = None, *, with_bias: bool = True, keep_layout: bool = True
) -> Tensor:
    """conv(x) by the operator."""
    op = ops.conv2d if isinstance(conv, nn.Conv2d) else ops.conv_transpose2d
    x, settings = _prepare(x, conv, output_size)
    return op(x, conv.weight, conv.bias if with_bias else None, **settings, keep_layout=keep_layout)


def up_conv2d(x: Tensor, conv: Conv, *, with_bias: bool = True) -> Tensor:
    """conv of x at twice its size, by the operator, in the layout that is fast."""
    bias, padding = conv.bias if with_bias else None, cast(Any, conv.padding)
    return ops.upsample_conv2d(x, conv.weight, bias, padding=padding, groups=conv.groups, keep_layout=False)


def conv_batch_norm_act(
    x: Tensor,
    conv: Conv,
    norm: BatchNorm,
    activation: Activation,
    output_size: list[int] | None = None,
    *,
    doubled: bool = False,
    keep_layout: bool = True,
) -> Tensor:
    """act(norm(conv(x))) by the operator, with all that `norm` does in a forward pass. `doubled`: of x at twice its size."""
    if waits_for_others(norm):
        y = up_conv2d(x, conv) if doubled else conv2d(x, conv, output_size, keep_layout=keep_layout)
        return batch_norm_act(y, norm, activation)
    op = ops.conv2d_batch_norm_act if isinstance(conv, nn.Conv2d) else ops.conv_transpose2d_batch_norm_act
    weight = conv.weight
    x, settings = _prepare(x, conv, output_size)
    if doubled:
        op, weight = ops.conv_transpose2d_batch_norm_act, up_weight(weight, conv.groups)
        settings |= {"stride": 2, "padding": up_padding(conv.weight, settings["padding"])}
    running_mean, running_var, training, momentum = next_statistics(norm)
    return op(
        x, weight, conv.bias, running_mean, running_var, norm.weight, norm.bias, training, momentum, norm.eps,
        **settings, **activation._asdict(), keep_layout=keep_layout,
    )  # fmt: skip


def conv_batch_norm_act_in_chain(
    x: Tensor, conv: Conv, norm: BatchNorm, activation: Activation, before: Norm | None, hands_on: bool
) -> tuple[Tensor, Norm | None]:
    """`conv_batch_norm_act` of x behind the norm `before`, in the layout that is fast. With `hands_on` the result may be the
    convolution's, beside the norm that is left to whoever takes it."""
    pads = isinstance(conv, nn.Conv2d) and (conv.padding_mode != "zeros" or isinstance(conv.padding, str))
    if before and (pads or waits_for_others(norm)):
        x, before = before.of(x), None
    if waits_for_others(norm):
        return conv_batch_norm_act(x, conv, norm, activation, keep_layout=False), None
    x, settings = _prepare(x, conv, None)
    names = ("stride", "padding", "dilation", "output_padding", "groups")
    stride, padding, dilation, output_padding, groups = (settings.get(name, 0) for name in names)
    running_mean, running_var, training, momentum = next_statistics(norm)
    act, slope, prelu_weight = activation
    return conv_norm_act(
        x, conv.weight, conv.bias, running_mean, running_var, norm.weight, norm.bias, training, momentum, norm.eps,
        (stride, padding, dilation, isinstance(conv, nn.ConvTranspose2d), output_padding, groups),
        act, slope, prelu_weight, False, before, hands_on,
    )  # fmt: skip


class _ConvBnAct(nn.Module):
    """What the two modules share; stands before the convolution's own class."""

    out_channels: int
    weight: Tensor
    bias: Tensor | None
    prelu_weight: nn.Parameter | None

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: Act = "relu",
        negative_slope: float = 0.01,
        num_parameters: int = 1,
        init: float = 0.25,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        like = self.weight
        self.bn = nn.BatchNorm2d(
            self.out_channels, eps, momentum, affine, track_running_stats, device=like.device, dtype=like.dtype
        )
        self.activation = Activation.named(act, negative_slope, Act)
        self.prelu_weight = new_prelu_weight(act, num_parameters, init, like)

    @classmethod
    def from_modules(cls: type[Module], conv: Conv, bn: nn.BatchNorm2d, act: nn.Module | None = None) -> Module:
        """act(bn(conv(x))) as one module that shares their tensors.

        Args:
            conv: an `nn.Conv2d` or `nn.ConvTranspose2d`, whichever this class is.
            bn: becomes the child `bn` itself.
            act: `nn.ReLU`, `nn.LeakyReLU`, `nn.PReLU` or None.

        Raises:
            TypeError: a module of another class.
            ValueError: `bn` is for another number of channels.
        """
        base = nn.Conv2d if issubclass(cls, nn.Conv2d) else nn.ConvTranspose2d
        for name, module, wanted in (("conv", conv, base), ("bn", bn, nn.BatchNorm2d)):
            if type(module) is not wanted:
                raise TypeError(f"{name} must be an nn.{wanted.__name__}, not {type(module).__name__}")
        if bn.num_features != conv.out_channels:
            raise ValueError(f"bn must be for conv's {conv.out_channels} channels, not {bn.num_features}")
        activation = Activation.of(act)
        names = ["kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
        names += ["output_padding"] if base is nn.ConvTranspose2d else []
        settings = {name: getattr(conv, name) for name in names}
        fused = cls(conv.in_channels, conv.out_channels, **settings, bias=conv.bias is not None, device="meta")
        fused.weight, fused.bias, fused.bn = conv.weight, conv.bias, bn
        fused.activation, fused.prelu_weight = activation._replace(prelu_weight=None), getattr(act, "weight", None)
        fused.training = conv.training
        return fused

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also takes the keys of `nn.Sequential(conv, bn, act)`."""
        for index, place in (("0.", ""), ("1.", "bn."), ("2.", "prelu_")):
            for key in [key for key in state_dict if key.startswith(prefix + index)]:
                state_dict[prefix + place + key.removeprefix(prefix + index)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _forward(self, x: Tensor, conv: Conv, output_size: list[int] | None = None) -> Tensor:
        activation = self.activation._replace(prelu_weight=self.prelu_weight)
        if type(self.bn) is nn.BatchNorm2d and not attachment(self.bn):
            return conv_batch_norm_act(x, conv, self.bn, activation, output_size)
        return activate(self.bn(conv2d(x, conv, output_size)), *activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.activation}"


class ConvBnAct2d(_ConvBnAct, nn.Conv2d):
    """y = act(batch_norm(conv(x))), by `fastgan.ops.conv2d_batch_norm_act`.

    Takes the arguments of `nn.Conv2d`, and by keyword:

    Args:
        eps, momentum, affine, track_running_stats: of the batch norm, as in `nn.BatchNorm2d`.
        act: "none", "relu", "leaky_relu" or "prelu".
        negative_slope: of "leaky_relu".
        num_parameters, init: of "prelu", as in `nn.PReLU`.

    `weight` and `bias` are the convolution's, `prelu_weight` is that of "prelu" or None; the child `bn` is an
    `nn.BatchNorm2d`, which is called where it has hooks or was replaced (by `convert_sync_batchnorm`, say). A state_dict of
    `nn.Sequential(conv, bn, act)` loads too.

    Raises:
        ValueError: `act` is unknown, or what `nn.Conv2d` and the operator raise.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x, self)


class ConvTransposeBnAct2d(_ConvBnAct, nn.ConvTranspose2d):
    """y = act(batch_norm(conv_transpose(x))), by `fastgan.ops.conv_transpose2d_batch_norm_act`.

    Takes the arguments of `nn.ConvTranspose2d`; all else is as in `ConvBnAct2d`.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self._forward(x, self, output_size)
