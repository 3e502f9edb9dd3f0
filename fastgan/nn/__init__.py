"""The operators as modules: subclasses of torch's own, with the same parameters and buffers."""

from fastgan.nn.adain import AdaIN, LayerEpilogue, NoiseInjection, StyledConv
from fastgan.nn.conv_norm_act import ConvBnAct2d, ConvTransposeBnAct2d
from fastgan.nn.equalized import EqualConv2d, EqualLinear
from fastgan.nn.gradient_reversal import GradientReversal, ReversedLinear, WarmStartGradientReversal
from fastgan.nn.group_norm_act import GroupNormAct, InstanceNormAct2d, LayerNormAct
from fastgan.nn.norm_act import BatchNormAct2d
from fastgan.nn.pixel_shuffle_act import PixelShuffleAct
from fastgan.nn.spectral_norm import SpectralNorm
from fastgan.nn.upfirdn2d import Blur

__all__ = [
    "AdaIN",
    "BatchNormAct2d",
    "Blur",
    "ConvBnAct2d",
    "ConvTransposeBnAct2d",
    "EqualConv2d",
    "EqualLinear",
    "GradientReversal",
    "GroupNormAct",
    "InstanceNormAct2d",
    "LayerEpilogue",
    "LayerNormAct",
    "NoiseInjection",
    "PixelShuffleAct",
    "ReversedLinear",
    "SpectralNorm",
    "StyledConv",
    "WarmStartGradientReversal",
]
