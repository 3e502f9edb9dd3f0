"""The vocabulary of the operators' settings."""

from typing import Literal

# The order of `enum class Act` in csrc/cpu/kernels.h.
Act = Literal["none", "relu", "leaky_relu"]

# The order of `enum class BiasActivation`, likewise.
BiasActivation = Literal["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]

PixelShuffleActivation = Literal["none", "relu", "leaky_relu", "prelu"]
