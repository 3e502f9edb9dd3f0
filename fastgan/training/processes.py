"""Where a system trains, and beside how many other processes."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Processes(Protocol):
    """What systems and batches need of accelerate's `Accelerator`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def num_processes(self) -> int: ...

    @property
    def process_index(self) -> int: ...

    @property
    def is_main_process(self) -> bool: ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor: ...


@dataclass(frozen=True)
class OneProcess:
    """`Processes` of which there is one, without accelerate."""

    device: torch.device
    is_16_bit: bool = False
    """Whether forwards run in bfloat16."""
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_16_bit)

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor
