"""fastgan: kernels that make GAN training fast, exact to the second derivative."""

from fastgan import nn, ops
from fastgan.fuse import explain, fuse, unfuse

__all__ = ["explain", "fuse", "nn", "ops", "unfuse"]
