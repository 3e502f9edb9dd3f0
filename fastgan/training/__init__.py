"""Training reference systems: one loop for all, one module per system. For loops of your own: `CapturedStep` on CUDA, and
`keep_freed_memory` on the CPU."""

from fastgan.training.captured import CapturedStep
from fastgan.training.memory import keep_freed_memory

__all__ = ["CapturedStep", "keep_freed_memory"]
