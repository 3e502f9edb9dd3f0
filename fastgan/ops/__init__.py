"""The operators as functions: arguments in the order of `torch.nn.functional`."""

import fastgan.ops.layout  # noqa: F401  (registers what `_tensors.dense` calls)
from fastgan.ops.activation import hardtanh, leaky_relu, prelu, relu
from fastgan.ops.adain import adain, adain_from_features
from fastgan.ops.avg_pool import adaptive_avg_pool2d, avg_pool2d
from fastgan.ops.bias_act import bias_act
from fastgan.ops.conv import conv2d, conv_transpose2d
from fastgan.ops.conv_norm_act import conv2d_batch_norm_act, conv_transpose2d_batch_norm_act
from fastgan.ops.gradient_reversal import gradient_reversal, reversed_linear
from fastgan.ops.group_norm_act import group_norm_act, instance_norm_act, layer_norm_act
from fastgan.ops.minibatch_stddev import minibatch_stddev
from fastgan.ops.norm_act import batch_norm_act
from fastgan.ops.penalty import sample_norms, sample_squares
from fastgan.ops.pixel_norm import pixel_norm
from fastgan.ops.pixel_shuffle_act import pixel_shuffle_act
from fastgan.ops.resampled_conv import conv2d_avg_pool2d, upsample_conv2d
from fastgan.ops.spectral_norm import spectral_norm
from fastgan.ops.sync_batch_norm_act import sync_batch_norm_act
from fastgan.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "adain",
    "adain_from_features",
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm_act",
    "bias_act",
    "conv2d",
    "conv2d_avg_pool2d",
    "conv2d_batch_norm_act",
    "conv_transpose2d",
    "conv_transpose2d_batch_norm_act",
    "downsample2d",
    "filter2d",
    "gradient_reversal",
    "group_norm_act",
    "hardtanh",
    "instance_norm_act",
    "layer_norm_act",
    "leaky_relu",
    "minibatch_stddev",
    "pixel_norm",
    "pixel_shuffle_act",
    "prelu",
    "relu",
    "reversed_linear",
    "sample_norms",
    "sample_squares",
    "setup_filter",
    "spectral_norm",
    "sync_batch_norm_act",
    "upfirdn2d",
    "upsample2d",
    "upsample_conv2d",
]
