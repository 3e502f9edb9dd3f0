"""The vocabulary of the operators' settings."""

from typing import Literal

FixedAct = Literal["none", "relu", "leaky_relu"]
"""Activations without parameters."""

# The order of `enum class Act` in csrc/cpu/kernels.h.
Act = Literal[FixedAct, "prelu"]

# The order of `enum class BiasActivation`, likewise.
BiasActivation = Literal["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]
