"""Training reference systems: one loop for all, one module per system; and `CapturedStep`, for a loop of your own."""

from fastgan.training.captured import CapturedStep

__all__ = ["CapturedStep"]
