"""fastgan: kernels that make GAN training fast, exact to the second derivative."""

from fastgan import nn, ops
from fastgan.fuse import explain, fuse, unfuse
from fastgan.lean import lean_double_backward
from fastgan.nn.spectral_norm import spectral_norm, spectral_norm_all
from fastgan.penalties import dragan_penalty, gradient_penalty, path_length_penalty, r1_penalty, r2_penalty

__all__ = [
    "dragan_penalty",
    "explain",
    "fuse",
    "gradient_penalty",
    "lean_double_backward",
    "nn",
    "ops",
    "path_length_penalty",
    "r1_penalty",
    "r2_penalty",
    "spectral_norm",
    "spectral_norm_all",
    "unfuse",
]
