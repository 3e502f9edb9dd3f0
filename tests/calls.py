"""Calls of every operator, drawn: arguments that fit."""

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTS = ["none", "relu", "leaky_relu"]
CONSTANTS = ("coeff", "f", "mean", "running_mean", "running_var", "u", "v")
"""Arguments that have no gradient."""


def tensor(*shape, positive=False):
    """Strategy of tensors of a shape. The dtype comes later, as it is one for a whole call."""
    return st.integers(0, 99).map(lambda seed: values(shape, seed, positive))


def mean(*shape):
    """Strategy of means that no bias is equal to: of a difference of 0 rounding decides on which side of its kink an
    activation is."""
    return st.integers(100, 199).map(lambda seed: values(shape, seed))


def values(shape, seed, positive=False):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.abs() + 0.1 if positive else drawn


def maybe(strategy):
    return st.none() | strategy


EPS, SLOPE, ACT = st.sampled_from([1e-5, 0.1, 0.0]), st.sampled_from([0.01, 0.2, 0.0, -0.5]), st.sampled_from(ACTS)
SIZE2 = st.sampled_from([1, 2, (1, 2), [2, 1]])
PADDING = st.sampled_from([0, 1, (1, 0)])
CONV = {"stride": SIZE2, "padding": PADDING, "dilation": st.just(1), "groups": st.sampled_from([1, 2])}


def fitting(n=2, c=4, size=(5, 6)):
    """Of each operator a strategy for each argument, for images (n, c, *size); c is a multiple of 4."""
    x, vector = tensor(n, c, *size), tensor(c)
    norm = {"weight": maybe(vector), "bias": maybe(vector), "eps": EPS, "act": ACT, "negative_slope": SLOPE}
    running = {"running_mean": mean(c), "running_var": tensor(c, positive=True), "training": st.booleans()}
    upfirdn = {"x": x, "f": maybe(tensor(3, 3) | tensor(4) | tensor(1, 2)), "flip_filter": st.booleans(), "gain": EPS}
    conv3 = {"x": x, "weight": tensor(6, c, 3, 3), "bias": maybe(tensor(6)), "padding": st.just(1)}

    def conv(transposed, norm=False):
        """Of c channels to 6, in one group or two."""
        shapes = [(c, 6, 3, 3), (c, 3, 3, 3)] if transposed else [(6, c, 3, 3), (6, c // 2, 3, 3)]
        weight = st.sampled_from(shapes).flatmap(lambda shape: tensor(*shape))
        drawn = {"x": x, "weight": weight, "bias": maybe(tensor(6)), **CONV}
        if transposed:
            drawn["output_padding"] = st.sampled_from([0, 0, 1])
        if norm:
            drawn |= {"running_mean": mean(6), "running_var": tensor(6, positive=True), "training": st.booleans()}
            drawn |= {"bn_weight": maybe(tensor(6)), "bn_bias": maybe(tensor(6)), "eps": EPS, "act": ACT}
        return drawn

    return {
        "adain": {
            "x": x, "scale": tensor(n, c), "shift": tensor(n, c), "eps": EPS, "noise": maybe(tensor(n, 1, *size)),
            "noise_weight": maybe(vector), "bias": maybe(vector), "act": ACT, "negative_slope": SLOPE,
        },
        "adain_from_features": {"content": x, "style": tensor(n, c, 3, 2), "eps": EPS},
        "adaptive_avg_pool2d": {"x": x, "output_size": st.sampled_from([1, 3, (2, 5)])},
        "avg_pool2d": {"x": x, "kernel_size": SIZE2},
        "batch_norm_act": {"x": x, **running, **norm, "residual": maybe(x)},
        "bias_act": {
            "x": x, "b": maybe(vector), "dim": st.just(1), "act": st.sampled_from(["linear", "lrelu", "swish", "tanh"]),
            "alpha": maybe(SLOPE), "gain": maybe(EPS), "clamp": maybe(EPS),
        },
        "conv2d": conv(False),
        "conv2d_avg_pool2d": conv3,
        "conv2d_batch_norm_act": conv(False, norm=True),
        "conv_transpose2d": conv(True),
        "conv_transpose2d_batch_norm_act": conv(True, norm=True),
        "downsample2d": {**upfirdn, "down": SIZE2, "padding": PADDING},
        "filter2d": {**upfirdn, "padding": PADDING},
        "gradient_reversal": {"x": x, "coeff": EPS},
        "group_norm_act": {"x": x, "num_groups": st.sampled_from([1, 2, 4]), **norm, "residual": maybe(x)},
        "hardtanh": {"x": x},
        "instance_norm_act": {"x": x, **norm, "residual": maybe(x)},
        "layer_norm_act": {
            "x": x, "normalized_shape": st.just((c, *size)), "weight": maybe(tensor(c, *size)),
            "bias": maybe(tensor(c, *size)), "eps": EPS, "act": ACT, "negative_slope": SLOPE,
        },
        "leaky_relu": {"x": x, "negative_slope": SLOPE},
        "minibatch_stddev": {
            "x": x, "group_size": st.sampled_from([None, 1, 2, 4]), "num_channels": st.sampled_from([1, 2]),
        },
        "pixel_norm": {"x": x, "eps": EPS},
        "pixel_shuffle_act": {
            "x": x, "upscale_factor": st.sampled_from([1, 2]), "act": st.sampled_from([*ACTS, "prelu"]),
            "prelu_weight": maybe(tensor(1)), "negative_slope": SLOPE,
        },
        "prelu": {"x": x, "weight": tensor(1) | vector},
        "relu": {"x": x},
        "reversed_linear": {"x": tensor(n, c), "weight": tensor(3, c), "bias": maybe(tensor(3)), "coeff": EPS},
        "sample_norms": {"x": x, "eps": EPS},
        "sample_squares": {"x": x},
        "spectral_norm": {
            "weights": st.tuples(tensor(n * c, *size), tensor(3, c)), "u": st.tuples(tensor(n * c), tensor(3)),
            "v": st.tuples(tensor(size[0] * size[1]), tensor(c)), "n_power_iterations": st.sampled_from([0, 1, 3]),
        },
        "upfirdn2d": {**upfirdn, "up": SIZE2, "down": SIZE2, "padding": PADDING | st.sampled_from([[2, 1, 0, 3], -1])},
        "upsample2d": {**upfirdn, "up": SIZE2, "padding": PADDING},
        "upsample_conv2d": conv3,
    }  # fmt: skip
