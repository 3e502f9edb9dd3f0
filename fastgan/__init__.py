"""fastgan: kernels that make GAN training fast, exact to the second derivative."""

from fastgan import nn, ops
from fastgan.fuse import explain, fuse, unfuse
from fastgan.lean import lean_double_backward

__all__ = ["explain", "fuse", "lean_double_backward", "nn", "ops", "unfuse"]
