"""Pixel shuffle and the activation after it as a module."""

from torch import Tensor, nn

from fastgan import ops
from fastgan.nn.norm_act import new_prelu_weight
from fastgan.ops._norm import check_act
from fastgan.ops._tensors import check_number
from fastgan.ops._types import Act


class PixelShuffleAct(nn.PixelShuffle):
    """y = act(pixel_shuffle(x)), by `fastgan.ops.pixel_shuffle_act`: `nn.PixelShuffle` and `nn.PReLU` in one.

    Args:
        upscale_factor: r of x (N, C·r², H, W) and y (N, C, r·H, r·W).
        act: "none", "relu", "leaky_relu" or "prelu".
        num_parameters: of "prelu", 1 or C.
        init: what the parameters of "prelu" begin with.
        negative_slope: of "leaky_relu".

    With "prelu" there is a parameter, `weight`, as in `nn.PReLU`; otherwise none, and the state_dict is empty.

    Raises:
        ValueError: `act` is unknown, or what `fastgan.ops.pixel_shuffle_act` raises.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        upscale_factor: int,
        act: Act = "prelu",
        num_parameters: int = 1,
        init: float = 0.25,
        negative_slope: float = 0.01,
    ):
        super().__init__(upscale_factor)
        check_act(act, Act)
        check_number("negative_slope", negative_slope)
        self.act: Act = act
        self.negative_slope = negative_slope
        self.weight = new_prelu_weight(act, num_parameters, init, None)

    def forward(self, input: Tensor) -> Tensor:
        return ops.pixel_shuffle_act(
            input, self.upscale_factor, self.act, self.weight, negative_slope=self.negative_slope
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, act={self.act}"
        if self.weight is not None:
            text += f", num_parameters={self.weight.numel()}"
        return f"{text}, negative_slope={self.negative_slope}" if self.act == "leaky_relu" else text
