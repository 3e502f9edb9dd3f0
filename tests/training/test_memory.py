"""`keep_freed_memory`, in a process of its own."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from fastgan.training.memory import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(1)
def step():
    tensors = [torch.ones(1 << 22) for _ in range(4)]  # 16 MiB each
for _ in range(3):  # until the heap has its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_asked_for():
    return int(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told what to keep")
def test_freed_memory_is_used_again_without_asking_the_system():
    assert pages_asked_for() < 100  # and else, by chance, 80,000
