"""What a benchmark is made of: cases, which name one row each, and the contests that they set up."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]
Key = tuple[str, str, str, str, str, str, str]
"""Of a case and its row: part, operator, work, shape, dtype, layout and cache."""

OURS = "fastgan"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class Contest:
    """A case set up: the same work done by several, and what else is known of it."""

    contenders: dict[str, Run]
    """`OURS`, and the peers: what a user could write in stock PyTorch."""
    gate: str = ""
    """Why our result is not right; empty where it is."""
    floor: Run | None = None
    """The copy of a tensor that the case is held against, and the bytes that it moves."""
    floor_bytes: int = 0
    bytes_moved: int = 0
    """What must be read and written at least, each tensor from memory, …"""
    flops: int = 0
    """… and computed."""
    saved: dict[str, int] = field(default_factory=dict)
    """Bytes kept for backward, by contender."""
    peak: dict[str, int] = field(default_factory=dict)
    """Most bytes allocated at once, by contender, above what was there before."""
    captured: bool = True
    """On CUDA: time replays of a captured graph; else the calls, with the time that it takes to launch them."""
    notes: list[str] = field(default_factory=list)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One row of the results. The fields here are its key."""

    part: str = ""
    """The file `bench_<part>.py` that it comes from, as `suite.cases` has it."""
    op: str
    work: str
    shape: str
    dtype: torch.dtype
    layout: str
    cache: str = "warm"
    """warm: the same tensors at every call. cold: others each time, so that they come from memory."""
    headline: bool = False
    """Whether the row is shown in short tables."""
    quick: bool = False
    """In few rounds, and without torch.compile, which takes longer to make its code than all else takes."""

    @property
    def key(self) -> Key:
        return self.part, self.op, self.work, self.shape, DTYPES[self.dtype], self.layout, self.cache

    @property
    def name(self) -> str:
        return ", ".join(self.key[1:])

    def admits(self, contender: str) -> bool:
        """Whether the contender of that name takes part."""
        return not self.quick or "compile" not in contender

    @abstractmethod
    def prepare(self, device: torch.device) -> Contest:
        """Builds the contenders, and compares what they compute."""
